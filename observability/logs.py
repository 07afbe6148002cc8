"""The process's log and the access log: JSON lines that never make a request wait.

A line is made where it happens and put into a bounded queue; one thread writes. A full disk, a slow one or a pipe
that nobody reads stops that thread and nothing else. What cannot wait any longer is dropped and counted, the oldest
access lines first: lines that must be kept (warnings, errors, requests that ended in a 5xx) have a queue of their
own, so no flood of good news displaces them, and they are written first.

Every line is ASCII and parses, whatever clients send: strings end after 256 characters, control characters are
escaped. No line holds a token, a prompt, an answer or a backend's address, because no event has a field for one.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from observability import events
from observability.events import Event, RequestEnded
from observability.text import LONGEST, printable

_QUEUED_LINES = 10_000  # each queue; an ordinary line has 500 bytes, the longest possible 8 KiB
_BATCH_LINES = 512
_PERIOD_SECONDS = 0.1
_LONGEST_TRACEBACK = 16_384


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own. `write` never waits and never raises."""

    def __init__(self, descriptor: int, *, queued_lines: int = _QUEUED_LINES) -> None:
        self._descriptor = descriptor
        self._limit = queued_lines
        self._kept: deque[bytes] = deque(maxlen=queued_lines)
        self._ordinary: deque[bytes] = deque(maxlen=queued_lines)
        self._batch = memoryview(b"")
        self._closing = threading.Event()
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="weir-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Lines that were given up since the start."""
        return self._dropped

    def write(self, line: bytes, *, keep: bool = False) -> None:
        """Queue one line of UTF-8. When there is no room, the oldest line of the same kind makes it."""
        queue = self._kept if keep else self._ordinary
        if len(queue) == self._limit:
            self._dropped += 1
        queue.append(line)

    def close(self, timeout: float = 2.0) -> None:
        """Write what is left; give up on a descriptor that takes nothing for `timeout` seconds."""
        atexit.unregister(self.close)
        self._closing.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._closing.wait(_PERIOD_SECONDS):
            self._write_queued()
        self._write_queued()
        self._dropped += self._batch.tobytes().count(b"\n") + len(self._kept) + len(self._ordinary)

    def _write_queued(self) -> None:
        """Write until nothing is left or the descriptor refuses (disk full): then the rest waits for the next turn."""
        while self._batch or self._fill_batch():
            try:
                written = os.write(self._descriptor, self._batch)
            except OSError:
                return  # nothing to tell it to: this is the log. The queue overflows and that is counted
            self._batch = self._batch[written:]

    def _fill_batch(self) -> bool:
        queues = (self._kept, self._ordinary)
        lines = [queue.popleft() for queue in queues for _ in range(min(len(queue), _BATCH_LINES))]
        self._batch = memoryview(_ascii(b"\n".join([*lines, b""])))
        return bool(lines)


_NOT_PLAIN = re.compile("[^\0-\x7e]")


def _ascii(lines: bytes) -> bytes:
    r"""Write what is not ASCII, and DEL, as JSON does (`\u20ac`): a terminal has nothing to obey in it."""
    if lines.isascii() and b"\x7f" not in lines:
        return lines
    return _NOT_PLAIN.sub(lambda char: _escaped(char[0]), lines.decode("utf-8", "replace")).encode("ascii")


def _escaped(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]


_NUMBERS = (
    '"total_ms":%.3f,"overhead_ms":%.3f,"auth_ms":%.3f,"limit_ms":%.3f,"body_ms":%.3f,"pick_ms":%.3f,'
    '"bytes_in":%d,"bytes_out":%d'
)
_MOST_NAMED = 4096


class AccessLog:
    """Observer of RequestEnded: one JSON line each, written out at once so that the queue holds only bytes.

    The names in a line are few and come again and again (callers, routes, backends, ends): they are remembered as they
    stand in a line, up to a bound. A key that has nothing to say is left out.
    """

    __slots__ = ("_named", "_write")

    def __init__(self, writer: LineWriter) -> None:
        self._write = writer.write
        self._named: dict[tuple[object, ...], str] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RequestEnded):
            self._write(self._line(event).encode(), keep=event.status >= 500)

    def _line(self, event: RequestEnded) -> str:
        attempts, request_id = event.attempts, event.request_id
        backend = attempts[-1].backend if attempts else ""
        names = (
            event.consumer, event.plan, event.method, event.path, event.route, event.service, event.model, backend,
            event.policy, event.status, event.end_reason, event.code, event.rule, len(attempts), event.stream,
        )  # fmt: skip
        named = self._named.get(names) or self._name(names)
        quoted = f'"{request_id}"' if request_id.isalnum() and len(request_id) <= LONGEST else _json(request_id)
        numbers = _NUMBERS % (
            event.total * 1e3,
            event.overhead * 1e3,
            event.auth * 1e3,
            event.limit * 1e3,
            event.body * 1e3,
            event.pick * 1e3,
            event.bytes_in,
            event.bytes_out,
        )
        # Whoever looks a trace up needs its id; for the rest 32 random digits are a tenth of the disk.
        traced = event.sampled or event.parent_span_id or event.status >= 500
        trace = f',"trace_id":"{event.trace_id}"' if traced else ""
        more = _more(event) if attempts else ""
        return f'{{"time":{event.started_at:.3f},"request_id":{quoted}{trace}{named}{numbers}{more}}}'

    def _name(self, names: tuple[object, ...]) -> str:
        """The part of a line that these names make."""
        fields = {key: _bounded(value) for key, value in zip(_NAMED, names, strict=True)}
        for key in ("code", "rule", "stream"):
            if not fields[key]:
                del fields[key]
        named = f",{_json(fields)[1:-1]},"
        if len(self._named) >= _MOST_NAMED:
            self._named.clear()
        self._named[names] = named
        return named


_NAMED = (
    "consumer", "plan", "method", "path", "route", "service", "model", "backend", "policy", "status", "end_reason",
    "code", "rule", "attempts", "stream",
)  # fmt: skip


def _more(event: RequestEnded) -> str:
    """What only a request that was forwarded has."""
    more = f',"upstream_ms":{event.upstream * 1e3:.3f}' if event.upstream else ""
    if event.tokens_in >= 0:
        more += f',"tokens_in":{event.tokens_in}'
    if event.tokens_out >= 0:
        more += f',"tokens_out":{event.tokens_out}'
    if event.first_token >= 0:
        more += f',"first_token_ms":{event.first_token * 1e3:.3f}'
    if event.connect:
        more += f',"connect_ms":{event.connect * 1e3:.3f}'
    if event.queue:
        more += f',"queue_ms":{event.queue * 1e3:.3f}'
    return more


def _json(value: object) -> str:
    """JSON in which strings are bounded and hold nothing that cannot be encoded."""
    return msgspec.json.encode(_bounded(value)).decode()


class Throttle:
    """At most `most` of a kind in `window` seconds; counts what it held back. Kinds are fixed names, not input."""

    def __init__(self, most: int = 20, window: float = 10.0) -> None:
        self._most = most
        self._window = window
        self._kinds: dict[str, tuple[float, int, int]] = {}  # window's start, admitted in it, held back in it

    def admit(self, kind: str, now: float) -> int | None:
        """How many of this kind were held back in the window before this one, or None when this one is, too."""
        start, admitted, held_back = self._kinds.get(kind, (now, 0, 0))
        told = 0
        if now - start >= self._window:
            start, admitted, told, held_back = now, 0, held_back, 0
        if admitted >= self._most:
            self._kinds[kind] = (start, admitted, held_back + 1)
            return None
        self._kinds[kind] = (start, admitted + 1, held_back)
        return told


# What each event says in the log, and how loudly: (level, message) from the event.
_SAID: dict[type, Callable[[Any], tuple[str, str]]] = {
    events.BreakerChanged: lambda e: ("warning" if e.state == "open" else "info", "breaker changed"),
    events.DiscoveryRejected: lambda _: ("warning", "registration ignored"),
    events.DiscoveryResynced: lambda e: (
        "info" if e.reason in {"start", "periodic"} else "warning",
        "discovery listed",
    ),
    events.DiscoveryState: lambda e: ("warning" if e.state == "stale" else "info", "discovery state"),
    events.BackendHealth: lambda e: ("info" if e.healthy else "warning", "backend health"),
    events.PolicyReloaded: lambda e: (
        ("info", "policy in force") if e.result == "ok" else ("error", "policy refused, the one in force stays")
    ),
    events.StoreChanged: lambda e: ("info", "store is back") if e.up else ("error", "store is away"),
    events.KeysRefreshed: lambda e: ("info" if e.result == "ok" else "warning", "keys refreshed"),
}


class EventLog:
    """Observer of everything that is not a request: one line each in the process's log, throttled by kind."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._throttle = Throttle()
        self._log = structlog.get_logger()

    def __call__(self, event: Event) -> None:
        say = _SAID.get(type(event))
        if say is None or isinstance(event, RequestEnded):
            return
        held_back = self._throttle.admit(type(event).__name__, self._now())
        if held_back is None:
            return
        level, message = say(event)
        fields = {name: value for name, value in msgspec.structs.asdict(event).items() if value not in ("", ())}
        if held_back:
            fields["held_back"] = held_back
        getattr(self._log, level)(message, **fields)


def configure(writer: LineWriter, *, console: bool) -> None:
    """Send structlog and the standard library's logging through `writer`: JSON lines, or text for a terminal.

    The standard library's level is WARNING: other people's good news is not ours to tell.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _bound_values,
        structlog.processors.format_exc_info,
        _bound_traceback,
    ]
    render = _renderer(console=console)
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _Lines(writer),
    )
    handler = _Handler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _renderer(*, console: bool) -> structlog.typing.Processor:
    if console:  # structlog's default for tracebacks shows local variables: tokens among them
        return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.JSONRenderer(separators=(",", ":"))


def _bound_values(
    _logger: structlog.typing.WrappedLogger, _name: str, fields: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {name: _bounded(value) if name != "exc_info" else value for name, value in fields.items()}


def _bounded(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple)):
        return [_bounded(item) for item in value[:64]]
    return value


def _bound_traceback(
    _logger: structlog.typing.WrappedLogger, _name: str, fields: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    if "exception" in fields:
        lines = fields["exception"][-_LONGEST_TRACEBACK:].split("\n")
        fields["exception"] = "\n".join(printable(line) for line in lines)
    return fields


class _Lines:
    """What structlog calls a logger: one method per level, each takes the rendered line."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def info(self, text: str) -> None:
        self._writer.write(_encoded(text))

    def warning(self, text: str) -> None:
        self._writer.write(_encoded(text), keep=True)

    debug = info
    error = critical = warning


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001  a record that cannot be formatted is told, never raised
            record.msg, record.args = f"a record that cannot be formatted: {type(error).__name__}", None
            text = self.format(record)
        self._writer.write(_encoded(text), keep=record.levelno >= logging.WARNING)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
