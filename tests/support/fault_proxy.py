"""A network that breaks as a test says: a TCP proxy between the gateway and a backend, Redis, etcd or a key server.

    async with FaultProxy(backend.port) as proxy:          # stands before a port of loopback
        ... proxy.url, proxy.port                          # what the gateway is told
        proxy.to_client.slices = 1                         # the answer comes byte by byte
        proxy.to_server.latency = 0.05                     # each piece of the request is held back so long

Each direction has its own faults, which may be changed at any time and then hold for connections that stand, too:

    latency     seconds that each piece waits                     bandwidth   bytes per second
    slices      most bytes in a piece, each sent on its own       swallows    what comes is thrown away
    cut_after   bytes that pass on a connection, then it ends,    corrupts    which byte of a connection is inverted
                by `cut_by`: "fin" or "rst", on both sides        stop(), go()  nothing is read, so that senders feel it

`passed` counts the bytes that went through. What happens to whole connections:

    proxy.reset(), proxy.finish()    those that stand end by RST, by FIN; awaited: they are gone
    proxy.black_hole = True          new ones are accepted and never answered; the server does not hear of them
    await proxy.refuse()             new ones are refused (nobody listens); those that stand go on
    await proxy.ignore()             new ones are not even accepted: their SYN is dropped (Linux)
    await proxy.listen()             new ones pass again, on the same port
    await proxy.heal()               everything as in the beginning; connections that stand are reset

`accepted` counts connections since the start, `open` those that stand. `buffer` (bytes of the kernel's receive buffers)
makes a direction that is stopped felt after so much.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from typing import Literal, Self

from tests.support.ports import free_port

PIECE_BYTES = 64 * 1024


@dataclass
class Direction:
    """What goes wrong one way."""

    latency: float = 0.0
    bandwidth: float | None = None
    slices: int | None = None
    swallows: bool = False
    cut_after: int | None = None
    cut_by: Literal["fin", "rst"] = "fin"
    corrupts: int | None = None
    passed: int = 0
    _going: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __post_init__(self) -> None:
        self._going.set()

    def stop(self) -> None:
        self._going.clear()

    def go(self) -> None:
        self._going.set()

    async def wait_going(self) -> None:
        await self._going.wait()

    @property
    def is_faulty(self) -> bool:
        settings = (self.bandwidth, self.slices, self.cut_after, self.corrupts)
        is_changed = self.latency > 0 or self.swallows or any(each is not None for each in settings)
        return is_changed or not self._going.is_set()

    def heal(self) -> None:
        self.latency, self.bandwidth, self.slices, self.swallows = 0.0, None, None, False
        self.cut_after, self.cut_by, self.corrupts = None, "fin", None
        self.go()


class FaultProxy:
    """One port of loopback before another. See above."""

    def __init__(self, port: int, *, buffer: int | None = None) -> None:
        self.to_server, self.to_client = Direction(), Direction()
        self.black_hole = False
        self._stands = False
        self.accepted = 0
        self.port = free_port()
        self._target = port
        self._buffer = buffer
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._links: set[_Link] = set()
        self._unanswered: socket.socket | None = None  # fills the queue of a listener that accepts nobody

    def __repr__(self) -> str:
        return f"<FaultProxy {self.port} -> {self._target} open={self.open} accepted={self.accepted}>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return len(self._links)

    @property
    def is_faulty(self) -> bool:
        """Whether anything is not as in the beginning. After its end it is not."""
        is_closed = self._accepting is None
        return self._stands and (is_closed or self.black_hole or self.to_server.is_faulty or self.to_client.is_faulty)

    async def __aenter__(self) -> Self:
        self._stands = True
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stands = False
        await self.refuse()
        await self.reset()

    async def listen(self) -> None:
        await self.refuse()
        self._listener = listener = self._bound()
        listener.listen(1024)
        self._accepting = asyncio.create_task(self._accept(listener))

    async def refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._accepting = None
        for each in (self._listener, self._unanswered):
            if each is not None:
                each.close()
        self._listener = self._unanswered = None

    async def ignore(self) -> None:
        await self.refuse()
        self._listener = listener = self._bound()
        listener.listen(0)  # room for one, who is never accepted
        self._unanswered = socket.create_connection(("127.0.0.1", self.port))

    async def reset(self) -> None:
        await self._end("rst")

    async def finish(self) -> None:
        await self._end("fin")

    async def heal(self) -> None:
        self.to_server.heal()
        self.to_client.heal()
        self.black_hole = False
        if self._accepting is None:
            await self.listen()
        await self.reset()

    async def _end(self, how: str) -> None:
        links = tuple(self._links)  # and none of those that come meanwhile
        for link in links:
            link.end(how)
        if links:
            await asyncio.wait([link.task for link in links])

    def _bound(self) -> socket.socket:
        listener = socket.socket()
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)  # what is accepted inherits it
        listener.bind(("127.0.0.1", self.port))
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            self.accepted += 1
            link = _Link(self, client)
            self._links.add(link)
            link.task = asyncio.create_task(link.run())
            link.task.add_done_callback(lambda _, link=link: self._forget(link))

    def _forget(self, link: _Link) -> None:
        link.close()
        self._links.discard(link)


class _Link:
    """One connection through the proxy."""

    task: asyncio.Task[None]

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None

    def end(self, how: str) -> None:
        """Close both sides so, unless they are closed."""
        if not self.task.done():
            if how == "rst":
                self._linger_not()
            self.task.cancel()

    async def run(self) -> None:
        """Carry both directions until both have ended, or one broke."""
        with contextlib.suppress(asyncio.CancelledError, _Cut):
            await self._carry()

    def close(self) -> None:
        """When the task is over, be it before its first step."""
        for each in (self._client, self._server):
            if each is not None:
                _read_out(each)
                each.close()

    async def _carry(self) -> None:
        proxy, loop = self._proxy, asyncio.get_running_loop()
        self._client.setblocking(False)
        if proxy.black_hole:
            while await _received(self._client):
                pass
            return
        self._server = server = socket.socket()
        server.setblocking(False)
        if proxy._buffer is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, proxy._buffer)
        try:
            await loop.sock_connect(server, ("127.0.0.1", proxy._target))
        except OSError:
            self._linger_not()
            return
        for each in (self._client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there = asyncio.create_task(self._pump(self._client, server, proxy.to_server))
        back = asyncio.create_task(self._pump(server, self._client, proxy.to_client))
        try:
            await asyncio.gather(there, back)
        finally:
            there.cancel()
            back.cancel()
            await asyncio.wait([there, back])

    async def _pump(self, source: socket.socket, sink: socket.socket, way: Direction) -> None:
        passed = 0
        try:
            while True:
                await way.wait_going()
                data = await _received(source)
                await way.wait_going()
                if way.latency:
                    await asyncio.sleep(way.latency)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if way.swallows:
                    continue
                end = way.cut_after
                left = None if end is None else max(0, end - passed)
                for piece in _pieces(data[:left], way.slices):
                    await self._send(sink, _corrupted(piece, passed, way.corrupts), way)
                    passed += len(piece)
                if left is not None and left <= len(data):
                    self._cut(way.cut_by)
        except OSError:  # one side has reset the connection: so does the other
            self._cut("rst")

    async def _send(self, sink: socket.socket, piece: bytes, way: Direction) -> None:
        await asyncio.get_running_loop().sock_sendall(sink, piece)
        way.passed += len(piece)
        if way.bandwidth is not None:
            await asyncio.sleep(len(piece) / way.bandwidth)
        elif way.slices is not None:
            await asyncio.sleep(0)  # lets the receiver read this piece alone

    def _cut(self, how: str) -> None:
        if how == "rst":
            self._linger_not()
        raise _Cut

    def _linger_not(self) -> None:
        for each in (self._client, self._server):
            if each is not None:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Cut(Exception):  # noqa: N818  it is an ending, not an error
    """The connection is over."""


async def _received(source: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(source, PIECE_BYTES)


def _read_out(sock: socket.socket) -> None:
    """A socket that is closed with bytes unread ends by RST and not by FIN."""
    with contextlib.suppress(OSError):
        for _ in range(64):
            if not sock.recv(PIECE_BYTES, socket.MSG_DONTWAIT):
                return


def _pieces(data: bytes, most: int | None) -> list[bytes]:
    most = most or PIECE_BYTES
    return [data[at : at + most] for at in range(0, len(data), most)]


def _corrupted(piece: bytes, offset: int, at: int | None) -> bytes:
    if at is None or not offset <= at < offset + len(piece):
        return piece
    changed = bytearray(piece)
    changed[at - offset] ^= 0xFF
    return bytes(changed)
