"""Accept, the connection's half: aiohttp's low-level server, and what it needs to be safe in front of hostile clients.

aiohttp parses requests and keeps connections. Here is what we do differently: a deadline for the head, JSON for what
cannot be parsed (without an echo of it and without a traceback), a limit of connections, and answers that are written
to the transport by whoever has them: the `StreamResponse` handed back to aiohttp has nothing left to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from aiohttp import http_parser, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from policies.errors import BadRequest, ClientTimeout, HeaderTooLarge, Refusal

if TYPE_CHECKING:
    from aiohttp.streams import StreamReader

    from gateway.relay import Relay

WRITE_HIGH_BYTES = 64 * 1024
WRITE_LOW_BYTES = 16 * 1024
LINGER_SECONDS = 2.0  # an unread body is read and thrown away this long, so that the client gets to read its refusal

if http_parser.HttpRequestParser.__module__ != "aiohttp._http_parser":  # pragma: no cover  needs a broken install
    msg = "aiohttp runs without its C parser, which is laxer about framing: reinstall aiohttp, unset AIOHTTP_NO_EXTENSIONS"
    raise ImportError(msg)


class Written(web.StreamResponse):
    """An answer that has already gone out, and whether the connection may carry another request."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keeps_alive = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        return self._keeps_alive

    async def prepare(self, request: web.BaseRequest) -> None:  # type: ignore[override]  # there is no writer
        """Do nothing: the head has been written."""

    async def write_eof(self, data: bytes = b"") -> None:  # type: ignore[override]  # takes no data
        """Do nothing: the body has been written."""


KEPT = Written(keep_alive=True)
CLOSED = Written(keep_alive=False)


class Incoming:
    """A parsed head and its body to come: what aiohttp's `BaseRequest` would be, less all that is not needed here."""

    __slots__ = ("_task", "connection", "message", "payload")

    def __init__(
        self, message: Any, payload: StreamReader, connection: ClientConnection, _writer: Any, task: asyncio.Task[None]
    ) -> None:
        self.message = message
        self.payload = payload
        self.connection = connection
        self._task = task  # aiohttp clears it at the end

    def _cancel(self, exc: BaseException) -> None:
        """Tell a reader of the body that the client has gone (aiohttp's hook)."""
        self.payload.set_exception(exc)

    def _finish(self) -> None:
        """Nothing to clean up (aiohttp's hook)."""


Handle = Callable[[Incoming], Awaitable[web.StreamResponse]]
# Answers a head that never became a request; writes the refusal and tells the observers.
Reject = Callable[["ClientConnection", Refusal], None]


class DataServer(web.Server):
    """The data listener's protocol factory. Its handlers are cancelled when their client leaves."""

    def __init__(  # noqa: PLR0913  the limits of contract 4, each its own
        self,
        handle: Handle,
        reject: Reject,
        *,
        idle: float,
        head_timeout: float,
        header_bytes: int,
        connections: int,
    ) -> None:
        super().__init__(
            handle,  # type: ignore[arg-type]  # our request factory makes Incoming
            request_factory=Incoming,  # type: ignore[arg-type]
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=idle,
            lingering_time=LINGER_SECONDS,
            max_line_size=header_bytes,
            max_field_size=header_bytes,
            max_headers=100,
        )
        self.reject = reject
        self.head_timeout = head_timeout
        self.header_bytes = header_bytes
        self.most_connections = connections
        self.open_connections = 0
        self.refused_connections = 0

    def __call__(self) -> ClientConnection:
        return ClientConnection(self, loop=self._loop, **self._kwargs)


class ClientConnection(RequestHandler):
    """One client's connection. `relay` is whoever is writing an answer to it."""

    __slots__ = ("_counted", "_head_timer", "_server", "forwarded_lines", "relay")

    def __init__(self, server: DataServer, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._server = server
        self._counted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self.relay: Relay | None = None
        self.forwarded_lines = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        stream = cast("asyncio.Transport", transport)
        server = self._server
        if server.open_connections >= server.most_connections:
            server.refused_connections += 1
            stream.abort()
            return
        server.open_connections += 1
        self._counted = True
        stream.set_write_buffer_limits(high=WRITE_HIGH_BYTES, low=WRITE_LOW_BYTES)
        peer = stream.get_extra_info("peername")
        scheme = b"https" if stream.get_extra_info("sslcontext") else b"http"
        address = str(peer[0]).encode() if isinstance(peer, tuple) else b"unknown"
        self.forwarded_lines = b"x-forwarded-for: %b\r\nx-forwarded-proto: %b\r\n" % (address, scheme)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._counted:
            self._counted = False
            self._server.open_connections -= 1
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._current_request is None and not self._messages and not self._force_close:
            if self._head_timer is None and data:  # a head has begun and is not complete
                self._head_timer = self._loop.call_later(self._server.head_timeout, self._head_is_late)
        elif self._head_timer is not None:
            self._stop_head_timer()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Skip aiohttp's second look at the parser when nothing was paused: it is asked for with each body read."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport is not None and self._current_request is None and not self._messages:
            self._server.reject(self, ClientTimeout("The head of the request did not come in time."))
            self.force_close()

    # What the relay uses

    def write(self, data: bytes) -> None:
        """Send bytes, if the client is still there."""
        if self.transport is not None:
            self.transport.write(data)

    def cut(self) -> None:
        """Close after what has been written, without a clean end of the answer."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once; what has not been sent is lost."""
        if self.transport is not None:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.relay is not None:
            self.relay.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.relay is not None:
            self.relay.resume()

    # What aiohttp does with a head that it cannot parse

    def _make_error_handler(self, err_info: Any) -> Any:
        async def refuse(_request: Incoming) -> web.StreamResponse:
            self._server.reject(self, _refusal_of(err_info.exc, self._server.header_bytes))
            return CLOSED

        return refuse


def _refusal_of(error: BaseException | None, header_bytes: int) -> Refusal:
    if isinstance(error, LineTooLong) or "headers" in str(error).lower() and "many" in str(error).lower():
        return HeaderTooLarge(f"The head of the request is larger than {header_bytes} bytes, or has over 100 headers.")
    return BadRequest("The request is not well-formed HTTP/1.1.")
