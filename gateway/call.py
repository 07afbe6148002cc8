"""Accept: from a parsed HTTP head to a vetted `Call`, and from its body to what the policy needs of it.

aiohttp's parser has already refused most malformed framing; what it lets through and we do not want is refused here:
other versions, absolute-form targets, bodies where none belong, `Connection` nominating headers that carry identity or
framing. The client's headers are sorted once, into those that go on and those that stop here (contract: "Headers").
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import msgspec

from observability.traceparent import parse_traceparent
from policies import errors

# What happens to a header of the request. Names not in the table go on unchanged.
FORWARD, DROP, AUTHORIZATION, HOST, CONNECTION, REQUEST_ID, TRACEPARENT, TRACESTATE, CONTENT_TYPE = range(9)
CONTENT_ENCODING, EXPECT, CONTENT_LENGTH = range(9, 12)

_TABLE: Final[dict[bytes, int]] = {
    b"authorization": AUTHORIZATION,
    b"host": HOST,
    b"connection": CONNECTION,
    b"x-request-id": REQUEST_ID,
    b"traceparent": TRACEPARENT,
    b"tracestate": TRACESTATE,
    b"content-type": CONTENT_TYPE,
    b"content-encoding": CONTENT_ENCODING,
    b"content-length": CONTENT_LENGTH,
    b"expect": EXPECT,
    # hop-by-hop (RFC 9110, 7.6.1), and what the gateway alone may say to a backend
    b"keep-alive": DROP,
    b"proxy-authenticate": DROP,
    b"proxy-authorization": DROP,
    b"proxy-connection": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"transfer-encoding": DROP,
    b"upgrade": DROP,
    b"http2-settings": DROP,
    b"forwarded": DROP,
    b"via": DROP,
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
_CLOSE_OR_KEEP: Final = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?").fullmatch
_TARGET: Final = re.compile(r"/[!-~]*").fullmatch
# Forms of a path that two readers may understand differently: they are routed nowhere. Letters, digits and `-_~` are
# among them where they are encoded: whoever decodes them would see another path than the route did (RFC 3986, 6.2.2.2).
_AMBIGUOUS: Final = re.compile(
    r"//|\\|;|/\.\.?(?:/|$)|%(?:2[def]|3[0-9b]|4[1-9a-f]|5[0-9acf]|6[1-9a-f]|7[0-9ae])", re.IGNORECASE
).search
_CONTROL: Final = re.compile(r"%(?:00|0d|0a)", re.IGNORECASE).search
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BODYLESS: Final = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_OIP_MODEL: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/.*)?").fullmatch
_MOST_MODEL_NAME: Final = 256  # registrations have at most 200; what is asked for is remembered here and there
_FORM_MENTIONS: Final = re.compile(
    rb"content-disposition:[^\r\n]*\bname\*?\s*=\s*[^\r\n]{0,20}model", re.IGNORECASE
).findall
_FORM_MODEL: Final = re.compile(
    rb'content-disposition: *form-data; *name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', re.IGNORECASE
).findall

# Paths of the OpenAI API that need a `model` in their JSON body.
_OPENAI_JSON: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/images/generations"}
)

_actions: dict[bytes, int] = {}
# Targets that were vetted: their path and protocol. Clients choose them, so it is bounded too.
_targets: dict[str, tuple[str, str]] = {}


def action_of(name: bytes) -> int:
    """What to do with a request header of this name. Remembers spellings, up to a bound: clients choose them."""
    known = _actions.get(name)
    if known is not None:
        return known
    lower = name.lower()
    action = _TABLE.get(lower, FORWARD)
    if lower.startswith(_OURS) or b"_" in lower:
        # `_` names can turn into `-` names behind the gateway (CGI, WSGI), and so into ours
        action = DROP
    if len(_actions) < 1024:
        _actions[name] = action
    return action


class Call:
    """One accepted request, and what it asks for. The body, model and stream come once the body has been read."""

    __slots__ = (
        "authorization",
        "body",
        "content_length",
        "content_type",
        "expects_continue",
        "host",
        "http10",
        "keep_alive",
        "lines",
        "method",
        "model",
        "parent_span_id",
        "path",
        "protocol",
        "raw_headers",
        "request_id",
        "sampled",
        "span_id",
        "stream",
        "target",
        "trace_id",
        "tracestate",
        "version",
    )

    method: str
    target: str  # path and query, as received
    path: str
    protocol: str  # openai | anthropic | oip | http
    raw_headers: tuple[tuple[bytes, bytes], ...]
    lines: list[bytes]  # header lines that go on to the backend
    body: bytes
    model: str | None
    version: str | None  # of the model, where the path names one
    stream: bool
    request_id: str
    trace_id: int
    span_id: int
    parent_span_id: int
    sampled: bool
    authorization: bytes | None
    host: bytes | None
    content_type: bytes
    content_length: bytes  # as sent; empty without one
    tracestate: bytes
    expects_continue: bool
    http10: bool
    keep_alive: bool

    def header(self, name: str) -> str | None:
        """First value of a header, by lower-case name, for a route that matches on headers."""
        wanted = name.encode("ascii", "replace")
        for key, value in self.raw_headers:
            if key.lower() == wanted:
                return value.decode("latin-1")
        return None


class Ids:
    """Ids of requests, traces and spans: random, and cheap enough for each request.

    A span's id is a random number of this process's plus a count: unique within a trace, which is all that is asked.
    """

    __slots__ = ("_next_span", "_rng")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._next_span = rng.getrandbits(63)

    def trace(self) -> int:
        return self._rng.getrandbits(128) or 1

    def span(self) -> int:
        self._next_span = span = (self._next_span + 1) & 0x7FFFFFFFFFFFFFFF or 1
        return span

    def give(self, call: Call, share: float) -> None:
        """All that a new request needs; its trace is kept by a chance of `share`."""
        rng = self._rng
        call.trace_id = trace_id = rng.getrandbits(128) or 1
        self._next_span = call.span_id = (self._next_span + 1) & 0x7FFFFFFFFFFFFFFF or 1
        call.parent_span_id = 0
        call.request_id = "%032x" % trace_id  # noqa: UP031  until the client names one; twice as fast as an f-string
        call.sampled = rng.random() < share


def begin(message: Any, ids: Ids, sample: float) -> Call:
    """A Call from a parsed head (aiohttp's RawRequestMessage), not vetted yet but fit to be refused and recorded."""
    call = Call()
    call.method = message.method
    call.target = target = message.path
    known = _targets.get(target)
    if known is not None:
        call.path, call.protocol = known
    else:
        call.path = target.partition("?")[0]
        call.protocol = _protocol_of(call.path)
    call.raw_headers = message.raw_headers
    ids.give(call, sample)
    call.body, call.model, call.version, call.stream = b"", None, None, False
    call.http10 = message.version == (1, 0)
    call.keep_alive = not message.should_close and not call.http10  # which would have to be told so in each answer
    return call


def accept(call: Call, message: Any) -> None:
    """Vet a call's head and sort its headers. Reads no body.

    Raises BadRequest, MethodNotAllowed, UnsupportedEncoding, ExpectationFailed, NoRoute.
    """
    _read_headers(call, message)
    method = call.method
    if method not in _METHODS:
        raise errors.MethodNotAllowed("This method is not served here.")
    if message.version != (1, 1) and not call.http10:
        raise errors.BadRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if call.http10 and message.chunked:
        raise errors.BadRequest("Transfer-Encoding does not exist in HTTP/1.0.")
    if call.target not in _targets:
        _check_target(call, call.target)
    if method in _BODYLESS and (call.content_length not in (b"", b"0") or message.chunked):
        raise errors.BadRequest(f"A {method} request must not have a body.")
    if call.protocol == "oip":
        names = _OIP_MODEL(call.path)
        if names:
            call.model = unquote(names[1])
            call.version = unquote(names[2]) if names[2] is not None else None


def _check_target(call: Call, target: str) -> None:
    if not _TARGET(target):
        raise errors.BadRequest("The request target must be a path in printable ASCII.")
    if "%" in target and _CONTROL(target):
        raise errors.BadRequest("The request target must not contain encoded control characters.")
    if _AMBIGUOUS(call.path):
        raise errors.NoRoute("No route has this path.")
    if len(_targets) < 1024 and len(target) < 256:
        _targets[target] = call.path, call.protocol


def _read_headers(call: Call, message: Any) -> None:
    call.lines = lines = []
    call.authorization = call.host = None
    call.content_type = call.content_length = b""
    call.expects_continue, call.tracestate = False, b""
    nominated = b""
    for name, value in message.raw_headers:
        action = _actions.get(name)
        if action is None:
            action = action_of(name)
        if action == FORWARD:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif action == DROP:
            continue
        elif action == CONTENT_TYPE:
            call.content_type = value
            lines.append(b"content-type: %b\r\n" % value)
        elif action == CONTENT_LENGTH:
            call.content_length = value
        elif action == HOST:
            if call.host is not None or not _HOST(value):
                raise errors.BadRequest("There must be exactly one Host header, naming a host.")
            call.host = value
        elif action == AUTHORIZATION:
            if call.authorization is not None:
                raise errors.BadRequest("There must be at most one Authorization header.")
            call.authorization = value
        elif action == REQUEST_ID:
            if _SANE_ID(value):
                call.request_id = value.decode()
        elif action == CONNECTION:
            if value not in _CLOSE_OR_KEEP:
                nominated += b"," + value
        else:
            _read_rare_header(call, action, value)
    if call.host is None and message.version != (1, 0):
        raise errors.BadRequest("There must be exactly one Host header, naming a host.")
    if nominated:
        call.lines = _without_nominated(lines, nominated)


def _without_nominated(lines: list[bytes], nominated: bytes) -> list[bytes]:
    """Header lines less those that `Connection` names (RFC 9110, 7.6.1). Raises BadRequest."""
    names = {token.strip() for token in nominated.lower().split(b",")}
    if any(name in _NEEDED or name.startswith(_OURS) for name in names):
        raise errors.BadRequest("The Connection header names a header that must not be removed.")
    return [line for line in lines if line.partition(b":")[0].lower() not in names]


def _read_rare_header(call: Call, action: int, value: bytes) -> None:
    if action == TRACEPARENT:
        parent = parse_traceparent(value)
        if parent is not None:
            call.trace_id, call.parent_span_id, _flags = parent
    elif action == TRACESTATE:
        call.tracestate = value if len(value) <= 512 else b""
    elif action == EXPECT:
        if value.lower() != b"100-continue":
            raise errors.ExpectationFailed("The only expectation met here is 100-continue.")
        call.expects_continue = not call.http10
    elif action == CONTENT_ENCODING and value.lower() != b"identity":
        raise errors.UnsupportedEncoding("A compressed request body is not accepted: send it unencoded.")


def _protocol_of(path: str) -> str:
    if path.startswith("/v1/"):
        return "anthropic" if path == "/v1/messages" else "openai"
    return "oip" if path.startswith("/v2/") else "http"


class Peek(msgspec.Struct, gc=False):
    """The only fields of a body that the policy needs."""

    model: str | None = None
    stream: bool | None = None


_peek = msgspec.json.Decoder(Peek).decode


class Asked(NamedTuple):
    """What a body asks for."""

    model: str | None
    stream: bool


def peek(call: Call) -> Asked:
    """Model and stream flag of a request body. Raises BadRequest.

    One decode, and a second, careful one only for a body in which another reader could find another `model`.
    """
    body = call.body
    if call.protocol in ("oip", "http") or not body:
        if _needs_model(call):
            raise errors.BadRequest("A JSON body with a `model` is needed.", param="model")
        return Asked(call.model, False)
    if call.content_type[:19].lower() == b"multipart/form-data" and not _needs_model(call):
        return Asked(_form_model(body), False)
    try:
        asked = _peek(body)
        if body.count(b'"model"') != 1 or body.count(b'"stream"') > 1 or b"\\u006" in body:
            _refuse_duplicates(body)
    except msgspec.ValidationError as problem:
        raise errors.BadRequest(f"The body is not what this path takes: {_safe(problem)}.") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise errors.BadRequest("The body is not valid JSON.") from None
    if not asked.model and _needs_model(call):
        raise errors.BadRequest("The body names no `model`.", param="model")
    if asked.model is not None and len(asked.model) > _MOST_MODEL_NAME:
        raise errors.BadRequest(f"The name of a model has at most {_MOST_MODEL_NAME} characters.", param="model")
    return Asked(asked.model, asked.stream is True)


def _needs_model(call: Call) -> bool:
    """Whether the path takes JSON with a `model` and nothing else."""
    return call.path in _OPENAI_JSON or call.protocol == "anthropic"


def _safe(problem: Exception) -> str:
    return str(problem).rstrip(".")[:200]


def _refuse_duplicates(body: bytes) -> None:
    """Raise BadRequest for a top-level object with two `model` or `stream` keys. May raise ValueError."""

    def keys_once(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        for name in ("model", "stream"):
            if names.count(name) > 1:
                raise errors.BadRequest(f"The body has `{name}` more than once.", param=name)

    json.loads(body, object_pairs_hook=keys_once)


def _form_model(body: bytes) -> str | None:
    found: list[bytes] = _FORM_MODEL(body)
    if len(found) > 1:
        raise errors.BadRequest("The form has `model` more than once.", param="model")
    if len(_FORM_MENTIONS(body)) != len(found):  # another reader might find one where we see none
        raise errors.BadRequest(
            'The form must name its model as `form-data; name="model"`, in one line.', param="model"
        )
    return found[0].decode("utf-8", "replace") if found else None
