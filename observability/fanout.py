"""One observer made of many. A failing one costs nobody anything but a count and a line in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import structlog

from observability.events import Event, Observer
from observability.logs import Throttle

BATCH_SECONDS = 0.02
BATCH_EVENTS = 16  # some 0.2 ms of work: longer would be felt as latency


class Fanout:
    """Hands each event to every observer, in order. Never raises."""

    __slots__ = ("_now", "_observers", "_throttle", "failures")

    def __init__(self, observers: Iterable[Observer], now: Callable[[], float]) -> None:
        self._observers = tuple(observers)
        self._now = now
        self._throttle = Throttle(most=3)
        self.failures = 0

    def __call__(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:  # noqa: BLE001  the promise of this class
                self._failed(observer, event, error)

    def _failed(self, observer: Observer, event: Event, error: Exception) -> None:
        self.failures += 1
        held_back = self._throttle.admit("failed", self._now())
        if held_back is None:
            return
        name = getattr(observer, "__qualname__", type(observer).__qualname__)
        structlog.get_logger().error(
            "an observer failed", observer=name, on=type(event).__name__, held_back=held_back, exc_info=error
        )


def fanout(observers: Iterable[Observer], now: Callable[[], float] = time.perf_counter) -> Fanout:
    """Make one observer of `observers`; its `failures` counts what they raised."""
    return Fanout(observers, now)


class Batch:
    """Hands events on a few milliseconds later, many at a time: code that runs again and again at once costs a third.

    Whoever reads what the observers made of the events calls `flush` first.
    """

    __slots__ = ("_call_later", "_is_due", "_observe", "_pending")

    def __init__(self, observe: Observer, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._observe = observe
        self._call_later = call_later
        self._pending: list[Event] = []
        self._is_due = False

    def __call__(self, event: Event) -> None:
        pending = self._pending
        pending.append(event)
        if not self._is_due:
            self._is_due = True
            self._call_later(BATCH_SECONDS, self._end_wait)
        elif len(pending) >= BATCH_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Hand on what is pending."""
        pending, self._pending = self._pending, []
        for event in pending:
            self._observe(event)

    def _end_wait(self) -> None:
        self._is_due = False
        self.flush()
