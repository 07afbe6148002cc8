r"""Forward, the answer's half: one backend's answer on its way to the client, byte by byte.

The relay is what a connection talks to. It decides nothing about other attempts: it ends with an `Ending`, and whoever
awaits it reads that. Its states:

    WAITING   => PASSING (a head that may pass) or ENDED (failure: nothing has gone out, another backend may be tried)
    PASSING   => ENDED, whole (the client has all) or broken (one error event where the protocol has one, then cut)

Memory per answer is bounded: a JSON answer is held up to HOLD_BYTES, an event up to MAX_EVENT_BYTES, and beyond the
client's write buffer (64 KiB) the backend is not read.

Chunks are framed anew and not passed through as they came: so chunk extensions and trailers of a hostile backend end
here, and an error event can always be placed. The bytes of the body are the backend's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from gateway import sse
from gateway.answer import HOLD_BYTES, AnswerHead, Mode, judge
from gateway.headers import STATUS_LINES
from gateway.rescue import error_event
from gateway.usage import usage_of
from gateway.wakeup import Wakeup
from policies.deadline import Kind, Phase, next_due
from policies.errors import DeadlineExceeded, Draining, Refusal, UpstreamFailed, UpstreamTimeout
from policies.retry import Failure

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.server import ClientConnection
    from gateway.trail import Trail
    from gateway.upstream.connection import Connection
    from gateway.upstream.endpoint import Backend
    from policies.policy import Timeouts

KEEP_ALIVE_SECONDS = 15.0  # silence after which an event stream gets a comment, so that nobody between closes it
CLIENT_STALL_SECONDS = 30.0
_KEEP_ALIVE = b": still working\n\n"


class Ending(NamedTuple):
    """How an answer ended. `reason` is one of those in docs/reference.md, Metrics.

    What follows `failure` is filled in where there is one.
    """

    reason: str
    failure: Failure | None = None  # set while nothing has gone out
    overdue: Kind | None = None  # which timeout has run out
    status: int = 0  # what the backend answered; 0: it did not
    retry_after: float | None = None  # seconds, as it said


LEFT = Ending("client_abort")  # the ending of every answer until it has another
_OK = Ending("ok")
_ERRED = Ending("upstream_error")


FAILURE_REASONS = {
    Failure.PROTOCOL: "upstream_protocol",
    Failure.BUSY: "shed",
    Failure.NOT_STARTED: "shed",
    Failure.SERVER_ERROR: "upstream_error",
    Failure.RESET: "upstream_reset",
    Failure.STALE: "upstream_reset",
    Failure.FIRST_BYTE_TIMEOUT: "upstream_timeout",
}
_BREAK_FAILURES = {
    "eof": Failure.RESET,
    "upstream_reset": Failure.RESET,
    "upstream_timeout": Failure.FIRST_BYTE_TIMEOUT,
}


class Relay(Wakeup):
    """One answer. Make it, `connection.start(relay, ...)`, `await relay`, `relay.release()` whatever happens.

    Awaiting it ends when the answer has ended, back-pressure included. It raises what was raised where nothing more
    would have come: a bug of ours costs its request, and leaves none waiting.
    """

    __slots__ = (
        "_activity", "_backend", "_client", "_connection", "_held", "_held_bytes", "_is_chunked", "_is_late", "_mode",
        "_out", "_over", "_scanner", "_stalled_since", "call", "committed", "ending", "head", "overdue", "timeouts",
        "trail",
    )  # fmt: skip

    _connection: Connection  # once it is started

    def __init__(self, call: Call, trail: Trail, timeouts: Timeouts, backend: Backend) -> None:
        self._client = client = cast("ClientConnection", call.connection)
        super().__init__(client.loop)
        self.call = call
        self.trail = trail
        self.timeouts = timeouts
        self.head: AnswerHead | None = None
        self.committed = False  # the head has gone out: there is no second answer
        self.ending = LEFT
        self.overdue: Kind | None = None  # which timeout has run out
        self._backend = backend  # who answers
        self._is_chunked = False  # the head has said that chunks follow
        self._mode: Mode | None = None
        self._scanner: sse.Scanner | None = None
        self._out: list[bytes] = []  # body bytes to send at the next flush
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._is_late = False  # it was, when the clock was looked at last
        self._over = False  # ended, and the client has taken what it was sent
        self._activity = self._stalled_since = 0.0

    def __repr__(self) -> str:
        mode = self._mode.value if self._mode else "waiting"
        ending = None if self.ending is LEFT else self.ending
        return f"<Relay {mode} committed={self.committed} ending={ending}>"

    def start(self, connection: Connection, request: bytes) -> None:
        """Send the request; from here on the answer comes."""
        self._connection = connection
        self._client.relay = self
        trail = self.trail
        self._activity = now = trail.mark
        self._wake_in(min(self.timeouts.first_byte, trail.start + self.timeouts.total - now), now)
        connection.start(self, request)

    def release(self) -> None:
        """Give back what the answer held. A connection whose answer is not whole is closed here."""
        self._client.relay = None
        if self.ending is LEFT and self._scanner is not None:
            self._note_tokens(self._scanner)
        self._connection.finish(self.trail.clock())

    # What the connection tells

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.ending is not LEFT:
            return
        self.head = head = AnswerHead(status, headers)
        if head.load_report:
            self._backend.hear_header(head.load_report, self.trail.clock())
        verdict = judge(self.call, head)
        if isinstance(verdict, Failure):
            self._fail(verdict)
            return
        self._mode = verdict
        if verdict is Mode.EVENTS:
            self._scanner = sse.Scanner(self.call.resource.path, counts=self.trail.reservation is not None)

    def on_body(self, data: bytes) -> None:
        if self.ending is not LEFT:
            return
        if self._mode is Mode.HOLD:
            self._held.append(data)
            self._held_bytes += len(data)
        elif self._scanner is not None:
            try:
                whole = self._scanner.feed(data)
            except sse.EventTooLarge:
                self._break("upstream_protocol")
                return
            if whole:
                self._out.append(whole)
        elif self._mode is Mode.RAW:
            self._out.append(data)

    def on_chunk(self, chunk: bytes, at: int) -> None:
        """A read was one whole chunk, whose content begins there: mostly an event. Its framing goes out as it came."""
        content = chunk[at:-2]
        self.on_body(content)
        out = self._out
        if self._is_chunked and len(out) == 1 and out[0] is content and self.ending is LEFT:
            self._out = []
            self._activity = self.trail.clock()
            self.trail.bytes_out += len(chunk)
            self._client.write(chunk)
        else:
            self.on_flush()

    def on_end(self) -> None:
        """The framing says that the answer is whole."""
        if self.ending is not LEFT:
            return
        if self._mode is Mode.HOLD:
            self._send_held()
        elif self._scanner is not None:
            self._end_events(self._scanner)
        else:
            self._commit_and_flush(last=True)
            self._end(_OK)

    def on_flush(self) -> None:
        """All callbacks of one read are done: send what there is. Whoever waits for the end goes on from here."""
        if self.ending is LEFT:
            self._activity = self.trail.clock()
            self._flush()
        if self._over:
            self.set()

    def _flush(self) -> None:
        if self._out:
            if self.committed:
                self._flush_more()
            else:
                self._commit_and_flush()
        elif self._mode is Mode.EMPTY:
            self._commit_and_flush(last=True)
            self._end(_OK)
        elif self._held_bytes > HOLD_BYTES:
            self._mode = Mode.RAW
            self._out, self._held = self._held, []
            self._commit_and_flush()

    def on_broken(self, reason: str) -> None:
        """The connection ended or sent what is not HTTP. `eof` is the clean end of the connection."""
        if self.ending is LEFT:
            try:
                self._hear_end(reason)
            except Exception as bug:  # noqa: BLE001  this was the last that the connection tells; the request logs it
                self.fail(bug)
                return
        if self._over:
            self.set()

    def _hear_end(self, reason: str) -> None:
        if reason == "eof" and self.head is not None and not self.head.chunked and self.head.length is None:
            if self._scanner is not None:
                self._end_events(self._scanner)
                return
            if self._mode is Mode.HOLD and _is_json(b"".join(self._held)):
                self._send_held()
                return
        self._break(reason)

    # What the client's connection tells

    def pause(self) -> None:
        """The client reads too slowly: stop reading the backend."""
        self._stalled_since = self.trail.clock()
        self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()
        if self.ending is not LEFT:
            self._finish()
        if self._stalled_since:
            self._activity = self.trail.clock()
            self._stalled_since = 0.0
        if self._over:
            self.set()

    def drain(self) -> None:
        """The gateway ends and cannot wait any longer."""
        if self.ending is LEFT:
            self.on_broken("drain")

    # Time

    def on_alarm(self) -> None:
        """See whether anything is overdue, now that time has passed."""
        if self._over:
            return
        try:
            self._look_at_clock(self.trail.clock())
        except Exception as bug:  # noqa: BLE001  no other alarm is set; the request logs it
            self.fail(bug)

    def _look_at_clock(self, now: float) -> None:
        if self.head is None:
            due, kind = next_due(Phase.WAITING, self.timeouts, self.trail.start, self.trail.mark)
        else:
            due, kind = next_due(Phase.STREAMING, self.timeouts, self.trail.start, self._activity)
        is_stalled = self._stalled_since > 0.0
        if is_stalled:  # then it is the client who is waited for
            due = min(self._stalled_since + CLIENT_STALL_SECONDS, self.trail.start + self.timeouts.total)
        if now < due:
            self._is_late = False
        elif self._is_late:
            self.overdue = None if is_stalled else kind
            self._give_up("client_slow" if is_stalled else "upstream_timeout")
            return
        else:  # an event loop that was held up looks at its clock before it reads what has come meanwhile
            self._is_late = True
            self._wake_in(0.0, now)
            return
        quiet_until = self._activity + KEEP_ALIVE_SECONDS
        if self._scanner is not None and self.committed and not is_stalled:
            if now >= quiet_until:
                self._send(self._framed(_KEEP_ALIVE))
                quiet_until = now + KEEP_ALIVE_SECONDS
            due = min(due, quiet_until)
        self._wake_in(due - now, now)

    def _wake_in(self, seconds: float, now: float) -> None:
        """Look again then, or sooner: a head, a pause or a comment's time may come in between and set no alarm."""
        self._connection.wake_in(max(0.001, min(seconds, self.timeouts.idle, KEEP_ALIVE_SECONDS)), now)

    def _give_up(self, reason: str) -> None:
        if self.ending is not LEFT:  # all but the client's reading is done
            self._client.abort()
            self.ending = Ending(reason)
            self._finish()
        else:
            self._break(reason)
        self.set()

    # Endings

    def _send_held(self) -> None:
        head = self.head
        assert head is not None  # noqa: S101  held bytes come after a head
        body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        trail = self.trail
        if head.status < 400:
            trail.tokens_in, trail.tokens_out, trail.tokens_cached = usage_of(body)
        head.length, head.chunked = len(body), False
        self.committed = True
        answer = self._head_bytes() + body
        trail.first_token = trail.mark - trail.start
        trail.bytes_out += len(answer)
        self._client.write(answer)
        self._end(_OK)

    def _end_events(self, scanner: sse.Scanner) -> None:
        rest = scanner.rest()
        self._note_tokens(scanner)
        if not scanner.is_whole and not scanner.errored:
            self._break("stream_truncated")
            return
        if not scanner.terminated and scanner.is_finished and not scanner.errored:
            self._out.append(b"data: [DONE]\n\n")  # in the place of `rest`: an event that has not ended is none
        elif rest:
            self._out.append(rest)
        self._commit_and_flush(last=True)
        self._end(_ERRED if scanner.errored else _OK)

    def _note_tokens(self, scanner: sse.Scanner) -> None:
        trail = self.trail
        trail.tokens_in, trail.tokens_out, trail.tokens_cached = (
            scanner.tokens_in, scanner.tokens_out, scanner.tokens_cached,
        )  # fmt: skip
        trail.events = scanner.events
        if scanner.load:
            self._backend.hear_ended(scanner.load, trail.clock())

    def _break(self, reason: str) -> None:
        """The answer will never be whole."""
        if not self.committed and self._mode is Mode.EVENTS and self._out:
            self._commit_and_flush()
        if not self.committed:
            self._fail(self._failure_of(reason), reason)
            return
        client = self._client
        if self._out:
            self._commit_and_flush()
        if self._scanner is not None:
            self._note_tokens(self._scanner)
            event = error_event(self.call.resource.protocol, broken_off(reason, self.overdue), self.call.request_id)
            if event:
                self._send(self._framed(event))
        if reason == "client_slow" or (self.call.http10 and self._is_unframed()):
            client.abort()  # it would never take the rest; or ending cleanly would make it look whole
        else:
            client.cut()
        self.ending = Ending("stream_truncated" if reason in ("eof", "upstream_reset") else reason)
        self._finish()

    def _failure_of(self, reason: str) -> Failure:
        if self.head is not None or self._connection.got_bytes:
            return Failure.FIRST_BYTE_TIMEOUT if reason == "upstream_timeout" else Failure.PROTOCOL
        if reason in ("eof", "upstream_reset") and self._connection.reused:
            return Failure.STALE
        return _BREAK_FAILURES.get(reason, Failure.PROTOCOL)

    def _fail(self, failure: Failure, reason: str = "") -> None:
        named = reason if reason in ("drain", "client_slow") else FAILURE_REASONS[failure]
        self._end(Ending(named, failure))

    def _end(self, ending: Ending) -> None:
        self.ending = ending
        if not self._stalled_since or ending.failure is not None:
            self._finish()  # else resume() does, or the end of the client's patience: it has not read all yet

    def _finish(self) -> None:
        self._over = True
        if self.committed and (self._mode is not Mode.HOLD or self._stalled_since):
            self.trail.waited = self.trail.clock() - self.trail.mark  # for the backend's next piece, or for the client

    # Bytes out

    def _is_unframed(self) -> bool:
        """No length is told to the client: the backend told none, or events of ours may come among its own."""
        return self.head is not None and (self.head.length is None or self._scanner is not None)

    def _commit_and_flush(self, *, last: bool = False) -> None:
        out = self._out
        data = out[0] if len(out) == 1 else b"".join(out)
        if out:
            self._out = []
        framed = self._framed(data) if data else b""
        if last and self._chunks:
            framed += b"0\r\n\r\n"
        if not self.committed:
            framed = self._head_bytes() + framed
            self.committed = True
            self._is_chunked = self._chunks
        if data and self.trail.first_token < 0:
            self.trail.first_token = self.trail.clock() - self.trail.start
        if framed:
            self._send(framed)

    def _flush_more(self) -> None:
        """`_commit_and_flush` for all but the first piece: what each event of a stream costs."""
        out, self._out = self._out, []
        data = out[0] if len(out) == 1 else b"".join(out)
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.trail.bytes_out += len(data)
        self._client.write(data)

    @property
    def _chunks(self) -> bool:
        return self._is_unframed() and self._mode is not Mode.EMPTY and not self.call.http10

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunks else data

    def _send(self, data: bytes) -> None:
        self.trail.bytes_out += len(data)
        self._client.write(data)

    def _head_bytes(self) -> bytes:
        head, call, trail = self.head, self.call, self.trail
        assert head is not None  # noqa: S101  only an answer that has one is committed
        trail.upstream += trail.lap()
        trail.status = head.status
        if head.length is not None and self._scanner is None:
            framing = b"content-length: %d\r\n" % head.length
        elif self._chunks:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            framing = b""
            call.keep_alive = call.keep_alive and self._mode is Mode.EMPTY
        return b"%b%b%b%b%b%b%bx-weir-attempts: %d\r\n%b%b%b" % (
            STATUS_LINES[head.status],
            head.lines,
            framing,
            b"x-accel-buffering: no\r\n" if self._scanner is not None else b"",
            call.id_line,
            trail.policy_line,
            self._backend.name_line,
            len(trail.attempts) + 1,
            trail.limit_lines,
            trail.server_timing(),
            b"\r\n" if call.keep_alive else b"connection: close\r\n\r\n",
        )


def _is_json(document: bytes) -> bool:
    try:
        msgspec.json.decode(document, type=msgspec.Raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False
    return True


def broken_off(reason: str, overdue: Kind | None) -> Refusal:
    """What a client is told whose answer will never be whole."""
    if reason == "drain":
        return Draining("The gateway is shutting down; the answer is incomplete.")
    if overdue is Kind.TOTAL:
        return DeadlineExceeded("The request took longer than its route allows; the answer is incomplete.")
    if reason == "upstream_timeout":
        return UpstreamTimeout("The backend stopped sending; the answer is incomplete.")
    return UpstreamFailed("The backend's answer broke off; the answer is incomplete.")
