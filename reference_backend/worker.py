"""The server's side of its worker process: hand requests over, and notice when it is gone.

A worker is STARTING (the model is being read) => READY => LOST (it crashed, or has given no sign for so long that it
never will: it answers between its steps). What is in flight then is told so at once; whoever comes meanwhile is
refused. `running` is one life of it; whoever wants another enters again.

Invariants:
- At most `bound` requests are in flight, and a few more of consumers that have less than others (admission.py). They
  are counted here, so that one too many is refused without asking.
- Every request that was taken hears of its end exactly once, unless it was aborted: a finish, or `lost`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from reference_backend import refusals
from reference_backend.admission import has_room
from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Abort, Ask, Ready, Sleep, Start, Turn, Wake, decode_for_server
from reference_backend.engine.request import Delta, Load, Picture, Sampling
from reference_backend.link import SILENT_SECONDS, Apart, Link, linked, spawned
from reference_backend.tensors import Terms

STEPS_TO_WAIT, LONGEST_TO_WAIT = 20, 4  # steps, and steps full of prompts: where they take longer, it is given up then
UNKNOWN_SECONDS = 60.0  # before it has taken a step: then it is given up


class _Link(Link[Ready]):
    """The socket to one worker process."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__(decode_for_server)
        self._on_change = on_change
        self.load = Load(0, 0, 0.0)
        self.waiting_for: dict[int, tuple[Callable[[Delta], None], str]] = {}  # with its consumer

    async def change(self, message: Sleep | Wake) -> None:
        """Have the worker go to sleep or wake up. Raises ModelError when it is gone."""
        if self.lost.is_set():
            raise ModelError("the worker is gone")
        self.opened = self.loop.create_future()
        self.send(message)
        await self.opened

    def take(self, message: object) -> None:
        if isinstance(message, Turn):
            self._deliver(message)
        elif isinstance(message, Ready):
            self.load = message.load
            self.opened.set_result(message)
        else:
            super().take(message)

    def _deliver(self, turn: Turn) -> None:
        self.load = turn.load
        for ticket, delta in turn.deltas:
            waiting = self.waiting_for.get(ticket)
            if waiting is None:
                continue  # aborted while this was on its way
            if delta.finish is not None:
                del self.waiting_for[ticket]
            waiting[0](delta)
        self._on_change()

    def patience(self) -> float:
        return patience(self.load)

    def end(self) -> None:
        waiting, self.waiting_for = self.waiting_for, {}
        for deliver, _ in waiting.values():
            deliver(Delta(None, "lost"))
        self._on_change()


def patience(load: Load) -> float:
    """Seconds without a sign, after which a worker that takes such steps is given up."""
    steps, longest = STEPS_TO_WAIT * load.step_seconds, LONGEST_TO_WAIT * load.longest_step_seconds
    return max(SILENT_SECONDS, steps, longest) if steps or longest else UNKNOWN_SECONDS


class Worker(Apart[_Link]):
    """What the API asks for tokens. It stays the same while processes come and go."""

    def __init__(self, start: Start, bound: int, clock: Callable[[], float]) -> None:
        super().__init__()
        self.bound = bound
        self.clock = clock
        self.context = 0
        self.rejects = 0  # requests that there was no room for
        self._start = start
        self._tickets = 0

    def __repr__(self) -> str:
        state = "ready" if self.is_ready else "away"
        return f"<{type(self).__name__} {state}, {self._in_flight} of {self.bound} in flight>"

    @property
    def is_ready(self) -> bool:
        return self.link is not None and not self.link.lost.is_set()

    @property
    def _in_flight(self) -> int:
        return 0 if self.link is None else len(self.link.waiting_for)

    def load(self) -> Load:
        """What the worker said last, with the requests that it has not seen yet among those that wait."""
        if self.link is None:
            return Load(0, 0, 0.0)
        last = self.link.load
        running = min(last.running, self._in_flight)
        return msgspec.structs.replace(last, running=running, waiting=self._in_flight - running)

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        terms: Terms,
        deliver: Callable[[Delta], None],
        salt: bytes = b"",
        pictures: Sequence[Picture] = (),
    ) -> int:
        """Hand over a request whose prompt and `max_tokens` fit the context. Returns its ticket.

        Raises ApiError 429 when as many are in flight as may be, 503 when there is no process.
        """
        if self.link is None or self.link.lost.is_set():
            raise refusals.loading()
        if not has_room(terms.tenant, [consumer for _, consumer in self.link.waiting_for.values()], self.bound):
            self.rejects += 1
            raise refusals.queue_full()
        self._tickets += 1
        deadline, tenant, priority = terms.deadline, terms.tenant, terms.priority
        self.link.send(Ask(self._tickets, prompt, sampling, deadline, priority, tenant, salt, list(pictures)))
        self.link.waiting_for[self._tickets] = deliver, tenant  # last: what cannot be sent must hold no place
        self.change()
        return self._tickets

    def abort(self, ticket: int) -> None:
        """Give a request up. Harmless for one that is over."""
        if self.link is not None and self.link.waiting_for.pop(ticket, None) is not None:
            self.link.send(Abort(ticket))
            self.change()

    async def sleep(self) -> None:
        """Have it give its device back, and the memory of its cache, while nothing is in flight. Raises ModelError."""
        if self.link is not None:
            await self.link.change(Sleep())

    async def wake(self) -> None:
        """Have it as before `sleep`, when it has produced a token. Raises ModelError."""
        if self.link is not None:
            await self.link.change(Wake())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """One life of a worker process, from when it is ready. Raises ModelError when it cannot be."""
        async with spawned("reference_backend.engine.service") as connection, self.linked(connection):
            yield

    @contextlib.asynccontextmanager
    async def linked(self, connection: socket.socket) -> AsyncIterator[None]:
        """The worker at the other end of a socket is in service. Raises ModelError."""
        async with linked(lambda: _Link(self.change), connection, self._start) as link:
            self.context = link.opened.result().context
            self.link = link
            try:
                yield
            finally:
                self.link = None
