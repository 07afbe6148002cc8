"""Calls as the pipeline makes them, and a client's connection that only remembers."""

from random import Random

from gateway.call import Call, Ids, accept, begin
from tests.support.http_message import parse


def call_of(
    path: str = "/v1/chat/completions",
    *lines: str,
    method: str = "POST",
    version: str = "1.1",
    body: bytes = b'{"model":"tiny"}',
    stream: bool = False,
    model: str | None = "tiny",
) -> Call:
    """An accepted call whose body has been read."""
    has_body = method in ("POST", "PUT", "PATCH")
    length = [f"content-length: {len(body)}"] if has_body else []
    head = [f"{method} {path} HTTP/{version}", "host: gateway", "content-type: application/json", *lines, *length]
    message = parse("\r\n".join([*head, "", ""]).encode())
    call = begin(message, Ids(Random(1)), 0.0)
    accept(call, message)
    call.body, call.stream, call.model = body if has_body else b"", stream, model
    return call


class MemoryClient:
    """What answers are written to in the place of a client's connection."""

    def __init__(self) -> None:
        self.relay = None
        self.forwarded_lines = b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n"
        self.written = b""
        self.ended = ""  # how: cut | abort

    def write(self, data: bytes) -> None:
        self.written += data

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
