"""The server's side of its worker process: start it, hand requests over, notice when it is gone.

A worker is STARTING (the model is being read) => READY => LOST (it crashed, or has given no sign for so long that it
never will: it is asked for one each BEAT_SECONDS, and answers between its steps). What is in flight then is told so at
once; whoever comes meanwhile is refused. `running` is one life of it; whoever wants another enters again.

Invariants:
- At most `bound` requests are in flight. The count is here, so that one too many is refused without asking.
- Every request that was taken hears of its end exactly once, unless it was aborted: a finish, or `lost`.
- No process is left behind: it ends when its socket does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import cast

import msgspec

from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import (
    Abort,
    Ask,
    Ping,
    Ready,
    Refused,
    Sleep,
    Start,
    Turn,
    Unframed,
    Wake,
    decode_for_server,
    framed,
)
from reference_backend.engine.request import Delta, Load, Picture, Sampling

BEAT_SECONDS = 2.0
SILENT_SECONDS = 10.0  # without a sign: it does not count as alive
STEPS_TO_WAIT, LONGEST_TO_WAIT = 20, 4  # steps, and steps full of prompts: where they take longer, it is given up then
UNKNOWN_SECONDS = 60.0  # before it has taken a step: then it is given up
END_WITHIN = 5.0  # seconds for the process to see that its socket is closed


class WorkerBusy(Exception):  # noqa: N818  an answer, not a fault
    """As many requests are in flight as may be; nothing was started."""


class WorkerAway(Exception):  # noqa: N818  an answer, not a fault
    """There is no worker at this moment; nothing was started."""


class _Link(asyncio.Protocol):
    """The socket to one worker process."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._on_change = on_change
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.lost = asyncio.Event()
        self.load = Load(0, 0, 0.0)
        self.waiting_for: dict[int, Callable[[Delta], None]] = {}
        self._unframed = Unframed()
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self.silent_seconds = 0.0  # at the next beat, if there is no sign until then
        self._next_beat: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    async def change(self, message: Sleep | Wake) -> None:
        """Have the worker go to sleep or wake up. Raises ModelError when it is gone."""
        if self._transport is None:
            raise ModelError("the worker is gone")
        self.ready = self._loop.create_future()
        self.send(message)
        await self.ready

    def send(self, message: Start | Ask | Abort | Sleep | Wake | Ping) -> None:
        if self._transport is not None:
            self._transport.write(framed(message))

    def data_received(self, data: bytes) -> None:
        self.silent_seconds = 0.0
        for body in self._unframed.feed(data):
            message = decode_for_server(body)
            if isinstance(message, Turn):
                self._take(message)
            elif not isinstance(message, Ping):
                self._begin(message)

    def _begin(self, message: Ready | Refused) -> None:
        if isinstance(message, Refused):
            self.ready.set_exception(ModelError(message.reason))
            return
        self.load = message.load
        self.ready.set_result(message)
        if self._next_beat is None:
            self._beat()

    def _take(self, turn: Turn) -> None:
        self.load = turn.load
        for ticket, delta in turn.deltas:
            deliver = self.waiting_for.get(ticket)
            if deliver is None:
                continue  # aborted while this was on its way
            if delta.finish is not None:
                del self.waiting_for[ticket]
            deliver(delta)
        self._on_change()

    def _beat(self) -> None:
        """Ask for a sign, if there is hope. Beats are counted, not time: a server that was held up hears none."""
        if self.silent_seconds > patience(self.load):
            self.cut()
            return
        self.send(Ping())
        if self.ready.done():  # else it loads, which may take longer than any step
            self.silent_seconds += BEAT_SECONDS
        self._next_beat = self._loop.call_later(BEAT_SECONDS, self._beat)

    def cut(self) -> None:
        """End it from this side."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        if self._next_beat is not None:
            self._next_beat.cancel()
        if not self.ready.done():
            self.ready.set_exception(ModelError("the worker ended while it loaded the model"))
            self.ready.exception()  # it may be that nobody asks
        waiting, self.waiting_for = self.waiting_for, {}
        for deliver in waiting.values():
            deliver(Delta(None, "lost"))
        self._on_change()
        self.lost.set()


def patience(load: Load) -> float:
    """Seconds without a sign, after which a worker that takes such steps is given up."""
    steps, longest = STEPS_TO_WAIT * load.step_seconds, LONGEST_TO_WAIT * load.longest_step_seconds
    return max(SILENT_SECONDS, steps, longest) if steps or longest else UNKNOWN_SECONDS


class Worker:
    """What the API asks for tokens. It stays the same while processes come and go."""

    def __init__(self, bound: int, clock: Callable[[], float]) -> None:
        self.bound = bound
        self.clock = clock
        self.context = 0
        self.changes = 0  # of the load, since the start
        self._news = asyncio.Event()
        self._link: _Link | None = None
        self._tickets = 0

    def __repr__(self) -> str:
        state = "ready" if self.is_ready else "away"
        return f"<Worker {state}, {self._in_flight} of {self.bound} in flight>"

    @property
    def is_ready(self) -> bool:
        return self._link is not None and not self._link.lost.is_set()

    @property
    def is_alive(self) -> bool:
        """Whether there is no worker that owes a sign."""
        return self._link is None or self._link.silent_seconds <= SILENT_SECONDS

    @property
    def _in_flight(self) -> int:
        return 0 if self._link is None else len(self._link.waiting_for)

    def load(self) -> Load:
        """What the worker said last, with the requests that it has not seen yet among those that wait."""
        if self._link is None:
            return Load(0, 0, 0.0)
        last = self._link.load
        running = min(last.running, self._in_flight)
        return msgspec.structs.replace(last, running=running, waiting=self._in_flight - running)

    def _change(self) -> None:
        self.changes += 1
        self._news.set()

    async def wait_change(self, seen: int) -> None:
        """Wait until `changes` is another number than `seen`."""
        while self.changes == seen:
            self._news.clear()
            await self._news.wait()

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        deliver: Callable[[Delta], None],
        *,
        deadline: float | None,
        priority: int,
        tenant: str,
        salt: bytes,
        pictures: list[Picture] | None = None,
    ) -> int:
        """Hand over a request whose prompt and `max_tokens` fit the context. Returns its ticket.

        Raises WorkerAway, WorkerBusy.
        """
        if self._link is None or self._link.lost.is_set():
            raise WorkerAway
        if self._in_flight >= self.bound:
            raise WorkerBusy
        self._tickets += 1
        self._link.waiting_for[self._tickets] = deliver
        self._link.send(Ask(self._tickets, prompt, sampling, deadline, priority, tenant, salt, pictures or []))
        self._change()
        return self._tickets

    def abort(self, ticket: int) -> None:
        """Give a request up. Harmless for one that is over."""
        if self._link is not None and self._link.waiting_for.pop(ticket, None) is not None:
            self._link.send(Abort(ticket))
            self._change()

    async def sleep(self) -> None:
        """Have it give its device back, and the memory of its cache, while nothing is in flight. Raises ModelError."""
        if self._link is not None:
            await self._link.change(Sleep())

    async def wake(self) -> None:
        """Have it as before `sleep`, when it has produced a token. Raises ModelError."""
        if self._link is not None:
            await self._link.change(Wake())

    async def wait_lost(self) -> None:
        if self._link is not None:
            await self._link.lost.wait()

    @contextlib.asynccontextmanager
    async def running(self, start: Start) -> AsyncIterator[None]:
        """One life of a worker process, from when it is ready. Raises ModelError when it cannot be."""
        async with spawned("reference_backend.engine.service") as connection, self.linked(connection, start):
            yield

    @contextlib.asynccontextmanager
    async def linked(self, connection: socket.socket, start: Start) -> AsyncIterator[None]:
        """The worker at the other end of a socket is in service. Raises ModelError."""
        _, link = await asyncio.get_running_loop().create_connection(lambda: _Link(self._change), sock=connection)
        try:
            link.send(start)
            self.context = (await link.ready).context
            self._link = link
            yield
        finally:
            self._link = None
            link.cut()
            await link.lost.wait()


@contextlib.asynccontextmanager
async def spawned(module: str) -> AsyncIterator[socket.socket]:
    """A process that runs a module, and the socket to it. It ends when the socket is closed, or is made to.

    Raises ModelError when the system has no process to give.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            raise ModelError(f"no process can be started for the model: {error}") from error
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()
            try:
                async with asyncio.timeout(END_WITHIN):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
