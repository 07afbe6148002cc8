"""What one task waits for, on the hot path: it goes on in the stack of whoever wakes it.

An asyncio.Future wakes its task in the event loop's next turn, by a handle made for it. A request waits twice (for its
own bytes, for the backend's), and both times whoever has the bytes has nothing else to do: so `set` lets the task take
its next step at once.

It is a future to the task that awaits it, by the protocol that asyncio's own tasks follow for any object
(`_asyncio_future_blocking`, `add_done_callback`, `cancel`, `result`), and works in each of their versions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any


class Wakeup:
    """Set at most once, awaited by at most one task."""

    __slots__ = ("_asyncio_future_blocking", "_failure", "_loop", "_resume", "is_set")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._resume: Callable[[Any], object] | None = None
        self._failure: BaseException | None = None
        self.is_set = False

    def set(self) -> None:
        """Let the waiting task go on, before this returns; from within another task, soon after."""
        self.is_set = True
        resume = self._resume
        if resume is not None:
            self._resume = None
            try:
                resume(self)
            except RuntimeError:  # a task is taking a step, and tasks do not nest
                self._loop.call_soon(resume, self)

    def fail(self, failure: BaseException) -> None:
        """Let the waiting task go on with this error, as `set` lets it go on without."""
        self._failure = failure
        self.set()

    def __await__(self) -> Generator[Any, None, None]:
        if not self.is_set:
            self._asyncio_future_blocking = True
            yield self
        elif self._failure is not None:
            raise self._failure

    # What a task asks of what it waits for

    def add_done_callback(self, resume: Callable[[Any], object], *, context: object = None) -> None:  # noqa: ARG002
        self._resume = resume

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002
        resume, self._resume = self._resume, None
        if resume is None:
            return False
        self._failure = asyncio.CancelledError()
        self._loop.call_soon(resume, self)
        return True

    def result(self) -> None:
        if self._failure is not None:
            raise self._failure
