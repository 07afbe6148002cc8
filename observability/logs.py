"""The process's log: what is not a request, as lines of JSON, or as text for a terminal.

Every line parses, whatever clients send: strings end after 256 characters, control characters are escaped. No line
holds a token, a prompt, an answer or a backend's address, because no event has a field for one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from observability import events
from observability.events import Event
from observability.line_writer import LineWriter
from observability.text import bounded, printable

_LONGEST_TRACEBACK = 16_384


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
        # Once a minute it is no news; there it is counted alone (`weir_discovery_resync_total`).
        {"periodic": "debug", "start": "info"}.get(e.reason, "warning"),
        "discovery listed",
    ),
    events.DiscoveryState: lambda e: ("info" if e.state == "watching" else "warning", "discovery state"),
    events.BackendHealth: lambda e: ("info" if e.healthy else "warning", "backend health"),
    events.PolicyReloaded: lambda e: (
        ("info", "policy in force") if e.result == "ok" else ("error", "policy refused, the one in force stays")
    ),
    events.StoreChanged: lambda e: ("info", "store is back") if e.up else ("error", "store is away"),
    events.KeysRefreshed: lambda e: ("info" if e.result == "ok" else "warning", "keys refreshed"),
    events.OverloadChanged: lambda e: ("info" if e.state == "normal" else "warning", "overload"),
    events.CertificatesRead: lambda e: (
        ("error", "certificates refused, those in force stay")
        if e.result != "ok"
        else ("error" if e.reason else "info", "certificates in force")
    ),
    events.HandshakeFailed: lambda _: ("info", "TLS handshake failed"),
}


class EventLog:
    """Observer of events: one line each in the process's log, throttled by kind."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._throttle = Throttle()
        self._log = structlog.get_logger()

    def __call__(self, event: Event) -> None:
        say = _SAID.get(type(event))
        if say is None:
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
    return {name: bounded(value) if name != "exc_info" else value for name, value in fields.items()}


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

    debug = warning = error = critical = info


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
        self._writer.write(_encoded(text))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
