"""What a backend's head means: pure. Which answers pass, how they are framed, and which are failures.

Only answers that can be told whole from cut are let through: framed by Content-Length or chunks, or, ended by the
connection's end, those that say themselves that they are complete (an event stream's last event, a JSON document).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from gateway.call import Call
from gateway.headers import is_sane_value, passing_name
from policies.retry import Failure

HOLD_BYTES: Final = 1024 * 1024
_MOST_VALUE_BYTES: Final = 8000  # of a header that passes: what clients' parsers take (aiohttp: 8190 for the line)


class Mode(Enum):
    """How an answer's body goes to the client."""

    EVENTS = "events"  # event by event, as they come
    HOLD = "hold"  # JSON up to HOLD_BYTES: sent when it is whole, so that a broken one can still become a 502
    RAW = "raw"  # bytes as they come
    EMPTY = "empty"  # no body


class AnswerHead:
    """The head of one answer, sorted. Attributes are plain: one is made for each answer."""

    __slots__ = (
        "chunked",
        "content_type",
        "encoded",
        "length",
        "lines",
        "load_report",
        "malformed",
        "not_started",
        "retry_after",
        "status",
    )

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.length: int | None = None
        self.chunked = self.encoded = self.malformed = self.not_started = False
        self.content_type = self.load_report = self.retry_after = b""
        lines = []
        for header in headers:
            known = _known.get(header)
            kind, line, value = known if known is not None else _remember(header)
            if line:
                lines.append(line)
            if kind != _PLAIN:
                self._sort(kind, value)
        self.lines = b"".join(lines)

    def _sort(self, kind: int, value: bytes) -> None:
        if kind == _MALFORMED:
            self.malformed = True
        elif kind == _CONTENT_LENGTH:
            self.malformed |= self.length is not None or not value.isdigit() or len(value) > 18
            self.length = 0 if self.malformed else int(value)
        elif kind == _TRANSFER_ENCODING:
            self.malformed |= self.chunked or value.lower() != b"chunked"
            self.chunked = True
        elif kind == _CONTENT_TYPE:
            self.content_type = value.lower()
        elif kind == _CONTENT_ENCODING:
            self.encoded = value.lower() != b"identity"
        elif kind == _LOAD_REPORT:
            self.load_report = value
        elif kind == _NOT_STARTED:
            self.not_started = True
        elif kind == _RETRY_AFTER:
            self.retry_after = value


# What a header means to us besides passing or not.
_PLAIN, _MALFORMED, _CONTENT_LENGTH, _TRANSFER_ENCODING, _CONTENT_TYPE, _CONTENT_ENCODING = range(6)
_LOAD_REPORT, _NOT_STARTED, _RETRY_AFTER = range(6, 9)
_KINDS: Final = {
    b"content-length": _CONTENT_LENGTH,
    b"transfer-encoding": _TRANSFER_ENCODING,
    b"content-type": _CONTENT_TYPE,
    b"content-encoding": _CONTENT_ENCODING,
    b"endpoint-load-metrics": _LOAD_REPORT,
    b"x-backend-not-started": _NOT_STARTED,
    b"retry-after": _RETRY_AFTER,
}
_known: dict[tuple[bytes, bytes], tuple[int, bytes, bytes]] = {}


def _look_at(header: tuple[bytes, bytes]) -> tuple[int, bytes, bytes]:
    """What a header means, its line for the client (b"" when it does not pass), and its value."""
    name, value = header[0], header[1].rstrip(b" \t")  # the parser leaves what stands behind a value
    passing = passing_name(name)
    if passing is None:
        return _KINDS.get(name.lower(), _PLAIN), b"", value
    if len(value) > _MOST_VALUE_BYTES or not is_sane_value(value):
        return _MALFORMED, b"", value
    return _KINDS.get(passing, _PLAIN), b"%b: %b\r\n" % (passing, value), value


def _remember(header: tuple[bytes, bytes]) -> tuple[int, bytes, bytes]:
    """Backends say the same few headers all day. Bounded: only short ones, and it starts anew when it is full.

    A load report is another one each time.
    """
    known = _look_at(header)
    if known[0] != _LOAD_REPORT and len(header[0]) + len(header[1]) <= 256:
        if len(_known) >= 1024:
            _known.clear()
        _known[header] = known
    return known


def judge(call: Call, head: AnswerHead) -> Mode | Failure:
    """Whether this head begins an answer that may pass to the client (and how), or is a failure."""
    status = head.status
    if status == 304 and call.resource.protocol == "http" and not head.malformed:  # the client asked if it changed
        return Mode.EMPTY
    if head.malformed or not 200 <= status <= 599 or 300 <= status <= 399 or (head.chunked and head.length is not None):
        return Failure.PROTOCOL
    if status == 429:
        return Failure.BUSY
    if status >= 500:
        return Failure.NOT_STARTED if status == 503 and head.not_started else Failure.SERVER_ERROR
    if call.method == "HEAD" or status == 204:
        return Mode.EMPTY
    if call.resource.protocol == "http":
        return _mode_of_plain(head)
    return _mode_of_api(call, head)


def _mode_of_plain(head: AnswerHead) -> Mode | Failure:
    if head.content_type.startswith(b"text/event-stream") and not head.encoded:
        return Mode.EVENTS if head.chunked else Failure.PROTOCOL
    return Mode.RAW if head.chunked or head.length is not None else Failure.PROTOCOL


def _mode_of_api(call: Call, head: AnswerHead) -> Mode | Failure:
    kind = head.content_type
    is_json = kind.startswith(b"application/json")
    if head.encoded or kind.startswith(b"text/html") or head.status in (401, 403, 407):
        # 401/403: the backend does not know *us*; the client's own token was fine
        return Failure.PROTOCOL
    if kind.startswith(b"text/event-stream"):
        return Mode.EVENTS
    if head.status >= 400 and not is_json:
        return Failure.PROTOCOL
    if is_json and (head.length is None or head.length <= HOLD_BYTES):
        return Mode.HOLD
    if call.stream and not is_json:
        return Failure.PROTOCOL
    return Mode.RAW if head.chunked or head.length is not None else Failure.PROTOCOL
