import json
import re
from random import Random

import pytest

from discovery.endpoint import Model
from gateway.local_answers import LocalAnswers
from gateway.pipeline import InForce
from gateway.upstream.fleet import Fleet
from policies import errors
from policies.policy import ANONYMOUS, Allow, Match, Policy, Principal, Route, Target
from tests.support.call import MemoryClient, call_of, trail_of
from tests.support.upstream import endpoint

POLICY = Policy(
    "p1",
    routes=(
        Route("team", Match(model=re.compile("org/.*")), (Target("big"),), allow=Allow(groups=frozenset({"team"}))),
        Route("all", Match(), (Target("tiny"),)),
    ),
)


class Story:
    def __init__(self, ready: bool = True) -> None:
        fleet = Fleet(lambda: 0.0, Random(1), lambda backend, state: None)
        shown = (
            endpoint("tiny/a"),
            endpoint("big/b", models=(Model("org/huge"),)),
            endpoint("tiny/c", models=(Model("old"),), draining=True),
        )
        fleet.replace({one.key: one for one in shown})
        self.local = LocalAnswers(fleet, lambda: ready, "1.2.3")
        self.client = MemoryClient()
        self.trail = trail_of(lambda: 0.0)
        self.trail.limit_lines = b"ratelimit: x\r\n"

    def ask(self, path: str, principal: Principal | None = None, method: str = "GET", **options):
        call = call_of(path, method=method, client=self.client, **options)
        if self.local.answers_anybody(call):
            self.local.answer(call, self.trail)
        else:
            assert self.local.answers_caller(call)
            self.local.answer_caller(call, self.trail, InForce.of(POLICY), principal or ANONYMOUS)
        return json.loads(self.client.body) if self.client.body else None


@pytest.mark.parametrize(
    ("path", "ready", "status", "answer"),
    [
        ("/healthz", True, 200, {"live": True}),
        ("/healthz?x=1", False, 200, {"live": True}),
        ("/v2/health/live", False, 200, {"live": True}),
        ("/v2/health/ready", True, 200, {"ready": True}),
        ("/v2/health/ready", False, 503, {"ready": False}),
        ("/v2", True, 200, {"name": "weir", "version": "1.2.3", "extensions": []}),
    ],
)
def test_health(path, ready, status, answer) -> None:
    story = Story(ready)
    assert story.ask(path) == answer
    assert (story.client.status, story.trail.status, story.trail.end_reason) == (status, status, "ok")
    assert story.trail.bytes_out == len(story.client.written)


@pytest.mark.parametrize(
    ("method", "path", "anybody", "caller"),
    [
        ("GET", "/healthz", True, False),
        ("HEAD", "/healthz", True, False),
        ("POST", "/healthz", False, False),
        ("GET", "/v1/models", False, True),
        ("GET", "/v1/models/tiny", False, True),
        ("DELETE", "/v1/models/tiny", False, False),
        ("GET", "/v1/modelsx", False, False),
        ("GET", "/metrics", False, False),
        ("GET", "/readyz", False, False),
        ("GET", "/api/backends", False, False),
    ],
)
def test_what_is_answered_here(method, path, anybody, caller) -> None:
    local, call = Story().local, call_of(path, method=method)
    assert (local.answers_anybody(call), local.answers_caller(call)) == (anybody, caller)


@pytest.mark.parametrize(
    ("principal", "models"),
    [(ANONYMOUS, ["tiny"]), (Principal("alice", frozenset({"team"})), ["org/huge", "tiny"])],
)
def test_each_caller_sees_the_models_it_may_use(principal, models) -> None:
    document = Story().ask("/v1/models", principal)
    assert [model["id"] for model in document["data"]] == models
    assert document["data"][0] | {"id": ""} == {"id": "", "object": "model", "created": 0, "owned_by": "weir"}


def test_one_model() -> None:
    assert Story().ask("/v1/models/org/huge", Principal("alice", frozenset({"team"})))["id"] == "org/huge"


@pytest.mark.parametrize("name", ["org/huge", "none", "old"])
def test_a_model_for_others_is_not_told_from_one_that_is_not_there(name) -> None:
    with pytest.raises(errors.ModelNotFound, match="no such model, or it is not for this caller"):
        Story().ask(f"/v1/models/{name}")


def test_every_answer_has_the_headers_that_are_promised() -> None:
    story = Story()
    story.ask("/v1/models", version="1.0")
    for line in (b"x-request-id: ", b"x-weir-policy: p1", b"ratelimit: x", b"server-timing: ", b"connection: close"):
        assert line in story.client.head


def test_head_has_no_body() -> None:
    story = Story()
    assert story.ask("/healthz", method="HEAD") is None
    assert b"content-length: 13" in story.client.head
