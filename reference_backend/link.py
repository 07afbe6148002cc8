"""The server's end of a process that serves a model: started here, spoken to in frames, gone when its socket is.

The first thing that is said makes the process load; `opened` tells what came of it. No process is left behind.
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

from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Unframed, framed

END_WITHIN = 5.0  # seconds for the process to see that its socket is closed
O = TypeVar("O")  # noqa: E741  what a process says when it has opened its model


class Link(asyncio.Protocol, Generic[O]):
    """The socket to one process. `lost` is set when it is gone, and whoever waited for it has been told."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[O] = self.loop.create_future()
        self.lost = asyncio.Event()
        self._unframed = Unframed()
        self._transport: asyncio.Transport | None = None

    @abstractmethod
    def take(self, body: bytes) -> None:
        """A message has come."""

    @abstractmethod
    def end(self) -> None:
        """Nothing comes any more: tell whoever waits."""

    def send(self, message: msgspec.Struct) -> None:
        """Say something. Harmless when nobody is there."""
        if self._transport is not None:
            self._transport.write(framed(message))

    def cut(self) -> None:
        """End it from this side."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for body in self._unframed.feed(data):
            self.take(body)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        if not self.opened.done():
            self.opened.set_exception(ModelError("the process ended while it loaded the model"))
            self.opened.exception()  # it may be that nobody asks
        self.end()
        self.lost.set()


L = TypeVar("L", bound="Link[Any]")


@contextlib.asynccontextmanager
async def linked(make: Callable[[], L], connection: socket.socket) -> AsyncIterator[L]:
    """Speak with the process at the other end of a socket. It is cut at the end."""
    _, link = await asyncio.get_running_loop().create_connection(make, sock=connection)
    try:
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
