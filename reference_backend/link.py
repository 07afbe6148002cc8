"""A process that serves a model, and the socket to it: started here, spoken to in frames, gone when its socket is.

The first thing that is said makes the process load; `opened` tells what came of it. From then on it is asked for a sign
each BEAT_SECONDS, and cut when it has given none for longer than its `patience`. No process is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from reference_backend.changing import Changing
from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Ping, Refused, Unframed, framed

BEAT_SECONDS = 2.0
SILENT_SECONDS = 10.0  # without a sign: it does not count as alive
END_WITHIN = 5.0  # seconds for the process to see that its socket is closed
O = TypeVar("O")  # noqa: E741  what a process says when it has opened its model


class Framed(asyncio.Protocol):
    """One end of such a socket."""

    def __init__(self, decode: Callable[[bytes], object]) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost = asyncio.Event()
        self._decode = decode
        self._unframed = Unframed()
        self._transport: asyncio.Transport | None = None

    @abstractmethod
    def take(self, message: Any) -> None:
        """A message has come."""

    def send(self, message: msgspec.Struct) -> None:
        """Say something. Harmless when nobody is there."""
        if self._transport is not None:
            self._transport.write(framed(message))

    def close(self) -> None:
        """End it when all that was said has gone out."""
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for body in self._unframed.feed(data):
            self.take(self._decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self.lost.set()


class Link(Framed, Generic[O]):
    """The server's end. `lost` is set when the process is gone, and whoever waited for it has been told."""

    def __init__(self, decode: Callable[[bytes], object]) -> None:
        super().__init__(decode)
        self.opened: asyncio.Future[O] = self.loop.create_future()
        self.silent_seconds = 0.0  # at the next beat, if there is no sign until then
        self._next_beat: asyncio.TimerHandle | None = None

    @abstractmethod
    def end(self) -> None:
        """Nothing comes any more: tell whoever waits."""

    def patience(self) -> float:
        """Seconds without a sign, after which it is given up."""
        return SILENT_SECONDS

    def beat(self) -> None:
        """Ask for a sign, if there is hope. Beats are counted, not time: a server that was held up hears none."""
        if self.silent_seconds > self.patience():
            self.cut()
            return
        self.send(Ping())
        if self.opened.done():  # else it loads, which may take longer than any work
            self.silent_seconds += BEAT_SECONDS
        self._next_beat = self.loop.call_later(BEAT_SECONDS, self.beat)

    def data_received(self, data: bytes) -> None:
        self.silent_seconds = 0.0
        super().data_received(data)

    def take(self, message: Any) -> None:
        if isinstance(message, Refused):
            self.opened.set_exception(ModelError(message.reason))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_beat is not None:
            self._next_beat.cancel()
        if not self.opened.done():
            self.opened.set_exception(ModelError("the process ended while it loaded the model"))
            self.opened.exception()  # it may be that nobody asks
        self.end()
        super().connection_lost(exc)


L = TypeVar("L", bound="Link[Any]")


class Apart(Changing, Generic[L]):
    """What has, or can have, a process of its own at the other end of `link`."""

    def __init__(self) -> None:
        super().__init__()
        self.link: L | None = None

    @property
    def is_alive(self) -> bool:
        """Whether there is no process that owes a sign."""
        return self.link is None or self.link.silent_seconds <= SILENT_SECONDS

    async def wait_lost(self) -> None:
        """Until its process ends by itself."""
        await (asyncio.Event() if self.link is None else self.link.lost).wait()


@contextlib.asynccontextmanager
async def linked(make: Callable[[], L], connection: socket.socket, first: msgspec.Struct) -> AsyncIterator[L]:
    """The process at the other end of a socket, from when it has opened what `first` says. Raises ModelError.

    It is cut at the end.
    """
    _, link = await asyncio.get_running_loop().create_connection(make, sock=connection)
    try:
        link.send(first)
        await link.opened
        link.beat()
        yield link
    finally:
        link.cut()
        await link.lost.wait()


@contextlib.asynccontextmanager
async def spawned(module: str) -> AsyncIterator[socket.socket]:
    """A process that runs a module, and the socket to it. It ends when the socket is closed, or is made to.

    Raises ModelError when the system has no process to give.
    """
    ours, theirs = socket.socketpair()
    command, nothing = (sys.executable, "-m", module, str(theirs.fileno())), asyncio.subprocess.DEVNULL
    with ours, theirs:
        try:
            process = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()], stdin=nothing)
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
