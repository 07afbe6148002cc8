"""One observer made of many. A failing one costs nobody anything but a count and a line in the log.

Events are handed on a few milliseconds later, many at a time and one observer after the other: code that runs again and
again at once costs a third.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import structlog

from observability.events import Event, Observer
from observability.logs import Throttle

BATCH_SECONDS = 0.02
BATCH_EVENTS = 16  # some 0.1 ms of work: longer would be felt as latency


class Fanout:
    """Hands events to every observer, in order, soon. Never raises.

    Whoever reads what the observers made of the events calls `flush` first.
    """

    __slots__ = ("_call_later", "_is_due", "_now", "_observers", "_pending", "_throttle", "failures")

    def __init__(
        self,
        observers: Iterable[Observer],
        call_later: Callable[[float, Callable[[], None]], object],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._observers = tuple(observers)
        self._call_later = call_later
        self._now = now
        self._pending: list[Event] = []
        self._is_due = False
        self._throttle = Throttle(most=3)
        self.failures = 0

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
        events, self._pending = self._pending, []
        for observer in self._observers:
            self._hand_on(events, observer)

    def _end_wait(self) -> None:
        self._is_due = False
        self.flush()

    def _hand_on(self, events: list[Event], observer: Observer) -> None:
        left = iter(events)
        while True:
            try:
                for event in left:
                    observer(event)
            except Exception as error:  # noqa: BLE001  the promise of this class
                self._failed(observer, event, error)  # and on with the next event
            else:
                return

    def _failed(self, observer: Observer, event: Event, error: Exception) -> None:
        self.failures += 1
        held_back = self._throttle.admit("failed", self._now())
        if held_back is None:
            return
        name = getattr(observer, "__qualname__", type(observer).__qualname__)
        structlog.get_logger().error(
            "an observer failed", observer=name, on=type(event).__name__, held_back=held_back, exc_info=error
        )
