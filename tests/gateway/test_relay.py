"""The relay between a connection fed by hand and a client that only remembers, in virtual time."""

import asyncio
import json
from random import Random

import pytest

from gateway import relay as module
from gateway.answer import HOLD_BYTES
from gateway.relay import LEFT, Ending, Relay
from gateway.upstream.endpoint import Backend
from gateway.upstream.pool import Pool
from policies.deadline import Kind
from policies.policy import Timeouts
from policies.retry import Failure
from tests.support.call import MemoryClient, call_of, trail_of
from tests.support.upstream import connected, endpoint
from tests.support.virtual_clock import virtual_time

TIMEOUTS = Timeouts(connect=1.0, first_byte=30.0, idle=20.0, total=600.0)
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
BYTES = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n"
ONE = b'data: {"choices":[{"delta":{"content":"one"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
FIN = b""  # in a table of pieces: the backend closes its side


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Story:
    """One relay, its connection, client and trail."""

    def __init__(self, call=None, timeouts: Timeouts = TIMEOUTS, reused: bool = False, started: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        self.call = call or call_of()
        self.trail = trail_of(lambda: 1000.0 + loop.time())
        self.trail.call = self.call
        self.trail.start -= started  # so long ago
        self.client = self.call.connection
        self.pool = Pool(endpoint())
        self.connection = connected(self.pool)
        self.connection.reused = reused
        self.backend = Backend(endpoint(), 0.0, Random(1), lambda backend, state: None)
        self.relay = Relay(self.call, self.trail, timeouts, self.backend)
        self.relay.start(self.connection, b"")

    def hear(self, *pieces: bytes) -> None:
        for piece in pieces:
            if piece == FIN:
                self.connection.transport.lose()
            else:
                self.connection.data_received(piece)

    async def end(self) -> Ending:
        try:
            await self.relay
            return self.relay.ending
        finally:
            self.relay.release()

    @property
    def error(self) -> dict:
        return json.loads(self.client.body.rpartition(b"data: ")[2])["error"]


# Answers that go well


@virtual_time
async def test_what_a_head_says_of_the_backends_load_counts_from_then_on() -> None:
    story = Story()
    report = b'endpoint-load-metrics: JSON {"named_metrics":{"num_requests_running":5}}\r\n\r\n'
    story.hear(EVENTS[:-2] + report)
    assert story.backend.reported == 5
    story.hear(chunk(ONE + DONE) + END)
    assert (await story.end()).reason == "ok"
    assert b"endpoint-load" not in story.client.written


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([JSON + b"{}"], b"{}"),
        ([JSON, b"{", b"}"], b"{}"),
        ([EVENTS + chunk(ONE + DONE) + END], ONE + DONE),
        ([EVENTS, chunk(ONE[:9]), chunk(ONE[9:]), chunk(DONE), END], ONE + DONE),
        ([EVENTS, chunk(ONE), chunk(LAST), END], ONE + LAST + DONE),
        ([EVENTS, chunk(ONE), chunk(DONE[:-1]), END], ONE + DONE[:-1]),
        ([EVENTS, chunk(ONE), chunk(LAST + b'data: {"usage'), END], ONE + LAST + DONE),
        ([b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", ONE, DONE, FIN], ONE + DONE),
        ([b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n", b"{", b"}", FIN], b"{}"),
        ([BYTES, chunk(b"a"), chunk(b"b"), END], b"ab"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"], b"{}"),
    ],
)
@virtual_time
async def test_a_whole_answer_passes_whole(pieces, body) -> None:
    story = Story()
    story.hear(*pieces)
    assert await story.end() == Ending("ok")
    assert (story.client.body, story.client.ended) == (body, "")
    assert story.trail.bytes_out == len(story.client.written)
    assert story.client.relay is None


@virtual_time
async def test_the_head_has_what_every_forwarded_answer_has() -> None:
    story = Story()
    story.trail.limit_lines = b"ratelimit: x\r\n"
    story.hear(JSON + b"{}")
    await story.end()
    assert story.client.head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n")
    for line in (
        b"x-weir-backend: a",
        b"x-weir-policy: p1",
        b"x-weir-attempts: 1",
        b"ratelimit: x",
        b"server-timing: auth;dur=",
    ):
        assert line in story.client.head
    assert b"connection" not in story.client.head


@virtual_time
async def test_events_go_out_as_they_come_and_in_whole() -> None:
    story = Story(call_of(stream=True))
    story.hear(EVENTS)
    assert story.client.written == b""  # until then another backend may be tried
    story.hear(chunk(ONE[:-1]))
    assert story.client.written == b""
    story.hear(chunk(b"\n"))
    assert story.client.body == ONE
    assert b"x-accel-buffering: no" in story.client.head
    story.hear(chunk(DONE) + END)
    await story.end()
    assert story.client.is_ended


@virtual_time
async def test_usage_is_read_from_events_and_documents() -> None:
    usage = b'"usage":{"prompt_tokens":3,"completion_tokens":5}'
    for answer in (
        EVENTS + chunk(b"data: {%b}\n\n" % usage) + chunk(DONE) + END,
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n{%b}"
        % (len(usage) + 2, usage),
    ):
        story = Story()
        story.hear(answer)
        await story.end()
        assert (story.trail.tokens_in, story.trail.tokens_out) == (3, 5)


@virtual_time
async def test_events_of_a_told_length_are_framed_anew_because_ours_may_come_among_them() -> None:
    story = Story(call_of(stream=True))
    story.hear(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(LAST) + LAST)
    assert await story.end() == Ending("ok")
    assert story.client.body == LAST + DONE
    assert story.client.is_ended


@virtual_time
async def test_events_of_a_told_length_that_are_cut_are_not_whole() -> None:
    story = Story(call_of("/v1/responses", stream=True))
    story.hear(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n" + ONE, FIN)
    assert await story.end() == Ending("stream_truncated")
    assert story.client.ended == "cut"


@virtual_time
async def test_an_answer_to_head_has_no_body_whatever_its_length_says() -> None:
    story = Story(call_of("/page", method="HEAD"))
    story.hear(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 5\r\n\r\n")
    assert await story.end() == Ending("ok")
    assert story.client.written.endswith(b"\r\n\r\n")
    assert b"content-length: 5\r\n" in story.client.written


@virtual_time
async def test_json_beyond_what_is_held_passes_as_it_comes() -> None:
    story = Story()
    story.hear(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    piece, sent = b"1" * 100_000, 0
    while not story.client.written:
        story.hear(chunk(piece))
        sent += len(piece)
        assert sent <= HOLD_BYTES + len(piece)
    story.hear(chunk(piece), END)
    assert await story.end() == Ending("ok")
    assert len(story.client.body) == sent + len(piece)


@pytest.mark.parametrize(
    ("answer", "ended"),
    [(EVENTS + chunk(ONE + DONE) + END, ""), (BYTES + chunk(b"ab") + END, ""), (EVENTS + chunk(ONE), "abort")],
)
@virtual_time
async def test_to_http10_nothing_is_chunked_and_a_cut_answer_does_not_end_cleanly(answer, ended) -> None:
    story = Story(call_of(version="1.0"))
    story.hear(answer, FIN)
    await story.end()
    assert b"transfer-encoding" not in story.client.head
    assert b"connection: close" in story.client.head
    assert not story.client.body.startswith(b"%x\r\n" % len(ONE))
    assert story.client.ended == ended


# Failures, while another backend may still be tried


@pytest.mark.parametrize(
    ("pieces", "reused", "ending"),
    [
        ([FIN], False, Ending("upstream_reset", Failure.RESET)),
        ([FIN], True, Ending("upstream_reset", Failure.STALE)),
        ([b"HTTP/1.1 2", FIN], True, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([JSON + b"{", FIN], True, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{", FIN], False, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([EVENTS, FIN], False, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([EVENTS + chunk(ONE[:-1]), FIN], False, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([b"junk\r\n\r\n"], False, Ending("upstream_protocol", Failure.PROTOCOL)),
        ([b"HTTP/1.1 429 X\r\ncontent-length: 0\r\n\r\n"], False, Ending("shed", Failure.BUSY)),
        ([b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"], False, Ending("upstream_error", Failure.SERVER_ERROR)),
        ([b"HTTP/1.1 503 X\r\nx-backend-not-started: 1\r\ncontent-length: 0\r\n\r\n"], False, Ending("shed", Failure.NOT_STARTED)),
        ([b"HTTP/1.1 302 X\r\nlocation: http://evil/\r\ncontent-length: 0\r\n\r\n"], False, Ending("upstream_protocol", Failure.PROTOCOL)),
    ],
)  # fmt: skip
@virtual_time
async def test_a_failure_before_the_first_byte_sends_nothing(pieces, reused, ending) -> None:
    story = Story(reused=reused)
    story.hear(*pieces)
    assert await story.end() == ending
    assert (story.client.written, story.client.ended, story.relay.committed) == (b"", "", False)


@virtual_time
async def test_a_failed_answer_that_was_whole_leaves_its_connection_in_use() -> None:
    story = Story()
    story.hear(b"HTTP/1.1 429 X\r\ncontent-length: 4\r\n\r\nbusy")
    await story.end()
    assert story.pool.take(1000.0) is story.connection


# Answers that break


@pytest.mark.parametrize("end", [FIN, END, b"junk", b"5\r\nhal"])
@virtual_time
async def test_a_broken_stream_ends_with_one_error_event_and_a_cut(end) -> None:
    story = Story(call_of(stream=True))
    story.hear(EVENTS + chunk(ONE), chunk(b'data: {"half'), end)
    if end == b"5\r\nhal":
        story.hear(FIN)
    assert (await story.end()).reason in ("stream_truncated", "upstream_protocol")
    assert story.client.ended == "cut"
    assert story.client.body.startswith(ONE + b'data: {"error":')
    assert (story.error["code"], story.error["request_id"]) == ("upstream_failed", story.call.request_id)
    assert b"[DONE]" not in story.client.body
    assert not story.client.is_ended


@virtual_time
async def test_anthropic_hears_of_it_in_its_own_form() -> None:
    story = Story(call_of("/v1/messages", stream=True))
    story.hear(EVENTS + chunk(b"event: ping\ndata: {}\n\n"), FIN)
    await story.end()
    assert b'event: error\ndata: {"type":"error","error":{"type":"api_error"' in story.client.body


@pytest.mark.parametrize("path", ["/hooks", "/v2/models/tiny/infer"])
@virtual_time
async def test_a_protocol_without_a_form_for_it_is_only_cut(path) -> None:
    story = Story(call_of(path, stream=True))
    story.hear(EVENTS + chunk(ONE) + b"junk")
    await story.end()
    assert (story.client.body, story.client.ended) == (ONE, "cut")


@virtual_time
async def test_bytes_that_break_off_are_cut_and_never_completed() -> None:
    story = Story(call_of("/page", method="GET"))
    story.hear(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 9\r\n\r\nabc", FIN)
    assert await story.end() == Ending("stream_truncated")
    assert (story.client.body, story.client.ended) == (b"abc", "cut")


@virtual_time
async def test_an_error_that_the_backend_reports_itself_passes_and_counts_against_it() -> None:
    story = Story(call_of(stream=True))
    told = b'data: {"error":{"message":"out of memory"}}\n\n'
    story.hear(EVENTS + chunk(ONE) + chunk(told) + END)
    assert await story.end() == Ending("upstream_error")
    assert story.client.body == ONE + told


@virtual_time
async def test_after_the_end_nothing_is_heard_any_more() -> None:
    story = Story(call_of(stream=True))
    story.hear(EVENTS + chunk(ONE))
    story.relay.drain()
    assert (story.error["code"], story.client.ended) == ("draining", "cut")
    written = story.client.written
    story.hear(chunk(ONE), END, FIN)
    story.relay.drain()
    assert await story.end() == Ending("drain")
    assert story.client.written == written


@virtual_time
async def test_draining_before_the_first_byte_is_a_refusal() -> None:
    story = Story()
    story.relay.drain()
    assert (await story.end()).reason == "drain"
    assert story.client.written == b""


# Time


@pytest.mark.parametrize(
    ("timeouts", "pieces", "after", "ending", "overdue"),
    [
        (Timeouts(first_byte=7.0), [], 7, Ending("upstream_timeout", Failure.FIRST_BYTE_TIMEOUT), Kind.FIRST_BYTE),
        (Timeouts(first_byte=700.0), [], 600, Ending("upstream_timeout", Failure.FIRST_BYTE_TIMEOUT), Kind.TOTAL),
        (Timeouts(first_byte=700.0, idle=3.0), [JSON], 3, Ending("upstream_timeout", Failure.FIRST_BYTE_TIMEOUT), Kind.IDLE),
        (Timeouts(first_byte=700.0, idle=3.0), [EVENTS + chunk(ONE)], 3, Ending("upstream_timeout"), Kind.IDLE),
        (Timeouts(first_byte=30.0, idle=40.0), [EVENTS + chunk(ONE)], 40, Ending("upstream_timeout"), Kind.IDLE),
        (Timeouts(total=5.0), [EVENTS + chunk(ONE)], 5, Ending("upstream_timeout"), Kind.TOTAL),
    ],
)  # fmt: skip
@virtual_time
async def test_each_timeout_is_in_time(timeouts, pieces, after, ending, overdue) -> None:
    story = Story(timeouts=timeouts)
    story.hear(*pieces)
    assert await story.end() == ending
    assert asyncio.get_running_loop().time() == pytest.approx(after, abs=0.01)
    assert story.relay.overdue is overdue
    assert story.connection.transport.closed == "abort"


@virtual_time
async def test_total_counts_from_the_start_of_the_request_and_not_of_the_attempt() -> None:
    story = Story(timeouts=Timeouts(first_byte=30.0, total=10.0), started=9.0)
    assert (await story.end()).failure is Failure.FIRST_BYTE_TIMEOUT
    assert (story.relay.overdue, asyncio.get_running_loop().time()) == (Kind.TOTAL, pytest.approx(1, abs=0.01))


@virtual_time
async def test_each_piece_starts_idle_anew() -> None:
    story = Story(timeouts=Timeouts(first_byte=1.0, idle=3.0))
    story.hear(EVENTS + chunk(ONE))
    for _ in range(10):
        await asyncio.sleep(2.9)
        story.hear(chunk(ONE))
    assert story.relay.ending is LEFT
    await story.end()
    assert asyncio.get_running_loop().time() == pytest.approx(32, abs=0.01)
    assert story.error["code"] == "upstream_timeout"


@virtual_time
async def test_the_deadline_of_a_stream_is_told_as_such() -> None:
    story = Story(timeouts=Timeouts(idle=60.0, total=10.0))
    story.hear(EVENTS + chunk(ONE))
    await story.end()
    assert story.error["code"] == "deadline"


@virtual_time
async def test_silence_in_a_stream_is_filled_with_comments_that_do_not_count_as_life() -> None:
    story = Story(timeouts=Timeouts(first_byte=300.0, idle=50.0))
    await asyncio.sleep(2)
    story.hear(EVENTS + chunk(ONE))
    await asyncio.sleep(14.9)
    assert story.client.body == ONE
    await asyncio.sleep(0.2)
    assert story.client.body == ONE + b": still working\n\n"
    await story.end()
    assert asyncio.get_running_loop().time() == pytest.approx(52, abs=0.01)
    assert story.client.body.count(b": still working\n\n") == 3


@virtual_time
async def test_nothing_is_put_between_bytes_that_are_no_events() -> None:
    story = Story(timeouts=Timeouts(idle=50.0))
    story.hear(BYTES + chunk(b"ab"))
    await story.end()
    assert story.client.body == b"ab"


@pytest.mark.parametrize(
    ("before", "due", "then"), [([], 30, JSON + b"{}"), ([EVENTS + chunk(ONE)], 20, chunk(DONE) + END)]
)
@virtual_time
async def test_what_came_while_the_loop_was_held_up_is_read_before_anything_is_overdue(before, due, then) -> None:
    story = Story()
    story.hear(*before)
    asyncio.get_running_loop().call_later(due + 0.0005, story.hear, then)  # an event loop looks at its timers first
    assert await story.end() == Ending("ok")


@virtual_time
async def test_who_was_late_once_is_late_again_only_when_nothing_has_come() -> None:
    story = Story()
    story.hear(EVENTS + chunk(ONE))
    for turn in (1, 2):
        asyncio.get_running_loop().call_later(20.0005 * turn, story.hear, chunk(ONE))
    assert (await story.end()).reason == "upstream_timeout"
    assert asyncio.get_running_loop().time() == pytest.approx(60, abs=0.01)
    assert story.client.body.count(ONE) == 3


@virtual_time
async def test_an_alarm_that_rings_when_the_answer_is_over_does_nothing() -> None:
    story = Story()
    story.hear(JSON + b"{}")
    await story.end()
    body = story.client.body
    await asyncio.sleep(100)
    assert (story.client.body, story.connection.answer) == (body, None)


@virtual_time
async def test_waiting_for_the_backend_is_not_counted_as_ours() -> None:
    story = Story(call_of(stream=True))
    await asyncio.sleep(2)
    story.hear(EVENTS + chunk(ONE))
    await asyncio.sleep(3)
    story.hear(chunk(DONE) + END)
    await story.end()
    event = story.trail
    event.end()
    assert (event.total, event.upstream, event.first_token) == (5, 2, 2)
    assert event.overhead == pytest.approx(0)


# Clients that read slowly


@virtual_time
async def test_a_paused_client_stops_the_backend_until_it_reads_again() -> None:
    story = Story(call_of(stream=True))
    story.hear(EVENTS + chunk(ONE))
    story.relay.pause()
    assert story.connection.transport.is_reading_paused
    await asyncio.sleep(25)  # longer than idle: it is not the backend who is silent
    assert story.relay.ending is LEFT
    story.relay.resume()
    assert not story.connection.transport.is_reading_paused
    await asyncio.sleep(15)
    story.hear(chunk(DONE) + END)
    assert await story.end() == Ending("ok")


@pytest.mark.parametrize("timeouts", [TIMEOUTS, Timeouts(idle=700.0), Timeouts(first_byte=500.0, idle=90.0)])
@virtual_time
async def test_a_client_that_never_reads_again_is_cut_off(timeouts) -> None:
    story = Story(call_of(stream=True), timeouts)
    story.hear(EVENTS + chunk(ONE))
    await asyncio.sleep(1)
    story.relay.pause()
    assert (await story.end()).reason == "client_slow"
    assert asyncio.get_running_loop().time() == pytest.approx(1 + module.CLIENT_STALL_SECONDS, abs=0.01)
    assert story.client.ended == "abort"
    assert story.connection.transport.closed == "abort"


@virtual_time
async def test_total_holds_for_slow_clients_too() -> None:
    story = Story(call_of(stream=True), Timeouts(idle=5.0, total=10.0))
    story.hear(EVENTS + chunk(ONE))
    story.relay.pause()
    assert (await story.end()).reason == "client_slow"
    assert asyncio.get_running_loop().time() == pytest.approx(10, abs=0.01)


@virtual_time
async def test_an_answer_is_not_over_before_a_slow_client_has_taken_it() -> None:
    story = Story()
    story.client.write = lambda data: story.relay.pause()
    story.hear(JSON + b"{}")
    ended = asyncio.ensure_future(story.end())
    await asyncio.sleep(5)
    assert not ended.done()
    story.relay.resume()
    assert await ended == Ending("ok")
    assert story.pool.take(1005.0) is story.connection
    assert not story.connection.transport.is_reading_paused
    assert story.trail.waited == pytest.approx(5)


@virtual_time
async def test_a_client_that_never_takes_the_end_is_cut_off() -> None:
    story = Story()
    story.client.write = lambda data: story.relay.pause()
    story.hear(JSON + b"{}")
    assert await story.end() == Ending("client_slow")
    assert story.client.ended == "abort"


@virtual_time
async def test_a_stream_that_breaks_before_a_slow_client_is_over_at_once() -> None:
    story = Story(call_of(stream=True))
    story.hear(EVENTS + chunk(ONE))
    story.relay.pause()
    story.hear(FIN)
    assert await story.end() == Ending("stream_truncated")
    assert asyncio.get_running_loop().time() == 0
    story.relay.resume()  # late news


# Cancellation


@pytest.mark.parametrize("pieces", [[], [b"HTTP/1.1 2"], [EVENTS], [EVENTS + chunk(ONE)], [JSON + b"{"]])
@virtual_time
async def test_when_the_client_leaves_everything_is_given_back(pieces) -> None:
    story = Story()
    story.hear(*pieces)
    ended = asyncio.ensure_future(story.end())
    await asyncio.sleep(0)
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended
    assert story.connection.transport.closed == "abort"
    assert (story.client.relay, story.connection.answer, story.pool.take(1000.0)) == (None, None, None)
    story.connection.transport.lose()  # late news
    story.relay.on_broken("eof")


@virtual_time
async def test_what_a_stream_had_told_of_its_tokens_is_recorded_when_the_client_leaves() -> None:
    story = Story()
    story.hear(EVENTS + chunk(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'))
    ended = asyncio.ensure_future(story.end())
    await asyncio.sleep(0)
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended
    assert (story.trail.tokens_in, story.trail.tokens_out) == (7, 2)


class FailingClient(MemoryClient):
    def write(self, data: bytes) -> None:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("then", ["it is gone", "time passes", "the gateway ends"])
@virtual_time
async def test_a_bug_of_ours_ends_the_request_and_leaves_none_waiting(then) -> None:
    story = Story(call_of(client=FailingClient()))
    with pytest.raises(RuntimeError, match="a bug"):
        story.hear(EVENTS + chunk(ONE))
    if then == "it is gone":  # what the event loop does next, and nobody is told anything more
        story.connection.transport.lose(RuntimeError("a bug"))
    elif then == "the gateway ends":
        story.relay.drain()
    async with asyncio.timeout(1000):
        with pytest.raises(RuntimeError, match="a bug"):
            await story.end()


@virtual_time
async def test_repr_tells_its_state() -> None:
    story = Story()
    assert repr(story.relay) == "<Relay waiting committed=False ending=None>"
    story.hear(JSON + b"{}")
    await story.end()
    assert repr(story.relay).startswith("<Relay hold committed=True ending=Ending(reason='ok'")
