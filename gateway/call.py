"""Accept: one request as the parser saw it, and its vetting.

The parser has already refused most malformed framing; what it lets through and we do not want is refused here and in
`head.py` and `resource.py`: other versions, absolute-form targets, bodies where none belong, `Connection` nominating
headers that carry identity or framing.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from gateway.head import Head, Lines
from gateway.resource import Resource, resource_of
from policies import errors

if TYPE_CHECKING:
    from gateway.client import Client

GRPC: Final = "grpc"  # in the place of a version of HTTP: whoever parsed it has looked at its framing

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BODYLESS: Final = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_DIGITS_AT_ONCE: Final = 64 * 1024  # of random hexadecimal


class Call:
    """One request. Its connection makes it when the head is complete, and adds the body as it comes."""

    __slots__ = (
        "body",
        "connection",
        "content_length",
        "head",
        "http10",
        "id_line",
        "is_broken",
        "is_whole",
        "keep_alive",
        "lines",
        "method",
        "model",
        "parent_span_id",
        "pieces",
        "request_id",
        "resource",
        "sampled",
        "size",
        "span_id",
        "stream",
        "trace_id",
        "version",
    )

    head: Head  # once it is accepted
    request_id: str
    id_line: bytes  # as a header line
    trace_id: str  # 32 and 16 hexadecimal digits
    span_id: str
    parent_span_id: str
    sampled: bool

    def __init__(
        self, connection: Client, method: str, target: bytes, version: str, lines: Lines, length: bytes
    ) -> None:
        self.connection = connection
        self.method = method
        self.resource: Resource = resource_of(target)
        self.version = version  # of HTTP; GRPC for what is none
        self.lines = lines
        self.content_length = length  # as sent; empty without one
        self.http10 = version == "1.0"
        self.keep_alive = False
        self.body = b""  # all of it once `is_whole`
        self.pieces: list[bytes] | None = None  # of a body that came in more than one
        self.size = 0
        self.is_whole = False
        self.is_broken = False  # the rest of the body is not framed as HTTP says
        self.model: str | None = None
        self.stream = False

    def again(self) -> Call:
        """The same request once more, for one that came again byte for byte. Of one that is whole."""
        call = Call(
            self.connection, self.method, self.resource.encoded, self.version, self.lines, self.content_length
        )  # fmt: skip
        call.body, call.size, call.is_whole = self.body, self.size, True
        return call

    def header(self, name: str) -> str | None:
        """First value of a header, by lower-case name, for a route that matches on headers."""
        wanted = name.encode("ascii", "replace")
        for key, value in self.lines:
            if key.lower() == wanted:
                return value.rstrip(b" \t").decode("latin-1")
        return None


class Ids:
    """Ids of requests, traces and spans: random digits, made many at once so that each costs next to nothing."""

    __slots__ = ("_at", "_digits", "_rng")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._digits, self._at = "", 0

    def trace(self) -> str:
        """32 hexadecimal digits."""
        return self._take(32)

    def span(self) -> str:
        """16 hexadecimal digits."""
        return self._take(16)

    def give(self, call: Call, share: float) -> None:
        """All that a new request needs, until its head says otherwise; its trace is kept by a chance of `share`."""
        call.trace_id = call.request_id = trace_id = self._take(32)
        call.id_line = b"x-request-id: %b\r\n" % trace_id.encode()
        call.span_id, call.parent_span_id = self._take(16), ""
        call.sampled = self._rng.random() < share

    def _take(self, count: int) -> str:
        start = self._at
        self._at = end = start + count
        if end > len(self._digits):
            self._digits = self._rng.randbytes(_DIGITS_AT_ONCE // 2).hex()
            start, self._at = 0, count
        return self._digits[start : self._at]


def accept(call: Call) -> None:
    """Vet a call's head. Reads no body.

    Raises BadRequest, MethodNotAllowed, UnsupportedEncoding, ExpectationFailed, NoRoute.
    """
    call.head = head = call.connection.head_of(call.lines)
    if head.request_id:
        call.request_id = head.request_id.decode()
        call.id_line = b"x-request-id: %b\r\n" % head.request_id
    if head.parent is not None:
        call.trace_id, call.parent_span_id = head.parent.trace_id, head.parent.parent_id
    call.keep_alive = not head.closes and not call.http10  # which would have to be told so in each answer
    method = call.method
    if method not in _METHODS:
        raise errors.MethodNotAllowed("This method is not served here.")
    if call.version != "1.1":
        _check_version(call, head)
    elif head.host is None:
        raise errors.BadRequest("There must be exactly one Host header, naming a host.")
    call.resource.check()
    if method in _BODYLESS and (head.chunked or call.content_length.strip(b"0 \t")):
        raise errors.BadRequest(f"A {method} request must not have a body.")


def _check_version(call: Call, head: Head) -> None:
    if call.version == GRPC:
        return
    if not call.http10:
        raise errors.BadRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if head.chunked:
        raise errors.BadRequest("Transfer-Encoding does not exist in HTTP/1.0.")
