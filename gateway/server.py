"""Accept, the connection's half: aiohttp's low-level server, and what it needs to be safe in front of hostile clients.

aiohttp accepts, parses and holds back what comes too fast. Here is what we do differently: a deadline for the head,
JSON for what cannot be parsed (without an echo of it and without a traceback), a limit of connections, and a loop of
our own over the requests of a connection, because answers are written straight to its transport. That loop leans on
attributes of aiohttp's RequestHandler that are not public: pyproject.toml admits only the minor version it was written
against.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from aiohttp import http_parser, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo

from policies.errors import BadRequest, ClientTimeout, HeaderTooLarge, Refusal

if TYPE_CHECKING:
    from aiohttp.streams import StreamReader

    from gateway.admission import Account
    from gateway.identify import Entry
    from gateway.relay import Relay

WRITE_HIGH_BYTES = 64 * 1024
WRITE_LOW_BYTES = 16 * 1024
UNREAD_SECONDS = 30.0  # how long a client may leave what it was sent unread
LINGER_SECONDS = 2.0  # an unread body is read and thrown away this long, so that the client gets to read its refusal

if http_parser.HttpRequestParser.__module__ != "aiohttp._http_parser":  # pragma: no cover  needs a broken install
    msg = "aiohttp runs without its C parser, the stricter one: reinstall aiohttp, unset AIOHTTP_NO_EXTENSIONS"
    raise ImportError(msg)


class Incoming:
    """A parsed head and its body to come: what aiohttp's `BaseRequest` would be, less all that is not needed here."""

    __slots__ = ("connection", "message", "payload")

    def __init__(self, message: Any, payload: StreamReader, connection: ClientConnection) -> None:
        self.message = message
        self.payload = payload
        self.connection = connection

    def _cancel(self, exc: BaseException) -> None:
        """Tell a reader of the body that the client has gone (aiohttp's hook)."""
        self.payload.set_exception(exc)


# Serves one request; tells whether its connection may carry another.
Handle = Callable[[Incoming], Awaitable[bool]]
# Answers a head that never became a request; writes the refusal and tells the observers.
Reject = Callable[["ClientConnection", Refusal], None]


class DataServer(web.Server):
    """The data listener's protocol factory. Its handlers are cancelled when their client leaves."""

    def __init__(
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
            handle,  # type: ignore[arg-type]  # ClientConnection.start calls it, not aiohttp's
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=idle,
            max_line_size=header_bytes,
            max_field_size=header_bytes,
            max_headers=100,
        )
        self.handle = handle
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

    __slots__ = ("_counted", "_head_timer", "_server", "authorization", "caller", "forwarded_lines", "relay")

    def __init__(self, server: DataServer, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._server = server
        self._counted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self.relay: Relay | None = None
        self.forwarded_lines = b""
        self.authorization: bytes | None = None  # of the last request, and who that was
        self.caller: Entry[Account] | None = None

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
        """Close after what has been written, without a clean end of the answer; abort if it is never read."""
        if self.transport is not None:
            if self.transport.get_write_buffer_size():
                self._loop.call_later(UNREAD_SECONDS, self.transport.abort)
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

    # Request after request

    async def start(self) -> None:
        """Serve the requests of this connection one after another, until either side has had enough.

        In place of aiohttp's loop, which makes a task, a writer and a response object for each request: answers are
        written by whoever has them, and this task, which is the connection's own, is what a client's leaving cancels.
        """
        handle, messages = self._server.handle, self._messages
        try:
            while not self._force_close:
                if not messages:
                    await self._wait_message()
                message, payload = messages.popleft()
                self._resume_parser()
                if isinstance(message, _ErrInfo):
                    self._server.reject(self, _refusal_of(message.exc, self._server.header_bytes))
                    break
                incoming = Incoming(message, payload, self)
                self._current_request = incoming  # type: ignore[assignment]  # aiohttp calls nothing but its _cancel
                self._request_in_progress = True
                try:
                    keeps = await handle(incoming)
                finally:
                    self._current_request = None
                    self._request_in_progress = False
                    if self._handler_waiter is not None:
                        self._tell_shutdown()
                if self._paused and not await self._is_read():
                    break
                if not payload.is_eof():
                    await self._linger(payload)
                    keeps = keeps and payload.is_eof()
                if not keeps or self._close or self._upgraded:
                    break
                # the idle time before the next request begins
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None:
                    self._keepalive_handle = self._loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
        except asyncio.CancelledError:
            self.force_close()
            raise
        finally:
            if self.transport is not None and not self._force_close:
                self._task_handler = None
                self.cut()

    async def _wait_message(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _resume_parser(self) -> None:
        """A message was taken: aiohttp holds back a client that sends more than it may before it is answered."""
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()

    def _tell_shutdown(self) -> None:
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)

    async def _is_read(self) -> bool:
        """Wait until the client has read most of its answers: refusals and our own answers have no relay that does."""
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await self._drain_helper()
        except TimeoutError:
            self.abort()
            return False
        return True

    async def _linger(self, payload: StreamReader) -> None:
        """Read and throw away a body that nobody wanted: a close with bytes unread would take the answer with it."""
        with contextlib.suppress(TimeoutError, RequestPayloadError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not payload.is_eof():
                    await payload.readany()


def _refusal_of(error: BaseException | None, header_bytes: int) -> Refusal:
    if isinstance(error, LineTooLong) or ("headers" in str(error).lower() and "many" in str(error).lower()):
        return HeaderTooLarge(f"The head of the request is larger than {header_bytes} bytes, or has over 100 headers.")
    return BadRequest("The request is not well-formed HTTP/1.1.")
