"""Calls as the pipeline gets them, their record, and a client's connection that only remembers."""

import asyncio
from random import Random

from gateway.call import Call, Ids, accept
from gateway.client import Client
from gateway.head import Head
from gateway.local_answers import answer_bytes
from gateway.trail import Trail
from tests.support.http_message import parse


def call_of(
    path: str = "/v1/chat/completions",
    *lines: str,
    method: str = "POST",
    version: str = "1.1",
    body: bytes = b'{"model":"tiny"}',
    stream: bool = False,
    model: str | None = "tiny",
    client: "MemoryClient | None" = None,
) -> Call:
    """An accepted call whose body has been read. It came on `client`, or on a connection of its own."""
    has_body = method in ("POST", "PUT", "PATCH")
    length = [f"content-length: {len(body)}"] if has_body else []
    head = [f"{method} {path} HTTP/{version}", "host: gateway", "content-type: application/json", *lines, *length]
    call = parse("\r\n".join([*head, "", ""]).encode() + (body if has_body else b""))
    call.connection = client or MemoryClient()
    Ids(Random(1)).give(call, 0.0)
    accept(call)
    call.stream, call.model = stream, model
    return call


def trail_of(clock, started_at: float = 0.0) -> Trail:
    return Trail(clock, started_at, "p1", b"x-weir-policy: p1\r\n")


class MemoryClient(Client):
    """What answers are written to in the place of a client's connection."""

    def __init__(self) -> None:
        super().__init__()
        self.relay = None
        self.forwarded_lines = b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n"
        self.written = b""
        self.ended = ""  # how: cut | abort

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def head_of(self, lines) -> Head:
        return Head(lines)

    def write(self, data: bytes) -> None:
        self.written += data

    def answer(self, call, trail, status, document) -> int:
        answer = answer_bytes(call, trail, status, document)
        self.write(answer)
        return len(answer)

    def cut(self) -> None:
        self.ended = self.ended or "cut"

    def abort(self) -> None:
        self.ended = "abort"

    @property
    def status(self) -> int:
        return int(self.written.split(b" ", 2)[1])

    @property
    def head(self) -> bytes:
        return self.written.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        """What came of the body; chunks are put together, and must be whole."""
        body = self.written.partition(b"\r\n\r\n")[2]
        if b"transfer-encoding: chunked" not in self.head:
            return body
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size, 16)
            assert body[length : length + 2] == b"\r\n"
            whole, body = whole + body[:length], body[length + 2 :]
        return whole

    @property
    def is_ended(self) -> bool:
        """Whether the last chunk came."""
        return self.written.endswith(b"\r\n0\r\n\r\n")
