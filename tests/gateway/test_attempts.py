"""Attempts before backends that answer from memory, in virtual time."""

import asyncio
import json
from dataclasses import replace
from random import Random

import pytest

from gateway.attempts import Forwarder, outcome_of
from gateway.call import Ids
from gateway.relay import Ending
from gateway.trail import Trail
from gateway.upstream.fleet import Fleet
from policies import errors
from policies.breaker import Outcome, State
from policies.deadline import Kind
from policies.policy import Balance, BalanceKind, BreakerRule, Match, RetryRule, Route, Target, Timeouts
from tests.support.call import MemoryClient, call_of, trail_of
from tests.support.upstream import CLOSED, HANGS, REFUSED, SILENT, endpoint, script
from tests.support.virtual_clock import virtual_time

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"
FULL = b"HTTP/1.1 503 X\r\nx-backend-not-started: 1\r\ncontent-length: 0\r\n\r\n"
BAD = b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"
WRONG = b"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
HALF = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n1\r\n\n\r\n"

THREE, DEFAULT = RetryRule(attempts=3), Timeouts()
RULE = BreakerRule(of_at_least=1, eject_at_most=1.0, key="k")


class Story:
    """Backends a, b, ... each with what it does to request after request."""

    def __init__(self, *does, retry: RetryRule = THREE, timeout: Timeouts = DEFAULT, **fields) -> None:
        loop = asyncio.get_running_loop()
        self.clock = lambda: 1000.0 + loop.time()
        self.fleet = Fleet(self.clock, Random(4), lambda backend, state: None)
        names = "abcdefgh"[: len(does)]
        self.fleet.replace({f"tiny/{name}": endpoint(f"tiny/{name}", **fields) for name in names})
        self.transports = []
        for name, answers in zip(names, does, strict=True):
            self.connects_to(
                self.fleet.backends[f"tiny/{name}"], list(answers) if isinstance(answers, tuple) else [answers]
            )
        self.forwarder = Forwarder(self.fleet, self.clock, Random(1), Ids(Random(1)))
        # Equal keys take one backend after the other in the order of the ring, which is the same in each run
        self.route = Route(
            "chat",
            Match(),
            (Target("tiny"),),
            balance=Balance(BalanceKind.HASH),
            retry=retry,
            timeout=timeout,
            breaker=RULE,
        )
        self.client = MemoryClient()

    def connects_to(self, backend, answers) -> None:
        script(backend, answers, self.transports)

    async def ask(self, call=None) -> Trail:
        self.trail = trail_of(self.clock)
        self.call = call or call_of()
        self.call.connection = self.client
        await self.forwarder.forward(self.call, self.trail, self.route, "alice")
        return self.trail

    def assert_given_back(self) -> None:
        backends = self.fleet.backends.values()
        assert [backend.inflight for backend in backends] == [0] * len(backends)
        assert (self.forwarder.relays, self.client.relay) == (set(), None)
        idle = {connection.transport for backend in backends for connection in backend.pool._idle}
        assert all(transport.closed or transport in idle for transport in self.transports)

    def state(self, name: str = "a") -> State:
        return self.fleet.backends[f"tiny/{name}"].breaker_state


@virtual_time
async def test_a_request_goes_out_with_what_the_backend_must_know() -> None:
    story = Story(OK, base_path="/llm")
    trail = await story.ask()
    head, _, body = story.transports[0].written.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /llm/v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:9000\r\n")
    assert b"\r\nx-weir-consumer: alice\r\n" in head
    assert b"\r\nx-weir-deadline-ms: 600000\r\n" in head
    assert body == story.call.body
    assert b"x-weir-backend: a\r\nx-weir-attempts: 1\r\n" in story.client.head
    assert (trail.service, trail.end_reason, trail.attempts[0].outcome, trail.attempts[0].status) == (
        "tiny",
        "ok",
        "ok",
        200,
    )
    story.assert_given_back()


@pytest.mark.parametrize(
    ("does", "retry", "tried", "status"),
    [
        ([REFUSED, OK], RetryRule(attempts=2), ["connect_fail", "ok"], 200),
        ([HANGS, OK], RetryRule(attempts=2), ["connect_fail", "ok"], 200),
        ([BUSY, OK], RetryRule(attempts=2), ["shed", "ok"], 200),
        ([FULL, OK], RetryRule(attempts=2), ["shed", "ok"], 200),
        ([REFUSED, REFUSED, OK], RetryRule(attempts=3), ["connect_fail", "connect_fail", "ok"], 200),
        ([BAD, OK], RetryRule(attempts=2, idempotent=True), ["upstream_error", "ok"], 200),
        ([CLOSED, OK], RetryRule(attempts=2, idempotent=True), ["upstream_reset", "ok"], 200),
        ([WRONG, OK], RetryRule(attempts=2, idempotent=True), ["ok"], 400),
    ],
)
@virtual_time
async def test_another_backend_is_tried_where_nothing_was_started(does, retry, tried, status) -> None:
    story = Story(*does, retry=retry)
    chooser, order = story.fleet.group(Target("tiny"), "tiny").chooser, []
    for answer in does:  # whoever is asked first does what is first in the table
        order.append(chooser.choose(story.route.balance, Random(1), 0.0, "alice", order))
        story.connects_to(order[-1], [answer])
    trail = await story.ask()
    outcomes = [attempt.outcome for attempt in trail.attempts]
    assert outcomes == tried
    assert story.client.status == status
    assert b"x-weir-attempts: %d\r\n" % len(tried) in story.client.head
    story.assert_given_back()


@virtual_time
async def test_a_retry_goes_to_nobody_who_has_left_meanwhile() -> None:
    story = Story(OK, OK, OK)
    chooser, order = story.fleet.group(Target("tiny"), "tiny").chooser, []
    for _ in range(3):
        order.append(chooser.choose(story.route.balance, Random(1), 0.0, "alice", order))
    first, second, third = order
    story.connects_to(first, [HANGS])
    asking = asyncio.create_task(story.ask())
    await asyncio.sleep(0.5)
    story.fleet.replace({backend.key: backend.endpoint for backend in (first, third)})
    trail = await asking
    assert [attempt.backend for attempt in trail.attempts] == [first.endpoint.id, third.endpoint.id]
    assert second.inflight == 0
    story.assert_given_back()


@virtual_time
async def test_when_all_others_have_left_meanwhile_the_first_failure_stands() -> None:
    story = Story(HANGS, HANGS)
    asking = asyncio.create_task(story.ask())
    await asyncio.sleep(0.5)
    story.fleet.replace({})
    with pytest.raises(errors.NoBackend):
        await asking
    assert [attempt.outcome for attempt in story.trail.attempts] == ["connect_fail"]


@pytest.mark.parametrize(
    ("does", "refusal", "rule", "state"),
    [
        (REFUSED, errors.NoBackend, None, State.OPEN),
        (HANGS, errors.NoBackend, None, State.OPEN),
        (BUSY, errors.BackendsBusy, "routes.chat", State.CLOSED),
        (FULL, errors.Overloaded, None, State.CLOSED),
        (BAD, errors.UpstreamFailed, None, State.OPEN),
        (CLOSED, errors.UpstreamFailed, None, State.OPEN),
        (b"junk\r\n\r\n", errors.UpstreamFailed, None, State.OPEN),
        (SILENT, errors.UpstreamTimeout, "routes.chat.timeout.first_byte", State.OPEN),
        (OK[:-1], errors.UpstreamTimeout, "routes.chat.timeout.idle", State.OPEN),
        (b"HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", errors.Overloaded, None, State.OPEN),
    ],
)
@virtual_time
async def test_what_the_client_and_the_breaker_hear_when_it_fails(does, refusal, rule, state) -> None:
    story = Story(does)
    with pytest.raises(errors.Refusal) as caught:
        await story.ask()
    assert (type(caught.value), caught.value.rule, story.state()) == (refusal, rule, state)
    assert story.client.written == b""
    story.assert_given_back()


@pytest.mark.parametrize(
    ("retry_after", "told"),
    [(b"7", 7.0), (b"99999", 3600.0), (b"soon", 1.0), (b"-1", 1.0), (b"9" * 400, 1.0)],
)
@virtual_time
async def test_when_to_come_back_is_the_backends_word_within_reason(retry_after, told) -> None:
    story = Story(b"HTTP/1.1 429 X\r\nretry-after: %b\r\ncontent-length: 0\r\n\r\n" % retry_after)
    with pytest.raises(errors.BackendsBusy) as caught:
        await story.ask()
    assert caught.value.retry_after == told
    assert story.fleet.backends["tiny/a"].reported >= 8  # its fast refusals draw no more requests


@pytest.mark.parametrize(
    ("does", "timeout", "after"),
    [
        (HANGS, Timeouts(connect=60.0, total=5.0), 5.0),
        (SILENT, Timeouts(first_byte=60.0, total=5.0), 5.0),
        (OK[:-1], Timeouts(first_byte=60.0, total=5.0), 5.0),
    ],
)
@virtual_time
async def test_the_total_timeout_is_a_deadline_in_every_phase(does, timeout, after) -> None:
    story = Story(does, does, timeout=timeout)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await story.ask()
    assert caught.value.rule == "routes.chat.timeout.total"
    assert asyncio.get_running_loop().time() == pytest.approx(after, abs=0.01)
    assert len(story.trail.attempts) == 1
    story.assert_given_back()


@virtual_time
async def test_a_pooled_connection_that_died_is_replaced_once_for_free() -> None:
    story = Story((OK, CLOSED, OK))
    await story.ask()
    trail = await story.ask()
    assert [attempt.outcome for attempt in trail.attempts] == ["ok"]
    assert (len(story.transports), story.state()) == (2, State.CLOSED)
    story.assert_given_back()


@virtual_time
async def test_a_fresh_connection_that_dies_is_a_failure() -> None:
    story = Story((OK, CLOSED, CLOSED))
    await story.ask()
    with pytest.raises(errors.UpstreamFailed):
        await story.ask()
    assert len(story.transports) == 2
    story.assert_given_back()


@virtual_time
async def test_connections_are_used_again() -> None:
    story = Story(OK)
    for _ in range(5):
        await story.ask()
    assert len(story.transports) == 1


@virtual_time
async def test_retries_have_a_budget() -> None:
    story = Story(REFUSED, REFUSED, retry=RetryRule(attempts=2, budget=0.0))
    story.route = Route(
        "chat", Match(), story.route.to, retry=story.route.retry, balance=story.route.balance
    )  # no breaker opens
    made = []
    for _ in range(15):
        with pytest.raises(errors.NoBackend):
            await story.ask()
        made.append(len(story.trail.attempts))
    assert made == [2] * 10 + [1] * 5


@virtual_time
async def test_a_stream_that_broke_is_not_tried_again_but_counts() -> None:
    story = Story(HALF, OK, retry=RetryRule(attempts=3, idempotent=True))
    for backend in story.fleet.backends.values():
        story.connects_to(backend, [HALF])
    asking = asyncio.ensure_future(story.ask(call_of(stream=True)))
    await asyncio.sleep(1)
    story.transports[0].lose(ConnectionResetError())
    await asking
    assert [attempt.outcome for attempt in story.trail.attempts] == ["stream_truncated"]
    assert story.client.ended == "cut"
    assert State.OPEN in {story.state("a"), story.state("b")}
    story.assert_given_back()


@virtual_time
async def test_draining_before_the_answer_is_a_refusal() -> None:
    story = Story(SILENT)
    asking = asyncio.ensure_future(story.ask())
    await asyncio.sleep(1)
    for relay in tuple(story.forwarder.relays):
        relay.drain()
    with pytest.raises(errors.Draining):
        await asking
    assert story.state() is State.CLOSED
    story.assert_given_back()


@virtual_time
async def test_a_load_report_reaches_the_balancer() -> None:
    story = Story(
        OK.replace(
            b"content-length",
            b'endpoint-load-metrics: JSON {"named_metrics":{"num_requests_running":9}}\r\ncontent-length',
        )
    )
    await story.ask()
    assert story.fleet.backends["tiny/a"].reported == 8  # less our own, which still counts at that moment


@virtual_time
async def test_a_target_that_nobody_serves_is_passed_over() -> None:
    story = Story(OK)
    story.route = Route("chat", Match(), (Target("huge", weight=99), Target("tiny", weight=1)))
    assert (await story.ask()).service == "tiny"
    story.route = Route("chat", Match(), (Target("huge"),))
    with pytest.raises(errors.NoBackend):
        await story.ask()


# Cancelled wherever it waits: the client has left


@pytest.mark.parametrize(
    "does",
    [
        pytest.param([OK], id="unary"),
        pytest.param([HALF], id="a stream"),
        pytest.param([HANGS], id="connecting"),
        pytest.param([SILENT], id="waiting"),
        pytest.param([BUSY, BUSY, BUSY], id="between retries"),
        pytest.param([(OK, CLOSED, SILENT)], id="after a dead connection"),
    ],
)
@virtual_time
async def test_cancelled_at_any_step_everything_is_given_back(does) -> None:
    for steps in range(25):
        story = Story(*does)
        if isinstance(does[0], tuple):
            await story.ask()
        asking = asyncio.ensure_future(story.ask())
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        story.assert_given_back()
        assert story.state() is State.CLOSED


@virtual_time
async def test_one_who_left_is_recorded_as_such() -> None:
    story = Story(SILENT)
    asking = asyncio.ensure_future(story.ask())
    await asyncio.sleep(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (story.trail.end_reason, story.trail.attempts[0].outcome) == ("client_abort", "client_abort")


@pytest.mark.parametrize(
    ("overdue", "status", "outcome"),
    [
        (Kind.TOTAL, 200, Outcome.IGNORED),  # it was only long
        (Kind.TOTAL, 0, Outcome.FAILURE),
        (Kind.IDLE, 200, Outcome.FAILURE),
    ],
)
def test_a_long_answer_is_no_failure_of_its_backend(overdue, status, outcome) -> None:
    assert outcome_of(Ending("upstream_timeout"), status, overdue) is outcome


def cached(cached_tokens: int) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached_tokens}}
    body = json.dumps({"usage": usage}).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@virtual_time
async def test_a_prompt_goes_where_it_went_before_and_the_answers_correct_what_is_thought_of_it() -> None:
    story = Story(*[cached(90)] * 4)
    story.route = replace(story.route, balance=Balance(BalanceKind.PREFIX))
    prompts = [json.dumps({"model": "tiny", "prompt": letter * 2000}).encode() for letter in "xyzuvw"]
    went = [[(await story.ask(call_of(body=body))).attempts[0].backend for body in prompts] for _ in range(3)]
    assert went[0] == went[1] == went[2]
    index = next(b.prefixes for b in story.fleet.backends.values() if b.prefixes)
    assert repr(index).endswith("of 8192 chunks, at most 8192>")
    for transport in story.transports:
        transport.answers = [cached(0)]
    await story.ask(call_of(body=prompts[0]))
    sizes = [repr(b.prefixes).split()[3] for b in story.fleet.backends.values() if b.prefixes]
    assert sizes.count("7168") == 1  # an eighth less where it was thought to be
    story.assert_given_back()


@pytest.mark.parametrize("kind", [kind for kind in BalanceKind if kind is not BalanceKind.PREFIX])
@virtual_time
async def test_prompts_are_looked_into_for_no_other_balance(kind) -> None:
    story = Story(cached(90), cached(90))
    story.route = replace(story.route, balance=Balance(kind))
    await story.ask(call_of(body=b'{"prompt":"%b"}' % (b"x" * 500)))
    assert [backend.prefixes for backend in story.fleet.backends.values()] == [None, None]
