"""Accept: what the header lines of a request say, vetted and sorted into those that go on and those that stop here.

A pure function of the lines (contract: "Headers"). A connection remembers the last ones it was given: a client that
keeps its connection mostly sends the same again.
"""

from __future__ import annotations

import re
from typing import Final

from observability.traceparent import TraceParent, parse_traceparent
from policies import errors

Lines = list[tuple[bytes, bytes]]

# What happens to a header of the request. Names not in the table go on unchanged.
FORWARD, DROP, AUTHORIZATION, HOST, CONNECTION, REQUEST_ID, TRACEPARENT, TRACESTATE, CONTENT_TYPE = range(9)
CONTENT_ENCODING, EXPECT, TRANSFER_ENCODING, LOOKALIKE, VIA = range(9, 14)

_TABLE: Final[dict[bytes, int]] = {
    b"authorization": AUTHORIZATION,
    b"host": HOST,
    b"connection": CONNECTION,
    b"x-request-id": REQUEST_ID,
    b"traceparent": TRACEPARENT,
    b"tracestate": TRACESTATE,
    b"content-type": CONTENT_TYPE,
    b"content-encoding": CONTENT_ENCODING,
    b"expect": EXPECT,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"via": VIA,
    # hop-by-hop (RFC 9110, 7.6.1), and what the gateway alone may say to a backend
    b"content-length": DROP,
    b"keep-alive": DROP,
    b"proxy-authenticate": DROP,
    b"proxy-authorization": DROP,
    b"proxy-connection": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"upgrade": DROP,
    b"http2-settings": DROP,
    b"forwarded": DROP,
    b"x-real-ip": DROP,
    b"endpoint-load-metrics-format": DROP,
    # an answer is looked into (usage, errors), so it must come unencoded
    b"accept-encoding": DROP,
}
_OURS: Final = (b"x-forwarded-", b"x-weir-", b"x-consumer-", b"x-envoy-")

# A header that `Connection` may not take away, because routing, identity or framing hangs on it.
_NEEDED: Final = frozenset(
    {b"authorization", b"host", b"content-length", b"transfer-encoding", b"content-type", b"expect"}
)

# A name that somebody behind the gateway might take for one that frames a message: `Transfer_Encoding`.
_FRAMING: Final = frozenset({b"contentlength", b"transferencoding"})
_NO_LETTERS: Final = re.compile(rb"[^a-z]+")

# Who handed a request on, of all that `Via` may name: only gateways like us, and only they go on (RFC 9110, 7.6.3).
_LONGEST_VIA: Final = 256  # ten gateways one after the other
_HOPS: Final = re.compile(rb"1\.1 weir-[0-9a-f]{16}").findall
_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?").fullmatch

_actions: dict[bytes, int] = {}


def action_of(name: bytes) -> int:
    """What to do with a request header of this name. Remembers spellings, up to a bound: clients choose them."""
    known = _actions.get(name)
    if known is not None:
        return known
    lower = name.lower()
    action = _TABLE.get(lower, FORWARD)
    if action == FORWARD and _NO_LETTERS.sub(b"", lower) in _FRAMING:
        action = LOOKALIKE
    elif lower.startswith(_OURS) or b"_" in lower:
        # `_` names can turn into `-` names behind the gateway (CGI, WSGI), and so into ours
        action = DROP
    if len(_actions) < 1024:
        _actions[name] = action
    return action


class Head:
    """The header lines of a request. Not changed once it is made: requests share it."""

    __slots__ = (
        "authorization",
        "chunked",
        "closes",
        "content_type",
        "expects_continue",
        "forwarded",
        "host",
        "parent",
        "request_id",
        "via",
    )

    def __init__(self, lines: Lines) -> None:
        """Raises BadRequest, UnsupportedEncoding, ExpectationFailed."""
        self.forwarded = b""  # lines that go on to the backend, and what it is told of the client's wishes
        self.authorization: bytes | None = None
        self.host: bytes | None = None
        self.content_type = b""
        self.request_id = b""  # the client's own, where it is sane
        self.parent: TraceParent | None = None
        self.via = b""  # the gateways that have handed the request on before
        self.chunked = self.expects_continue = False
        self.closes = False  # the client wants no other request on this connection
        self._read(lines)

    def refuse_loop(self, name: bytes) -> None:
        """Raise LoopDetected if the gateway of this name has handed the request on before, or too many have."""
        if self.via and (name in self.via or len(self.via) > _LONGEST_VIA):
            raise errors.LoopDetected("This request has come by before: a backend is registered that leads back here.")

    def _read(self, lines: Lines) -> None:
        forwarded: list[bytes] = []
        nominated = tracestate = b""
        for name, padded in lines:
            action, value = action_of(name), padded.rstrip(b" \t")  # the parser leaves what stands behind a value
            if action == FORWARD:
                forwarded.append(b"%b: %b\r\n" % (name, value))
            elif action == CONNECTION:
                nominated += b"," + value
            elif action == TRACESTATE:
                tracestate = value if len(value) <= 512 else b""
            elif action == CONTENT_TYPE:
                self.content_type = value
                forwarded.append(b"content-type: %b\r\n" % value)
            elif action != DROP:
                self._note(action, value)
        if nominated:
            forwarded = self._obey(forwarded, nominated)
        if self.host is not None:
            forwarded.append(b"x-forwarded-host: %b\r\n" % self.host)
        if self.via:
            forwarded.append(b"via: %b\r\n" % self.via)
        if tracestate:
            forwarded.append(b"tracestate: %b\r\n" % tracestate)
        self.forwarded = b"".join(forwarded)

    def _note(self, action: int, value: bytes) -> None:
        if action == HOST:
            if self.host is not None or not _HOST(value):
                raise errors.BadRequest("There must be exactly one Host header, naming a host.")
            self.host = value
        elif action == AUTHORIZATION:
            if self.authorization is not None:
                raise errors.BadRequest("There must be at most one Authorization header.")
            self.authorization = value
        elif action == REQUEST_ID:
            if _SANE_ID(value):
                self.request_id = value
        elif action == VIA:
            self.via = b", ".join([*filter(None, [self.via]), *_HOPS(value)])
        elif action == TRACEPARENT:
            self.parent = parse_traceparent(value)
        elif action == TRANSFER_ENCODING:
            if self.chunked or value.lower() != b"chunked":
                raise errors.BadRequest("The only Transfer-Encoding accepted here is `chunked`, once.")
            self.chunked = True
        elif action == LOOKALIKE:
            raise errors.BadRequest("A header must not be named almost like Content-Length or Transfer-Encoding.")
        elif action == EXPECT:
            if value.lower() != b"100-continue":
                raise errors.ExpectationFailed("The only expectation met here is 100-continue.")
            self.expects_continue = True
        elif action == CONTENT_ENCODING and value.lower() != b"identity":
            raise errors.UnsupportedEncoding("A compressed request body is not accepted: send it unencoded.")

    def _obey(self, forwarded: list[bytes], nominated: bytes) -> list[bytes]:
        """Header lines less those that `Connection` names (RFC 9110, 7.6.1)."""
        names = {token.strip() for token in nominated.lower().split(b",")}
        self.closes = b"close" in names or b"upgrade" in names  # what follows an upgrade is another protocol's
        if any(name in _NEEDED or name.startswith(_OURS) for name in names):
            raise errors.BadRequest("The Connection header names a header that must not be removed.")
        return [line for line in forwarded if line.partition(b":")[0].lower() not in names]
