"""The pipeline behind the real data listener's protocol, on transports in memory and in virtual time."""

import asyncio
import json
from dataclasses import replace
from random import Random

import pytest

from gateway.admission import Admission
from gateway.attempts import Forwarder
from gateway.call import Ids
from gateway.identify import Entry
from gateway.local_answers import LocalAnswers
from gateway.pipeline import InForce, Pipeline, Settings
from gateway.server import DataServer
from gateway.upstream.fleet import Fleet
from policies import errors
from policies.policy import (
    Allow,
    Balance,
    BalanceKind,
    BreakerRule,
    Match,
    Plan,
    Policy,
    Principal,
    Rate,
    RetryRule,
    Route,
    Target,
)
from tests.support.raw_client import CHAT, chat_request
from tests.support.upstream import CLOSED, HANGS, REFUSED, SILENT, MemoryTransport, endpoint, script
from tests.support.virtual_clock import virtual_time

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 X\r\ncontent-length: 0\r\n\r\n"
FULL = b"HTTP/1.1 503 X\r\nx-backend-not-started: true\r\ncontent-length: 0\r\n\r\n"
BAD = b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"
ROUTES = (
    Route("team", Match(headers=(("x-team", "blue"),)), (Target("tiny"),), allow=Allow(groups=frozenset({"blue"}))),
    Route("chat", Match(), (Target("tiny"),), retry=RetryRule(attempts=2)),
)
FREE = Plan("free", concurrency=2)


class Caller:
    """An identifier that knows one caller; it waits where `slowly`, and raises what it is told to."""

    def __init__(self, plan: Plan, slowly: bool) -> None:
        self.entry = Entry(Principal("alice"), plan, float("inf"), 0)
        self.slowly = slowly
        self.failure = None

    def still_holds(self, entry, wall):
        return not (self.slowly or self.failure)

    def identify_nowait(self, authorization, wall):
        return None if self.slowly or self.failure else self.entry

    async def identify(self, authorization, wall):
        await asyncio.sleep(0)
        if self.failure:
            raise self.failure
        return self.entry


class Story:
    def __init__(self, *does, plan: Plan = FREE, slowly: bool = False) -> None:
        loop = asyncio.get_running_loop()
        clock = lambda: 1000.0 + loop.time()  # noqa: E731
        self.fleet = Fleet(clock, Random(1), lambda backend, state: None)
        self.fleet.replace({f"tiny/{name}": endpoint(f"tiny/{name}") for name, _ in zip("abc", does, strict=False)})
        self.upstreams = []
        for backend, answer in zip(self.fleet.backends.values(), does, strict=True):
            script(backend, [answer], self.upstreams)
        admission = Admission(None, lambda: 1, clock)
        self.account = admission.account(plan, "alice")
        self.caller = Caller(plan, slowly)
        self.events = []
        ids = Ids(Random(1))
        self.forwarder = Forwarder(self.fleet, clock, Random(1), ids)
        self.pipeline = Pipeline(
            Settings(body_bytes=1000, body_timeout=60.0, sample=0.0),
            self.caller,
            admission,
            self.fleet,
            self.forwarder,
            LocalAnswers(self.fleet, lambda: True, "1.2.3"),
            self.events.append,
            clock,
            lambda: 1_700_000_000.0,
            Random(1),
            ids,
        )
        self.pipeline.in_force = InForce.of(Policy("v1", routes=ROUTES))
        server = DataServer(
            self.pipeline.handle, self.pipeline.reject, idle=75.0, head_timeout=10.0, header_bytes=8192, connections=10
        )
        self.client = server()
        self.transport = MemoryTransport(self.client)

    def send(self, data: bytes) -> None:
        self.client.data_received(data)

    async def ask(self, request: bytes | None = None) -> bytes:
        """The answer: what is written until nothing more is."""
        before = len(self.transport.written)
        self.send(chat_request() if request is None else request)
        await asyncio.sleep(1)
        return self.transport.written[before:]

    def assert_given_back(self) -> None:
        assert [backend.inflight for backend in self.fleet.backends.values()] == [0] * len(self.fleet.backends)
        assert (self.account.in_flight, self.pipeline.inflight, self.forwarder.relays) == (0, 0, set())
        assert self.client.relay is None


def header(answer: bytes, name: str) -> str:
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return dict(line.split(": ", 1) for line in lines[1:])[name]


def document(answer: bytes):
    return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("slowly", [False, True])
@virtual_time
async def test_a_request_that_goes_well_is_told_once_with_all_its_names(slowly) -> None:
    story = Story(OK, slowly=slowly)
    answer = await story.ask(chat_request(None, "x-request-id: mine"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    (event,) = story.events
    assert (event.request_id, event.consumer, event.plan, event.policy) == ("mine", "alice", "free", "v1")
    assert (event.route, event.service, event.model, event.path) == ("chat", "tiny", "tiny", "/v1/chat/completions")
    assert (event.status, event.end_reason, event.code) == (200, "ok", "")
    assert (event.bytes_in, event.bytes_out, len(event.attempts)) == (len(json.dumps(CHAT)), len(answer), 1)
    assert header(answer, "x-weir-policy") == "v1"
    story.assert_given_back()


@pytest.mark.parametrize(
    ("request_bytes", "status", "code", "end_reason", "keeps"),
    [
        (b"POST /x HTTP/1.1\r\nhost: a\r\nconnection: host\r\n\r\n", 400, "bad_request", "parse_error", False),
        (b"TRACE /x HTTP/1.1\r\nhost: a\r\n\r\n", 405, "bad_request", "parse_error", False),
        (b"GET //x HTTP/1.1\r\nhost: a\r\n\r\n", 404, "no_route", "policy", True),
        (chat_request({"messages": []}), 400, "bad_request", "parse_error", True),
        (chat_request({"model": "huge"}), 404, "model_not_found", "policy", True),
        (chat_request(None, "x-team: blue"), 403, "forbidden", "policy", True),
        (chat_request({"model": "tiny", "x": "y" * 1000}), 413, "too_large", "parse_error", True),
    ],
)
@virtual_time
async def test_refusals(request_bytes, status, code, end_reason, keeps) -> None:
    story = Story(OK)
    answer = await story.ask(request_bytes)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    error, (event,) = document(answer)["error"], story.events
    assert (error["code"], error["request_id"]) == (code, header(answer, "x-request-id"))
    assert (event.status, event.code, event.end_reason, event.request_id) == (
        status,
        code,
        end_reason,
        error["request_id"],
    )
    assert (story.transport.closed == "") is keeps
    assert (b"\r\nconnection: close\r\n" in answer) is not keeps
    assert story.upstreams == []
    story.assert_given_back()


@pytest.mark.parametrize(
    ("failure", "status", "end_reason"),
    [
        (errors.Unauthenticated("No.", check="token.a bug"), 401, "auth"),
        (errors.KeysUnavailable("Later."), 503, "auth"),
        (RuntimeError("a bug"), 500, "internal"),
    ],
)
@virtual_time
async def test_who_cannot_be_identified(failure, status, end_reason) -> None:
    story = Story(OK)
    story.caller.failure = failure
    answer = await story.ask()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"a bug" not in answer
    assert (story.events[0].status, story.events[0].end_reason, story.events[0].consumer) == (status, end_reason, "")
    assert story.events[0].rule == getattr(failure, "check", "")  # for the log; the client is not told
    story.caller.failure = None
    assert (await story.ask()).startswith(b"HTTP/1.1 200")  # the next one is served
    story.assert_given_back()


@pytest.mark.parametrize(
    ("does", "status", "code", "end_reason"),
    [
        ([BAD], 502, "upstream_failed", "upstream_error"),
        ([BUSY, BUSY], 429, "queue_full", "shed"),
        ([SILENT], 504, "upstream_timeout", "upstream_timeout"),
        ([HANGS], 503, "no_backend", "connect_fail"),
        ([CLOSED], 502, "upstream_failed", "upstream_reset"),
        ([], 503, "no_backend", "no_backend"),
    ],
)
@virtual_time
async def test_backends_that_fail(does, status, code, end_reason) -> None:
    story = Story(*does)
    story.send(chat_request())
    await asyncio.sleep(40)
    answer = story.transport.written
    assert (int(answer[9:12]), document(answer)["error"]["code"]) == (status, code)
    (event,) = story.events
    assert (event.status, event.code, event.end_reason) == (status, code, end_reason)
    assert b"connection: close" not in answer
    story.assert_given_back()


@virtual_time
async def test_limits_are_told_and_hold() -> None:
    story = Story(OK, plan=Plan("free", requests=Rate(2, 3600.0), burst=2))
    answers = [await story.ask() for _ in range(3)]
    assert [int(answer[9:12]) for answer in answers] == [200, 200, 429]
    assert "ratelimit" in answers[0].decode()
    assert story.events[-1].end_reason == "rate_limited"
    assert len(story.upstreams[0].written.split(b"POST /v1")) == 3


USED = b'{"usage":{"prompt_tokens":7,"completion_tokens":30}}'
USES = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(USED), USED)
WRONG = b"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
TOKENS = Plan("free", requests=Rate(5, 1e9), burst=5, tokens=Rate(100, 1e9), token_burst=100)
ASKS_60 = chat_request({"model": "tiny", "max_tokens": 51})  # in a body of 36 bytes


def tokens_left(story: Story) -> int:
    return round(story.account.tokens.meter.remaining(1000.0 + asyncio.get_running_loop().time()))


@virtual_time
async def test_tokens_are_told_and_hold() -> None:
    story = Story(USES, plan=TOKENS)
    answers = [await story.ask(ASKS_60) for _ in range(3)]
    assert [int(answer[9:12]) for answer in answers] == [200, 200, 429]
    assert [header(answer, "x-ratelimit-remaining-tokens") for answer in answers] == ["40", "3", "26"]
    error = document(answers[2])["error"]
    assert (error["code"], error["rule"]) == ("rate_limited", "plans.free.tokens")
    assert error["retry_after"] == pytest.approx(34 * 1e7, rel=1e-6)
    assert header(answers[2], "x-ratelimit-remaining-requests") == "3"  # it got that one back
    assert [event.rule for event in story.events] == ["", "", "plans.free.tokens"]
    assert len(story.upstreams[0].written.split(b"POST /v1")) == 3


@virtual_time
async def test_more_tokens_than_the_plan_ever_gives_are_refused_for_good() -> None:
    story = Story(USES, plan=TOKENS)
    answer = await story.ask(chat_request({"model": "tiny", "max_tokens": 1000}))
    error = document(answer)["error"]
    assert (answer[9:12], error["code"], error["rule"]) == (b"413", "too_large", "plans.free.tokens")
    assert b"retry-after" not in answer
    assert b"connection: close" not in answer
    assert story.events[0].end_reason == "policy"
    assert (await story.ask(ASKS_60))[9:12] == b"200"


@pytest.mark.parametrize(
    ("does", "used"),
    [
        ([USES], 37),
        ([OK], 60),
        ([WRONG], 0),
        ([BAD], 0),
        ([BUSY, USES], 37),
        ([BUSY, BUSY], 0),
        ([REFUSED, REFUSED], 0),
        ([SILENT], 0),
        ([], 0),
    ],
    ids=["used", "not told", "400", "500", "retried", "busy", "nobody there", "timeout", "no backend"],
)
@virtual_time
async def test_tokens_are_settled_once_with_what_was_used(does, used) -> None:
    story = Story(*does, plan=TOKENS)
    await story.ask(ASKS_60)
    await asyncio.sleep(40)
    assert tokens_left(story) == 100 - used
    story.assert_given_back()


@virtual_time
async def test_a_stream_whose_client_leaves_is_settled_with_what_was_delivered() -> None:
    stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    story = Story(stream + b"9\r\ndata: a\n\n\r\n" * 12, plan=TOKENS)
    story.send(ASKS_60)
    await asyncio.sleep(1)
    assert story.transport.written.count(b"data: a") == 12
    assert tokens_left(story) == 40
    story.transport.lose()
    await asyncio.sleep(1)
    assert tokens_left(story) == 100 - 9 - 12
    story.assert_given_back()


@virtual_time
async def test_places_are_held_to_the_end_of_the_answer() -> None:
    story = Story(SILENT, plan=Plan("free", concurrency=1))
    story.send(chat_request())
    await asyncio.sleep(1)
    assert (story.account.in_flight, story.pipeline.inflight) == (1, 1)
    with pytest.raises(errors.ConcurrencyExceeded), story.account:
        pass
    await asyncio.sleep(40)
    story.assert_given_back()


@virtual_time
async def test_an_observer_hears_of_a_bug_after_the_answer_began_as_a_cut() -> None:
    story = Story(OK)

    async def half(call, trail, route, consumer) -> None:
        call.connection.write(b"HTTP/1.1 200 OK\r\n")
        trail.bytes_out = 17
        raise RuntimeError

    story.forwarder.forward = half
    assert await story.ask() == b"HTTP/1.1 200 OK\r\n"
    assert story.transport.closed == "abort"
    assert [event.end_reason for event in story.events] == ["internal"]


@virtual_time
async def test_what_never_became_a_request_is_told_under_the_id_that_the_client_got() -> None:
    story = Story(OK)
    answer = await story.ask(b"junk\r\n\r\n")
    assert story.events[0].request_id == header(answer, "x-request-id") == document(answer)["error"]["request_id"]
    assert (story.events[0].status, story.events[0].end_reason) == (400, "parse_error")


@virtual_time
async def test_a_refused_head_request_has_no_body() -> None:
    answer = await Story(OK).ask(b"HEAD //x HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert int(header(answer, "content-length")) > 0


@virtual_time
async def test_a_draining_gateway_serves_what_comes_and_closes() -> None:
    story = Story(OK)
    story.pipeline.draining = True
    answer = await story.ask()
    assert b"HTTP/1.1 200 OK" in answer
    assert b"\r\nconnection: close\r\n" in answer
    assert story.transport.closed == "close"


@virtual_time
async def test_a_gateway_short_of_memory_serves_and_keeps_no_connection() -> None:
    story = Story(OK)
    story.pipeline.keeps_connections = False
    answer = await story.ask()
    assert answer.startswith(b"HTTP/1.1 200")
    assert header(answer, "connection") == "close"
    assert story.transport.is_closing()


@virtual_time
async def test_a_gateway_with_too_much_to_do_serves_health_and_what_is_under_way_and_nothing_new() -> None:
    story = Story(OK)
    story.pipeline.takes_requests = False
    refused = await story.ask()
    assert refused.startswith(b"HTTP/1.1 503")
    assert document(refused)["error"]["code"] == "overloaded"
    assert header(refused, "retry-after") in ("2", "3")
    assert story.events[-1].end_reason == "shed"
    assert story.upstreams == []
    assert (await story.ask(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 200")
    story.pipeline.takes_requests = True
    assert (await story.ask()).startswith(b"HTTP/1.1 200")
    story.assert_given_back()


@virtual_time
async def test_a_request_ends_under_the_policy_it_began_with() -> None:
    story = Story(OK)
    request = chat_request()
    story.send(request[:-5])
    await asyncio.sleep(1)
    story.pipeline.in_force = InForce.of(Policy("v2"))  # where no route is left
    answer = await story.ask(request[-5:])
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert header(answer, "x-weir-policy") == story.events[0].policy == "v1"
    assert (await story.ask()).startswith(b"HTTP/1.1 404")


@virtual_time
async def test_health_asks_for_no_token() -> None:
    story = Story(OK)
    story.caller.failure = errors.Unauthenticated("No.")
    assert (await story.ask(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert (story.events[0].route, story.events[0].end_reason) == ("gateway", "ok")


@virtual_time
async def test_models_are_for_callers() -> None:
    story = Story(OK)
    assert document(await story.ask(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"))["data"][0]["id"] == "tiny"
    story.caller.failure = errors.Unauthenticated("No.")
    assert (await story.ask(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 401")


@virtual_time
async def test_a_body_that_does_not_come_is_not_charged() -> None:
    story = Story(OK, plan=Plan("free", requests=Rate(1, 3600.0), burst=1))
    story.send(chat_request()[:-5])
    await asyncio.sleep(61)
    assert story.transport.written.startswith(b"HTTP/1.1 408 ")
    assert story.account.take_nowait(1000.0 + asyncio.get_running_loop().time()) == 0.0
    story.assert_given_back()


@pytest.mark.parametrize(
    ("does", "code", "charged"),
    [
        ([], "no_backend", False),
        ([REFUSED], "no_backend", False),
        ([HANGS], "no_backend", False),
        ([BUSY, BUSY], "queue_full", False),
        ([FULL], "overloaded", False),
        ([BAD], "upstream_failed", True),
        ([CLOSED], "upstream_failed", True),
        ([SILENT], "upstream_timeout", True),
    ],
)
@virtual_time
async def test_a_request_is_not_charged_where_no_backend_had_work_with_it(does, code, charged) -> None:
    story = Story(*does, plan=Plan("free", requests=Rate(1, 3600.0), burst=1))
    story.send(chat_request())
    await asyncio.sleep(40)
    assert document(story.transport.written)["error"]["code"] == code
    assert (story.account.take_nowait(1000.0 + asyncio.get_running_loop().time()) > 0.0) is charged
    story.assert_given_back()


@virtual_time
async def test_a_request_that_an_open_breaker_stopped_is_not_charged() -> None:
    breaker = BreakerRule(of_at_least=1, eject_at_most=1.0)
    story = Story(BAD, plan=Plan("free", requests=Rate(2, 3600.0), burst=2))
    story.pipeline.in_force = InForce.of(Policy("v1", routes=(replace(ROUTES[1], breaker=breaker),)))
    codes = [document(await story.ask())["error"]["code"] for _ in range(3)]
    assert codes == ["upstream_failed", "circuit_open", "circuit_open"]
    assert story.account.take_nowait(1000.0 + asyncio.get_running_loop().time()) == 0.0


@virtual_time
async def test_a_request_that_one_backend_had_work_with_is_charged_whatever_the_next_says() -> None:
    story = Story(BAD, REFUSED, plan=Plan("free", requests=Rate(1, 3600.0), burst=1))
    route = replace(ROUTES[1], retry=RetryRule(attempts=2, idempotent=True), balance=Balance(BalanceKind.ROUND_ROBIN))
    story.pipeline.in_force = InForce.of(Policy("v1", routes=(route,)))
    while not story.events or story.events[-1].attempts[0].outcome != "upstream_error":
        story.account.refund()
        answer = await story.ask()
    assert document(answer)["error"]["code"] == "no_backend"
    assert story.account.take_nowait(1000.0 + asyncio.get_running_loop().time()) > 0.0


# Clients that leave


@pytest.mark.parametrize(
    "does", [[OK], [SILENT], [HANGS], [BUSY, BUSY]], ids=["answered", "waiting", "connecting", "retrying"]
)
@pytest.mark.parametrize("slowly", [False, True])
@virtual_time
async def test_when_the_client_leaves_at_any_step_everything_is_given_back(does, slowly) -> None:
    for steps in range(30):
        story = Story(*does, slowly=slowly)
        request = chat_request()
        story.send(request[:-5])
        for _ in range(steps):
            await asyncio.sleep(0)
            if story.account.in_flight:
                break
        story.send(request[-5:])
        for _ in range(steps):
            await asyncio.sleep(0)
        story.transport.lose()
        await asyncio.sleep(0.001)
        story.assert_given_back()
        assert len(story.events) <= 1
        assert all(event.end_reason in ("ok", "client_abort", "shed") for event in story.events)


@virtual_time
async def test_one_who_leaves_between_two_attempts_is_recorded_as_such() -> None:
    story = Story(BUSY, BUSY)
    story.send(chat_request())
    while not any(written.written for written in story.upstreams):
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(story.upstreams) == 1  # the second attempt is not begun
    story.transport.lose()
    await asyncio.sleep(1)
    assert [(event.status, event.end_reason) for event in story.events] == [(499, "client_abort")]
