"""A backend that takes down what reaches it, byte by byte, as a strict reader understands it. It believes nothing of what
stands before it: gateway, nginx, HAProxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from typing import Self

_LINE = re.compile(rb"([A-Za-z-]+) ([^ ]+) HTTP/[0-9]\.[0-9]").fullmatch
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*").fullmatch
_MOST = 1 << 24  # bytes of a body
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"


@dataclass(frozen=True)
class Reached:
    """One whole request. `client` is where the proxy says it came from."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]  # names in lower case
    body: bytes

    @property
    def client(self) -> str:
        return self.header("x-forwarded-for") or ""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def __str__(self) -> str:
        """What it asks, and how many bytes it brings."""
        return f"{self.method} {self.target} {len(self.body)}"


class Stray(Exception):  # noqa: N818  it is what was found, not an error of ours
    """These bytes are no request."""


class RecordingBackend:
    """`async with RecordingBackend() as backend`: then `backend.url`, `backend.reached`, `backend.stray`."""

    def __init__(self) -> None:
        self.reached: list[Reached] = []
        self.stray: list[bytes] = []  # what came and was no request
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    request = await self._read(reader)
                    if request.target == "/health":
                        writer.write(_ANSWER + b"{}")
                    else:
                        self.reached.append(request)
                        writer.write(_ANSWER if request.method == "HEAD" else _ANSWER + b"{}")
        except Stray as stray:
            self.stray.append(stray.args[0])
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Reached:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise Stray(end.partial) from None
            raise
        except asyncio.LimitOverrunError:
            raise Stray(await reader.read(65536)) from None
        line, *lines = head[:-4].split(b"\r\n")
        asked, fields = _LINE(line), [_FIELD(each) for each in lines]
        if asked is None or not all(fields):
            raise Stray(head)
        headers = tuple((found[1].decode().lower(), found[2].decode("latin-1")) for found in fields if found)
        lengths = [int(value) for name, value in headers if name == "content-length"]
        codings = [value.lower() for name, value in headers if name == "transfer-encoding"]
        if len(lengths) + len(codings) > 1 or (codings and codings != ["chunked"]) or max(lengths, default=0) > _MOST:
            raise Stray(head)
        body = await self._chunks(reader) if codings else await reader.readexactly(lengths[0] if lengths else 0)
        return Reached(asked[1].decode(), asked[2].decode("latin-1"), headers, body)

    async def _chunks(self, reader: asyncio.StreamReader) -> bytes:
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return body
