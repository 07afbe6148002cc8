"""Many observers behind one. A failing one costs nobody anything but a count and a line in the log.

Requests that ended are handed on a few milliseconds later, many at a time and one observer after the other: code that
runs again and again at once costs a third. What else happens is handed on at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog

from observability.events import Event, Observer, RequestObserver
from observability.logs import Throttle
from observability.request import RequestEnded

BATCH_SECONDS = 0.02
BATCH_REQUESTS = 16  # some 0.1 ms of work: longer would be felt as latency


class Fanout:
    """Hands on what happens, in order. Never raises.

    Whoever reads what the observers made of requests calls `flush` first.
    """

    __slots__ = ("_call_later", "_is_due", "_now", "_of_events", "_of_requests", "_pending", "_throttle", "failures")

    def __init__(
        self,
        of_requests: Iterable[RequestObserver],
        of_events: Iterable[Observer],
        call_later: Callable[[float, Callable[[], None]], object],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._of_requests = tuple(of_requests)
        self._of_events = tuple(of_events)
        self._call_later = call_later
        self._now = now
        self._pending: list[RequestEnded] = []
        self._is_due = False
        self._throttle = Throttle(most=3)
        self.failures = 0

    def __call__(self, event: Event) -> None:
        for observer in self._of_events:
            self._hand_on([event], observer)

    def request_ended(self, request: RequestEnded) -> None:
        pending = self._pending
        pending.append(request)
        if not self._is_due:
            self._is_due = True
            self._call_later(BATCH_SECONDS, self._end_wait)
        elif len(pending) >= BATCH_REQUESTS:
            self.flush()

    def flush(self) -> None:
        """Hand on the requests that are pending."""
        requests, self._pending = self._pending, []
        for observer in self._of_requests:
            self._hand_on(requests, observer)

    def _end_wait(self) -> None:
        self._is_due = False
        self.flush()

    def _hand_on(self, happened: list[Any], observer: Callable[[Any], None]) -> None:
        left = iter(happened)
        while True:
            try:
                for one in left:
                    observer(one)
            except Exception as error:  # noqa: BLE001  the promise of this class
                self._failed(observer, error)  # and on with the next one
            else:
                return

    def _failed(self, observer: Callable[[Any], None], error: Exception) -> None:
        self.failures += 1
        held_back = self._throttle.admit("failed", self._now())
        if held_back is None:
            return
        name = getattr(observer, "__qualname__", type(observer).__qualname__)
        structlog.get_logger().error("an observer failed", observer=name, held_back=held_back, exc_info=error)
