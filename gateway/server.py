"""Accept, the connection's half: bytes from a client become calls, one after another.

httptools (llhttp, strict) parses; this file holds what a hostile client must not get around: a deadline for the head, a
limit of its size, of connections and of requests sent ahead, back-pressure on bodies that nobody reads yet, a bound on
what frames a body (chunk extensions, trailers), one refusal without an echo for what cannot be parsed. A connection
serves its requests in one task of its own; when the client leaves, that task is cancelled wherever it waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from gateway.body import read_body
from gateway.call import Call
from gateway.client import Client
from gateway.head import Head, Lines
from gateway.local_answers import answer_bytes
from gateway.outbox import outbox_of
from gateway.rescue import refusal_bytes
from gateway.wakeup import Wakeup
from policies.errors import BadRequest, ClientTimeout, HeaderTooLarge, Refusal

if TYPE_CHECKING:
    from random import Random

    from gateway.relay import Relay
    from gateway.trail import Trail

WRITE_HIGH_BYTES: Final = 64 * 1024
WRITE_LOW_BYTES: Final = 16 * 1024
HELD_BYTES: Final = 64 * 1024  # of a body that nobody has asked for yet
MOST_LINES: Final = 100  # of a head
PAUSE_AHEAD: Final = 8  # requests that wait before reading pauses
MOST_AHEAD: Final = 128  # requests sent before the first is answered; those beyond are not served
KNOWN_BYTES: Final = 4 * 1024  # of a request that is known again
UNREAD_SECONDS: Final = 30.0  # how long a client may leave what it was sent unread
LINGER_SECONDS: Final = 2.0  # a client whose body nobody wants has this long to read its refusal
LINGER_BYTES: Final = 64 * 1024  # of such a body that are read and thrown away

# Serves one call; tells whether its connection may carry another.
Handle = Callable[[Call], Awaitable[bool]]
# Answers a head that never became a call; writes the refusal and tells the observers.
Reject = Callable[["ClientConnection", Refusal], None]


class DataServer:
    """The data listener's protocol factory."""

    def __init__(
        self,
        handle: Handle,
        reject: Reject,
        *,
        idle: float,
        head_timeout: float,
        header_bytes: int,
        connections: int,
        name: bytes = b"weir",
    ) -> None:
        self.handle = handle
        self.reject = reject
        self.idle = idle
        self.head_timeout = head_timeout
        self.header_bytes = header_bytes
        self.most_connections = connections
        self.name = name  # ours alone: what a request is known by that comes by again
        self.refused_connections = 0
        self.connections: set[ClientConnection] = set()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self, asyncio.get_running_loop())

    def close_idle(self) -> None:
        """Close the connections that wait for a request; the others close after their answers."""
        for connection in tuple(self.connections):
            connection.close_if_idle()

    def abort(self) -> None:
        """Close all connections at once, whatever they are doing."""
        for connection in tuple(self.connections):
            connection.abort()


class ClientConnection(Client):
    """One client's connection, an asyncio protocol. `relay` is whoever is writing an answer to it."""

    __slots__ = (
        "_ahead", "_alarm", "_arrival", "_body_wakeup", "_call", "_drained", "_framing_bytes", "_head_bytes",
        "_head_timer", "_hold", "_in_head", "_is_first_read", "_is_reading_paused", "_is_writing_paused", "_known",
        "_known_call", "_known_lines", "_known_read", "_length", "_lines", "_outbox", "_parser", "_quiet_since",
        "_reading", "_received", "_server", "_takes_more", "_target", "_task", "loop", "relay", "transport",
    )  # fmt: skip

    def __init__(self, server: DataServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.relay: Relay | None = None
        self._server = server
        self._outbox = outbox_of(loop)
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None  # made with the first request
        self._ahead: deque[Call | Refusal] = deque()  # calls not begun; a refusal is the last
        self._call: Call | None = None  # the one under way
        self._arrival: Wakeup | None = None  # set while the task waits for a call
        self._takes_more = True  # False: what else comes is not looked at
        self._alarm: asyncio.TimerHandle | None = None
        self._quiet_since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        # the message that is being parsed
        self._in_head = False
        self._is_first_read = False  # its head began in the present read
        self._head_bytes = 0  # that earlier reads brought
        self._received = 0  # bytes of the present read
        self._target = self._length = b""
        self._lines: Lines = []
        self._reading: Call | None = None  # whose body is coming
        self._framing_bytes = 0  # whole reads since the last piece of it
        self._hold = HELD_BYTES  # how much of it may come before reading is paused
        self._body_wakeup: Wakeup | None = None
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._drained: Wakeup | None = None
        self._known_read = b""  # the last read that was one whole request, and the request
        self._known_call: Call | None = None
        self._known_lines: Lines | None = None
        self._known: Head

    def __repr__(self) -> str:
        state = "closed" if self.transport is None else "serving" if self._call else "idle"
        return f"<ClientConnection {state} ahead={len(self._ahead)}>"

    # What the transport does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = stream = cast("asyncio.Transport", transport)
        server = self._server
        if len(server.connections) >= server.most_connections:
            server.refused_connections += 1
            self._takes_more = False
            stream.abort()
            return
        server.connections.add(self)
        stream.set_write_buffer_limits(high=WRITE_HIGH_BYTES, low=WRITE_LOW_BYTES)
        peer = stream.get_extra_info("peername")
        scheme = b"https" if stream.get_extra_info("sslcontext") else b"http"
        address = str(peer[0]).encode() if isinstance(peer, tuple) else b"unknown"
        self.forwarded_lines = b"via: 1.1 %b\r\nx-forwarded-for: %b\r\nx-forwarded-proto: %b\r\n" % (
            server.name,
            address,
            scheme,
        )
        self._quiet_since = self.loop.time()
        self._alarm = self.loop.call_later(server.idle, self._close_if_quiet)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.transport = None
        self._takes_more = False
        self._known_call = None
        self._server.connections.discard(self)
        self._stop_head_timer()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        return False  # who sends no more is taken as gone

    def data_received(self, data: bytes) -> None:
        if not self._takes_more:
            return
        is_between = not (self._in_head or self._reading or self._ahead)
        known = self._known_call
        if is_between and known is not None and data == self._known_read:
            self._ahead.append(known.again())  # who was refused asks again in the same words, which cost most to read
            self._wake_for_call()
            return
        self._is_first_read = False
        self._received = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of ours: the event loop logs it and closes the connection
        except httptools.HttpParserUpgrade as upgrade:
            if self._stays_with_http():
                self.data_received(data[upgrade.args[0] :])
                return
            self._takes_more = False  # what follows the request is another protocol's
        except httptools.HttpParserError:
            self._unreadable()
        else:
            if is_between and len(data) <= KNOWN_BYTES:
                self._remember(data)
        if self._in_head:
            self._measure_head()
        elif self._reading is not None:
            self._measure_framing()
        if self._body_wakeup is not None:
            self._wake_for_body()
        if self._ahead:
            self._wake_for_call()
        if self._in_head and self._head_timer is None and self._call is None and not self._ahead:
            self._start_head_timer()

    def pause_writing(self) -> None:
        self._is_writing_paused = True
        if self.relay is not None:
            self.relay.pause()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._drained is not None:
            self._drained.set()
        if self.relay is not None:
            self.relay.resume()

    # What the parser finds

    def on_message_begin(self) -> None:
        if self._takes_more:
            self._in_head = self._is_first_read = True
            self._head_bytes = 0
            self._target = self._length = b""
            self._lines = []

    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: it ends here
        if len(name) == 14 and name.lower() == b"content-length":  # apart: the other lines mostly repeat themselves
            self._length = value
        else:
            self._lines.append((name, value))

    def on_headers_complete(self) -> None:
        if not self._in_head:
            return
        self._in_head = False
        parser, lines = self._parser, self._lines
        call = Call(
            self, parser.get_method().decode(), self._target, parser.get_http_version(), lines, self._length
        )  # fmt: skip
        if len(lines) > MOST_LINES or self._is_head_too_large():
            self._refuse_head()
        elif len(self._ahead) >= MOST_AHEAD:
            self._takes_more = False
        else:
            self._reading = call
            self._framing_bytes = -self._received
            self._ahead.append(call)

    def on_body(self, data: bytes) -> None:
        call = self._reading
        if call is None:
            return
        self._framing_bytes = -self._received
        call.size = size = call.size + len(data)
        if call.pieces is not None:
            call.pieces.append(data)
        elif not call.body:
            call.body = data
        else:
            call.pieces = [call.body, data]
        if size > self._hold:
            self._pause_reading()

    def on_message_complete(self) -> None:
        call, self._reading = self._reading, None
        if call is not None:
            if call.pieces is not None:
                call.body, call.pieces = b"".join(call.pieces), None
            call.is_whole = True

    def _remember(self, data: bytes) -> None:
        """Keep a read that began between two requests, if it was one whole request and nothing else."""
        ahead = self._ahead
        if len(ahead) == 1 and not self._in_head:
            call = ahead[0]
            if isinstance(call, Call) and call.is_whole:
                self._known_read, self._known_call = data, call

    def _stays_with_http(self) -> bool:
        """A request asked for another protocol: whether its body comes first, which the parser then has left out.

        Nobody here speaks another protocol, so it is served as if it had not asked (RFC 9110, 7.8), and a new parser
        reads the body.
        """
        call = self._ahead[-1] if self._takes_more and self._ahead else None
        if not isinstance(call, Call) or not (framing := _framing_of(call)):
            return False
        self._parser = parser = httptools.HttpRequestParser(self)
        self._reading, call.is_whole = call, False
        self._takes_more = False  # while the parser is told where it is, by a head that nobody is to hear of
        try:
            parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        except httptools.HttpParserError:  # the first one did not look at it: it was for another protocol to read
            self._unreadable()
            return False
        self._takes_more = True
        return True

    def _unreadable(self) -> None:
        call, self._reading = self._reading, None
        self._takes_more = False
        if call is not None:
            call.is_broken = True
        elif not self._ahead or not isinstance(self._ahead[-1], Refusal):
            self._in_head = False
            self._ahead.append(BadRequest("The request is not well-formed HTTP/1.1."))

    def _measure_head(self) -> None:
        """A head is not complete: count what has come of it, at most one read too little."""
        self._head_bytes = self._parsed_head_bytes() if self._is_first_read else self._head_bytes + self._received
        if self._head_bytes > self._server.header_bytes or len(self._lines) > MOST_LINES:
            self._refuse_head()

    def _measure_framing(self) -> None:
        """A body is not complete: who reads it bounds its pieces, this bounds what stands between and behind them."""
        self._framing_bytes += self._received
        if self._framing_bytes > self._server.header_bytes:
            self._unreadable()

    def _is_head_too_large(self) -> bool:
        """Of a head that is complete. Most came in one read that is small enough."""
        most = self._server.header_bytes
        return not (self._is_first_read and self._received <= most) and self._parsed_head_bytes() > most

    def _parsed_head_bytes(self) -> int:
        return len(self._target) + sum([len(name) + len(value) + 4 for name, value in self._lines])

    def _refuse_head(self) -> None:
        self._in_head = self._takes_more = False
        self._ahead.append(
            HeaderTooLarge(
                f"The head of the request is larger than {self._server.header_bytes} bytes, "
                f"or has over {MOST_LINES} headers."
            )
        )

    # Time

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._server.head_timeout, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head and self._call is None:
            self._in_head = self._takes_more = False
            self._ahead.append(ClientTimeout("The head of the request did not come in time."))
            self._wake_for_call()

    def _close_if_quiet(self) -> None:
        """The alarm of the idle time; one that rings too early is set anew, so that most requests set none."""
        idle = self._server.idle
        left = self._quiet_since + idle - self.loop.time()
        if left > 0.001:
            self._alarm = self.loop.call_later(left, self._close_if_quiet)
        elif not self.close_if_idle():
            self._alarm = self.loop.call_later(idle, self._close_if_quiet)

    def close_if_idle(self) -> bool:
        """Close the connection if no request is under way or has begun to come."""
        is_idle = self._call is None and not self._ahead and not self._in_head
        if is_idle and self.transport is not None:
            self._outbox.flush()
            self.transport.close()
        return is_idle

    # What the relay uses

    def write(self, data: bytes) -> None:
        """Send bytes, if the client is still there."""
        if self.transport is not None:
            self._outbox.write(self.transport, data)

    def cut(self) -> None:
        """Close after what has been written, without a clean end of the answer; abort if it is never read."""
        if self.transport is not None:
            self._outbox.flush()
            if self.transport.get_write_buffer_size():
                self.loop.call_later(UNREAD_SECONDS, self.transport.abort)
            self.transport.close()

    def abort(self) -> None:
        """Close at once; what has not been sent is lost."""
        if self.transport is not None:
            self._outbox.flush()
            self.transport.abort()

    # What the pipeline uses

    def head_of(self, lines: Lines) -> Head:
        """The vetted head of these lines. Raises as `Head` does, and LoopDetected."""
        if lines != self._known_lines:
            self.caller = None
            self._known = head = Head(lines)
            head.refuse_loop(self._server.name)
            self._known_lines = lines
        return self._known

    def read(self, call: Call, most: int, seconds: float) -> Awaitable[None]:
        return read_body(call, most, seconds)

    def answer(self, call: Call, trail: Trail, status: int, document: dict[str, Any]) -> int:
        answer = answer_bytes(call, trail, status, document)
        self.write(answer)
        return len(answer)

    def refuse(
        self,
        refusal: Refusal,
        trail: Trail,
        protocol: str,
        request_id: str,
        rng: Random,
        *,
        close: bool,
        head_only: bool,
    ) -> int:
        lines = b"x-request-id: %b\r\n%b%b%b" % (
            request_id.encode(),
            trail.policy_line,
            trail.limit_lines,
            trail.server_timing(),
        )
        answer = refusal_bytes(protocol, refusal, request_id, lines, rng, close=close, head_only=head_only)
        self.write(answer)
        return len(answer)

    async def receive_body(self, call: Call, most: int) -> None:
        """Until the body is whole, broken or larger than `most`."""
        self._hold = most
        try:
            while not (call.is_whole or call.is_broken or call.size > most):
                self._resume_reading()
                self._body_wakeup = wakeup = Wakeup(self.loop)
                await wakeup
        finally:
            self._body_wakeup = None
            self._hold = HELD_BYTES

    # Call after call

    async def _serve(self) -> None:
        """Serve the requests of this connection one after another, until either side has had enough."""
        ahead, handle = self._ahead, self._server.handle
        try:
            while ahead or self._takes_more:
                if not ahead:
                    await self._wait_call()
                call = ahead.popleft()
                if isinstance(call, Refusal):
                    self._server.reject(self, call)
                    await self._linger()
                    break
                self._call = call
                keeps = await handle(call)
                if self._is_writing_paused and not await self._is_read():
                    break
                if not call.is_whole and not await self._is_thrown_away(call):
                    break
                if not keeps:
                    break
                self._call = None
                if self._is_reading_paused and not ahead:
                    self._resume_reading()
                self._quiet_since = self.loop.time()
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._task = self._call = None
            self._takes_more = False
            self.cut()

    async def _wait_call(self) -> None:
        if self._in_head and self._head_timer is None:
            self._start_head_timer()
        self._arrival = arrival = Wakeup(self.loop)
        try:
            await arrival
        finally:
            self._arrival = None

    def _wake_for_call(self) -> None:
        if self._head_timer is not None:
            self._stop_head_timer()
        if len(self._ahead) > PAUSE_AHEAD:
            self._pause_reading()
        if self._arrival is not None:
            self._arrival.set()
        elif self._task is None and self.transport is not None:
            self._task = self.loop.create_task(self._serve())

    def _wake_for_body(self) -> None:
        call = self._call
        if call is not None and (call.is_whole or call.is_broken or call.size > self._hold):
            cast("Wakeup", self._body_wakeup).set()

    def _pause_reading(self) -> None:
        if not self._is_reading_paused and self.transport is not None and not self.transport.is_closing():
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and self.transport is not None and not self.transport.is_closing():
            self._is_reading_paused = False
            self.transport.resume_reading()

    async def _is_read(self) -> bool:
        """Wait until the client has read most of its answers: refusals and our own answers have no relay that does."""
        self._drained = drained = Wakeup(self.loop)
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await drained
        except TimeoutError:
            self.abort()
            return False
        finally:
            self._drained = None
        return True

    async def _is_thrown_away(self, call: Call) -> bool:
        """Read and forget a body that nobody wanted: a close with bytes unread could take the answer with it.

        Only a little: who goes on sending is not read any more, and closed once there was time to read the answer.
        """
        call.body, call.pieces, call.size = b"", None, 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self.receive_body(call, LINGER_BYTES)
                if call.is_broken:
                    await self._linger()
                elif not call.is_whole:
                    await asyncio.sleep(LINGER_SECONDS)
        except TimeoutError:
            return False
        return call.is_whole

    async def _linger(self) -> None:
        """What comes can no longer be read as HTTP. Say that this was all, and wait for the client to close.

        Who is still sending when the connection closes is told so by a reset, which takes the answer with it.
        """
        self._takes_more = False
        if self.transport is not None and self.transport.can_write_eof():
            self._outbox.flush()
            self.transport.write_eof()
            await asyncio.sleep(LINGER_SECONDS)  # unless the client leaves before, which cancels this


def _framing_of(call: Call) -> bytes:
    """The header lines that say how long the body of a request is; none where it has none."""
    lines = [b"%b: %b\r\n" % line for line in call.lines if line[0].lower() == b"transfer-encoding"]
    if call.content_length.strip(b"0 \t"):
        lines.append(b"content-length: %b\r\n" % call.content_length)
    return b"".join(lines)
