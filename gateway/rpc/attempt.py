"""Forward, over gRPC: one attempt at one backend, message by message, as raw bytes.

    CONNECTING => WAITING (there is a connection) or ENDED (there is none: another backend may be tried)
    WAITING    => PASSING (the first message) or ENDED (a status: passed on, or a failure: then another may be tried)
    PASSING    => ENDED, whole (the backend's OK) or broken (a status that says that the answer is incomplete)

Back-pressure is that of one message: the next is read when the last has gone out, in both directions. The client's
leaving cancels the task, and with it the call to the backend. What else ends a call early (a timeout, the end of the
gateway, a limit in the midst of a stream) cancels the call to the backend, and leaves word why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

from grpc.aio import AioRpcError, BaseError

from gateway.attempts import caller_line, note_attempt, outcome_of, refusal_of
from gateway.meter import UNKNOWN
from gateway.pipeline import end_reason_of
from gateway.relay import CLIENT_STALL_SECONDS, FAILURE_REASONS, LEFT, Ending, broken_off
from gateway.rpc.channels import Channel
from gateway.rpc.metadata import Metadata, forwarded, pairs, passing, value_in
from gateway.rpc.methods import resource_in
from gateway.rpc.statuses import Code, meaning_of
from gateway.upstream.endpoint import REPORT_SECONDS
from gateway.upstream.load_report import of_header
from policies import errors
from policies.deadline import Kind, Phase, next_due, remaining_ms
from policies.retry import Failure

if TYPE_CHECKING:
    from gateway.call import Call, Ids
    from gateway.certificates import Pem
    from gateway.rpc.client import RpcClient
    from gateway.trail import Trail
    from gateway.upstream.endpoint import Backend, Lease
    from policies.policy import Route, Timeouts

_OK: Final = Ending("ok")
_LONGEST_DETAILS: Final = 2000  # characters of a backend's message
_SOON: Final = 0.01  # gRPC ends a call on its deadline by its own clock


class Carrier:
    """Carries attempts out for calls that came over gRPC. `most_bytes` is the largest message, either way."""

    def __init__(self, rng: Random, ids: Ids, most_bytes: int, pem: Callable[[], Pem]) -> None:
        self._rng = rng
        self._ids = ids
        self._most_bytes = most_bytes
        self._pem = pem
        self.under_way: set[Exchange] = set()

    async def carry(self, lease: Lease, call: Call, trail: Trail, route: Route, consumer: str) -> Ending:
        """One try at one backend. At its end breaker, balancer and trail hear how it ended, whatever happens."""
        client, backend, span_id = cast("RpcClient", call.connection), lease.backend, self._ids.span()
        started, connect_before, upstream_before = trail.mark, trail.connect, trail.upstream
        timeouts = replace(route.timeout, total=min(route.timeout.total, client.due - trail.start))
        lines = client.forwarded_lines + b"x-weir-consumer: %b\r\n" % caller_line(consumer, trail)
        if lease.backend.base_path:
            lines += b"x-weir-base-path: %b\r\n" % lease.backend.base_path  # a call over gRPC has no path of its own
        metadata = _metadata(call, client, lines, span_id, remaining_ms(timeouts, trail.start, started))
        exchange = Exchange(call, client, trail, timeouts, self._most_bytes, self._rng)
        self.under_way.add(exchange)
        try:
            channel = self._channel_to(backend)
            with channel:
                if await exchange.connect(channel):
                    await exchange.run(channel, metadata)
                elif backend.channel is channel:
                    backend.channel = None
                    channel.close()
            exchange.tell(backend.name_line)
        finally:
            self.under_way.discard(exchange)
            exchange.release()
            ending = exchange.ending
            lease.outcome = outcome_of(ending, exchange.status, exchange.overdue)
            told = of_header(exchange.load_report)
            if told is not None:  # there this call is over, here it is not yet
                backend.hear_load(told._replace(requests=told.requests + 1), trail.mark, REPORT_SECONDS)
            note_attempt(
                lease, trail, route, ending, exchange.status, span_id, started, connect_before, upstream_before
            )
        if ending.failure is not None and exchange.has_read_on:
            raise refusal_of(ending, route)  # nobody else could be sent what the client has sent since
        return ending

    def drain(self) -> None:
        """The gateway ends and cannot wait any longer."""
        for exchange in tuple(self.under_way):
            exchange.drain()

    def _channel_to(self, backend: Backend) -> Channel:
        if backend.channel is None:
            backend.channel = Channel(backend.endpoint, self._most_bytes, self._pem)
        return cast("Channel", backend.channel)


def _metadata(call: Call, client: RpcClient, lines: bytes, span_id: str, deadline_ms: int) -> Metadata:
    """What a backend is told, as `request_head` tells it over HTTP. `lines` say who asks."""
    own = (
        ("traceparent", f"00-{call.trace_id}-{span_id}-{'01' if call.sampled else '00'}"),
        ("x-request-id", call.request_id),
        ("x-weir-deadline-ms", str(deadline_ms)),
        ("endpoint-load-metrics-format", "json"),  # as text: gRPC keeps the binary form from those who use it
    )
    handed_on = (("via", call.head.via.decode()),) if call.head.via else ()
    return forwarded(client.metadata) + handed_on + pairs(lines) + own


class Exchange:
    """The call to the backend, and who watches it. Make it, `connect`, `run`, `release` whatever happens."""

    def __init__(
        self, call: Call, client: RpcClient, trail: Trail, timeouts: Timeouts, most_bytes: int, rng: Random
    ) -> None:
        self.ending = LEFT
        self.status = 0  # what the backend's comes to in HTTP; 0: none came
        self.overdue: Kind | None = None
        self.load_report = b""
        self._call = call
        self._client = client
        self._trail = trail
        self._timeouts = timeouts
        self._most_bytes = most_bytes
        self._rng = rng
        self._rpc: Any = None
        self.has_read_on = False  # more than the client's first message
        self._is_cut = False  # by us: there is word of it in `ending`
        self._refusal: errors.Refusal | None = None  # what the client is told, where the ending does not say it
        self._is_client_done = not client.method.is_stream  # it sends no more
        self._committed = False  # a message has gone out
        self._is_stalled = False  # one is on its way to the client, who has not taken it yet
        self._activity = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Exchange {self._client.method.name} committed={self._committed} ending={self.ending}>"

    async def connect(self, channel: Channel) -> bool:
        """Wait for the connection; False: there is none, and the attempt has ended so."""
        trail = self._trail
        due, kind = next_due(Phase.CONNECTING, self._timeouts, trail.start, trail.mark)
        try:
            async with asyncio.timeout(due - trail.mark):
                if await channel.is_ready():
                    return not self._is_cut
            self._fail(Failure.CONNECT_FAIL)
        except TimeoutError:
            self.overdue = kind
            if kind is Kind.TOTAL:
                self._run_out()
            else:
                self._fail(Failure.CONNECT_TIMEOUT)
        finally:
            trail.connect += trail.lap()
        return False

    async def run(self, channel: Channel, metadata: Metadata) -> None:
        """The call, from its first message to its status."""
        trail, method = self._trail, self._client.method
        self._activity = trail.mark
        left = trail.start + self._timeouts.total - trail.mark
        self._look_again()
        try:
            if method.is_stream:
                self._call.stream = True
                await self._stream(channel.stream(method.full_name)(timeout=left, metadata=metadata))
            else:
                await self._unary(channel.unary(method.full_name)(self._call.body, timeout=left, metadata=metadata))
        except AioRpcError as error:
            self._hear_status(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_cut or (task is not None and task.cancelling()):
                raise
        except BaseError:  # gRPC itself would not do it
            self._fail(Failure.PROTOCOL)
        finally:
            if not self._committed:
                trail.upstream += trail.lap()

    def tell(self, name_line: bytes) -> None:
        """Tell the client how it ended, unless another backend may be tried."""
        client, trail, ending = self._client, self._trail, self.ending
        if ending.failure is not None or ending is LEFT:
            return
        refusal = self._refusal
        if refusal is None and ending is not _OK:
            refusal = broken_off(ending.reason, self.overdue)
        if refusal is None:
            trail.status = self.status
            status = client.trailers
            client.end_well(self._call, trail, name_line + b"x-weir-attempts: %d\r\n" % (len(trail.attempts) + 1))
            client.trailers += status
            return
        trail.status, trail.code, trail.rule = refusal.status, refusal.code, refusal.rule or refusal.check
        client.refuse(refusal, trail, "oip", self._call.request_id, self._rng, close=False, head_only=False)

    def release(self) -> None:
        """Give back what the attempt held. A call that has not ended is cancelled here."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._rpc is not None:
            self._rpc.cancel()
        if self.ending is LEFT and self._trail.clock() > self._client.due - _SOON:
            self._trail.status, self._trail.code = 504, "deadline"  # it was the client's own deadline that took it away

    def drain(self) -> None:
        """The gateway ends and cannot wait any longer."""
        self._cut(Ending("drain", None if self._committed else Failure.PROTOCOL))

    # Messages

    async def _unary(self, rpc: Any) -> None:
        self._rpc = rpc
        message = await rpc
        self.load_report = value_in(await rpc.trailing_metadata() or (), "endpoint-load-metrics")
        if not isinstance(message, bytes):  # OK, and nothing else
            self._fail(Failure.PROTOCOL)
            return
        await self._pass_on(message)
        self._end_well()

    async def _stream(self, rpc: Any) -> None:
        self._rpc = rpc
        with contextlib.suppress(asyncio.InvalidStateError):  # it has ended already: reading tells why
            await rpc.write(self._call.body)
        self.has_read_on = True
        sending = asyncio.create_task(self._send_more(rpc))
        try:
            while isinstance(message := await rpc.read(), bytes):
                await self._pass_on(message)
        finally:
            sending.cancel()
            await asyncio.wait([sending])
        self.load_report = value_in(await rpc.trailing_metadata() or (), "endpoint-load-metrics")
        self._end_well()

    async def _pass_on(self, message: bytes) -> None:
        """Send a message to the client, who has so long to take it."""
        trail = self._trail
        if not self._committed:
            self._committed = True
            trail.upstream += trail.lap()
            self.status = 200
            trail.first_token = trail.mark - trail.start
        trail.bytes_out += len(message)
        self._is_stalled = True
        try:
            async with asyncio.timeout(CLIENT_STALL_SECONDS):
                await self._client.context.write(message)
        except TimeoutError:
            self._refusal = errors.ClientTimeout("The answer was not read in time.")
            self._cut(Ending("client_slow"))
        except BaseError:  # the client is gone, and soon this task is told so
            self._cut(LEFT)
        self._is_stalled = False
        self._activity = trail.clock()
        trail.waited = self._activity - trail.mark

    async def _send_more(self, rpc: Any) -> None:
        """The client's further messages, each paid for as a call of its own would be.

        With one that is refused no more are read: those before it are answered, then the client is told.
        """
        client, call = self._client, self._call
        with contextlib.suppress(AioRpcError, asyncio.InvalidStateError):  # who reads the answers hears why
            try:
                while isinstance(message := await client.context.read(), bytes):
                    await self._admit(client.checked(message, self._most_bytes))
                    call.size += len(message)
                    await rpc.write(message)
                    self._activity = self._trail.clock()
            except errors.Refusal as refusal:
                self._refusal = refusal
            self._is_client_done = True
            await rpc.done_writing()

    async def _admit(self, message: bytes) -> None:
        """Raises RateLimited, and BadRequest for a message that asks for something else than the first one did."""
        call, trail = self._call, self._trail
        if resource_in(self._client.method, message).path != call.resource.path:
            raise errors.BadRequest("All messages of a stream must name the same model.", param="model")
        account = trail.payer
        if account is not None:
            now = trail.clock()
            seconds = account.take_nowait(now)
            if seconds == UNKNOWN:
                seconds = await account.take(now)
            if seconds:
                raise account.refusal(seconds)

    # Time

    def _look_again(self) -> None:
        """See whether anything is overdue, and set the alarm for when it might be."""
        trail = self._trail
        phase = Phase.STREAMING if self._committed else Phase.WAITING
        now = trail.clock()
        due, kind = next_due(phase, self._timeouts, trail.start, now if self._is_stalled else self._activity)
        if now < due:
            self._alarm = asyncio.get_running_loop().call_later(due - now + 0.001, self._look_again)
            return
        self.overdue = kind
        if not self._committed or kind is Kind.TOTAL:
            self._run_out()
        elif self._is_client_done:
            self._cut(Ending("upstream_timeout"))
        else:  # it may be the client who had nothing to ask
            self._refusal = errors.ClientTimeout(f"Nothing came either way for {self._timeouts.idle:g} s.")
            self._cut(Ending("client_slow"))

    # Endings

    def _run_out(self) -> None:
        """No time is left: the backend's fault where it is its time that has run out, not where it is the client's."""
        is_clients = self.overdue is Kind.TOTAL and self._trail.clock() > self._client.due - _SOON
        if is_clients:
            self._refusal = errors.DeadlineExceeded("The deadline of the call has passed.")
            self._cut(Ending("client_abort"))
        else:
            failure = None if self._committed else Failure.FIRST_BYTE_TIMEOUT
            self._cut(Ending("upstream_timeout", failure, self.overdue))

    def _end_well(self) -> None:
        self.status = 200
        if self.ending is LEFT and not self._is_cut:
            self.ending = _OK if self._refusal is None else Ending(end_reason_of(self._refusal))

    def _fail(self, failure: Failure) -> None:
        if self.ending is LEFT:
            self.ending = Ending(FAILURE_REASONS.get(failure, "connect_fail"), failure)

    def _cut(self, ending: Ending) -> None:
        if self.ending is LEFT:
            self.ending = ending
            self._is_cut = True
            if self._rpc is not None:
                self._rpc.cancel()

    def _hear_status(self, error: AioRpcError) -> None:
        """The backend, or gRPC in its name, has ended the call with something else than OK."""
        if self.ending is not LEFT:
            return
        code, details, trailing = error.code().value[0], error.details() or "", error.trailing_metadata() or ()
        self.load_report = value_in(trailing, "endpoint-load-metrics")
        if code == Code.DEADLINE_EXCEEDED and self._trail.clock() > self._trail.start + self._timeouts.total - _SOON:
            self.overdue = Kind.TOTAL
            self._run_out()
            return
        not_started = bool(value_in(trailing, "x-backend-not-started"))
        self.status, failure = meaning_of(code, details, not_started=not_started)
        if failure is None:
            client = self._client
            client.code, client.message = Code(code), details[:_LONGEST_DETAILS]
            client.trailers = passing(trailing)
            self.ending = _OK
        elif self._committed:
            self.ending = Ending("upstream_error")
        else:
            after = value_in(trailing, "retry-after")
            self._fail(failure)
            self.ending = self.ending._replace(
                status=self.status, retry_after=float(after) if after.isdigit() and len(after) < 6 else None
            )
