"""A backend that answers with exactly the bytes a test wants, and records exactly the bytes it was sent.

A script is an async function `script(connection)`; it is run for each request, after its head and body have come, or
after its head alone where `reads_body` is false: then it reads the body itself, or does not.
"""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Self

from tests.support.ports import free_port


class Hangup(Exception):  # noqa: N818  it is an ending, not an error
    """Raised by a script to end its connection."""


class BackendConnection:
    """One accepted connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.head = b""
        self.body = b""
        self.requests = 0

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    def header(self, name: str) -> str | None:
        wanted = name.lower().encode() + b":"
        for line in self.head.split(b"\r\n")[1:]:
            if line.lower().startswith(wanted):
                return line.split(b":", 1)[1].strip().decode("latin-1")
        return None

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def json(self, document: object, status: int = 200, *headers: str) -> None:
        body = json.dumps(document).encode()
        lines = "".join(line + "\r\n" for line in headers)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
        await self.send(head.encode() + body)

    async def events(self, *documents: str, done: bool = True) -> None:
        """A whole event stream."""
        await self.begin_events()
        for document in documents:
            await self.chunk(f"data: {document}\n\n".encode())
        if done:
            await self.chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")

    async def begin_events(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def wait_closed(self) -> None:
        """Until the gateway has closed its side."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """Close with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[BackendConnection], Awaitable[None]]


async def answer_ok(connection: BackendConnection) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    await connection.json({"id": "1", "object": "chat.completion", "choices": [], "usage": usage})


class ScriptedBackend:
    """`async with ScriptedBackend(script) as backend`: then `backend.url`, `backend.heads`, `backend.open`."""

    def __init__(
        self, script: Script = answer_ok, tls: ssl.SSLContext | None = None, *, host: str = "127.0.0.1"
    ) -> None:
        self.script = script
        self.host = host
        self._tls = tls
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.healthy = True
        self.well: asyncio.Event | None = None  # before which it does not answer for its health
        self.reads_body = True
        self.failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, free_port(), ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        self.connections += 1
        connection = BackendConnection(reader, writer)
        try:
            while True:
                await self._one(connection)
        except (Hangup, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except Exception as failure:  # a test's own bug must be seen
            self.failures.append(failure)
            raise
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _one(self, connection: BackendConnection) -> None:
        connection.head = await connection.reader.readuntil(b"\r\n\r\n")
        if self.reads_body:
            connection.body = await connection.reader.readexactly(int(connection.header("content-length") or 0))
        if connection.path == "/health":
            if self.well is not None:
                await self.well.wait()
            await connection.json({}, 200 if self.healthy else 503)
            return
        connection.requests += 1
        self.heads.append(connection.head)
        self.bodies.append(connection.body)
        await self.script(connection)
