"""One call of a client, told what the pipeline tells a client."""

import asyncio
from math import inf
from random import Random

import grpc.aio
import pytest

from gateway.call import GRPC, Call, Ids, accept
from gateway.rpc.client import RpcClient
from gateway.rpc.metadata import lines_of
from gateway.rpc.methods import METHODS, resource_before
from gateway.rpc.statuses import Code
from open_inference import inference_pb2
from policies import errors
from tests.support.call import trail_of
from tests.support.grpc_backend import infer
from tests.support.virtual_clock import virtual_time

BY_NAME = {method.name: method for method in METHODS}
NAME = b"weir-0123456789abcdef"


class Context:
    """What gRPC says of a call: its metadata, and messages one after another."""

    def __init__(self, *messages: bytes, metadata=(), remaining: float | None = None) -> None:
        self.messages = list(messages)
        self.metadata = metadata
        self.remaining = remaining

    def invocation_metadata(self):
        return self.metadata

    def time_remaining(self):
        return self.remaining

    def peer(self):
        return "ipv4:10.0.0.9:1"

    async def read(self):
        if not self.messages:
            return grpc.aio.EOF
        message = self.messages.pop(0)
        if message is None:
            await asyncio.sleep(1000)
        return message


class Story:
    def __init__(self, *messages: bytes, method: str = "ModelInfer", **options) -> None:
        self.client = RpcClient(Context(*messages, **options), BY_NAME[method], carry, NAME, b"https", 100.0)
        self.call = Call(self.client, "POST", b"/v2", GRPC, lines_of(self.client.metadata), b"")
        self.call.resource = resource_before(BY_NAME[method])
        Ids(Random(1)).give(self.call, 0.0)
        self.trail = trail_of(lambda: 100.0)
        self.trail.limit_lines = b"ratelimit: x\r\n"

    def refuse(self, refusal: errors.Refusal) -> dict[str, str]:
        self.client.refuse(refusal, self.trail, "oip", "id", Random(1), close=True, head_only=False)
        return dict(self.client.trailers)


async def carry(*_):
    raise AssertionError


def test_metadata_are_vetted_as_header_lines_are() -> None:
    story = Story(
        metadata=(("x-request-id", "mine"), ("authorization", "Bearer x"), ("x-a-bin", b"\xff"), ("x-team", "blue"))
    )
    accept(story.call)
    assert (story.call.request_id, story.call.head.authorization) == ("mine", b"Bearer x")
    assert story.call.header("x-team") == "blue"
    assert story.client.forwarded_lines == (
        b"via: 1.1 weir-0123456789abcdef\r\nx-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: https\r\n"
    )


@pytest.mark.parametrize(
    ("metadata", "refusal"),
    [
        ((("authorization", "a"), ("authorization", "b")), errors.BadRequest),
        ((("content-encoding", "gzip"),), errors.UnsupportedEncoding),
        ((("via", f"1.1 {NAME.decode()}"),), errors.LoopDetected),
        (tuple((f"x-{number}", "") for number in range(101)), errors.HeaderTooLarge),
    ],
)
def test_metadata_that_are_refused(metadata, refusal) -> None:
    with pytest.raises(refusal):
        accept(Story(metadata=metadata).call)


@pytest.mark.parametrize(("remaining", "due"), [(None, inf), (2.5, 102.5)])
def test_until_when_the_client_waits(remaining, due) -> None:
    assert Story(remaining=remaining).client.due == due


async def test_a_message_says_what_is_asked_for() -> None:
    story = Story(infer("m", "2"))
    await story.client.read(story.call, 1000, 1.0)
    call = story.call
    assert (call.body, call.size, call.is_whole) == (infer("m", "2"), len(infer("m", "2")), True)
    assert (call.resource.model, call.resource.version) == ("m", "2")


@pytest.mark.parametrize(
    ("messages", "refusal"),
    [
        ([], errors.BadRequest),
        ([b"x" * 11], errors.BodyTooLarge),
        ([b"\xff"], errors.BadRequest),
        ([None], errors.ClientTimeout),
    ],
)
@virtual_time
async def test_messages_that_are_refused(messages, refusal) -> None:
    story = Story(*messages)
    with pytest.raises(refusal):
        await story.client.read(story.call, 10, 5.0)


def test_an_answer_of_our_own() -> None:
    story = Story(method="ServerReady")
    size = story.client.answer(story.call, story.trail, 503, {"ready": False})
    assert inference_pb2.ServerReadyResponse.FromString(story.client.response).ready is False
    assert (size, story.client.code) == (len(story.client.response), Code.OK)
    assert list(dict(story.client.trailers)) == ["x-request-id", "x-weir-policy", "ratelimit", "server-timing"]


def test_a_refusal_is_a_status_and_its_trailers() -> None:
    story = Story()
    told = story.refuse(errors.RateLimited("Too much.", rule="plans.free.requests", retry_after=3.0))
    assert (story.client.code, story.client.message) == (Code.RESOURCE_EXHAUSTED, "Too much.")
    assert (told["x-request-id"], told["x-weir-policy"], told["ratelimit"]) == ("id", "p1", "x")
    assert (told["x-weir-code"], told["x-weir-rule"]) == ("rate_limited", "plans.free.requests")
    assert 3000 <= int(told["grpc-retry-pushback-ms"]) <= 3750
    assert int(told["retry-after"]) in (3, 4)


@pytest.mark.parametrize(
    ("refusal", "pushback"),
    [
        (errors.BadRequest("No."), None),
        (errors.UpstreamFailed("No."), None),
        (errors.RateLimited("No.", retry_after=500.0), "-1"),  # nobody waits so long: do not come back by yourself
    ],
)
def test_when_a_client_may_come_back(refusal, pushback) -> None:
    assert Story().refuse(refusal).get("grpc-retry-pushback-ms") == pushback


def test_what_breaks_in_the_gateway_is_told_unless_something_was_told_before() -> None:
    story = Story()
    story.client.abort()
    assert story.client.code is Code.INTERNAL
    story.refuse(errors.Draining("Later."))
    story.client.abort()
    assert story.client.code is Code.UNAVAILABLE
