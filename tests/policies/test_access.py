import pytest

from policies import errors
from policies.access import check, visible_models
from policies.cross_check import glob
from policies.policy import ANONYMOUS, Allow, Match, Principal, Route, Target

ALICE = Principal("alice", frozenset({"research", "staff"}), frozenset({"chat"}), "https://idp.example.com")
CI = Principal("ci", issuer="https://idp.example.com")


EVERYBODY = Allow()
TINY = (Target("tiny"),)


def route(allow=EVERYBODY, model=None, to=TINY, path=None, headers=()):
    return Route("chat", Match(path and glob(path), model and glob(model), headers), to, allow)


def allow(groups=(), consumers=(), scopes=(), models=()):
    return Allow(frozenset(groups), frozenset(consumers), frozenset(scopes), tuple(glob(model) for model in models))


@pytest.mark.parametrize(
    ("allowed", "principal", "model"),
    [
        (allow(), ALICE, "tiny"),
        (allow(), CI, None),
        (allow(), ANONYMOUS, "tiny"),
        (allow(groups=["research"]), ALICE, "tiny"),
        (allow(groups=["sales", "staff"]), ALICE, None),
        (allow(consumers=["ci"]), CI, "tiny"),
        (allow(consumers=["anonymous"]), ANONYMOUS, "tiny"),
        (allow(scopes=["chat"]), ALICE, "tiny"),
        (allow(groups=["research"], consumers=["ci"]), CI, "tiny"),
        (allow(models=["tiny*"]), CI, "tiny-2"),
        (allow(models=["big", "tiny"]), ANONYMOUS, "tiny"),
        (allow(groups=["research"], models=["tiny"]), ALICE, "tiny"),
    ],
)
def test_these_may(allowed, principal, model):
    check(route(allowed), principal, model)


@pytest.mark.parametrize(
    ("allowed", "principal", "model", "error"),
    [
        (allow(groups=["research"]), CI, "tiny", errors.Forbidden),
        (allow(consumers=["research"]), ALICE, "tiny", errors.Forbidden),
        (allow(scopes=["embed"]), ALICE, "tiny", errors.Forbidden),
        (allow(groups=["Research"]), ALICE, "tiny", errors.Forbidden),
        (allow(models=["tiny"]), ALICE, "tiny-2", errors.Forbidden),
        (allow(models=["tiny"]), ALICE, None, errors.Forbidden),
        (allow(groups=["research"], models=["tiny"]), ALICE, "big", errors.Forbidden),
        (allow(groups=["research"], models=["tiny"]), CI, "tiny", errors.Forbidden),
        (allow(groups=["research"]), ANONYMOUS, "tiny", errors.Unauthenticated),
        (allow(groups=["research"], models=["big"]), ANONYMOUS, "tiny", errors.Unauthenticated),
        (allow(consumers=["ci"]), Principal("anonymous", issuer="https://idp.example.com"), "tiny", errors.Forbidden),
        (allow(models=["tiny"]), ANONYMOUS, "big", errors.Forbidden),
    ],
)
def test_these_may_not(allowed, principal, model, error):
    with pytest.raises(error) as caught:
        check(route(allowed), principal, model)

    assert type(caught.value) is error
    assert caught.value.rule == "routes.chat.allow"


OFFERED = [
    ("tiny", "tiny", "1"),
    ("tiny", "tiny", "2"),
    ("tiny", "tiny-2", "1"),
    ("large", "big", ""),
    ("large", "tiny", ""),
]


@pytest.mark.parametrize(
    ("routes", "names"),
    [
        ([], []),
        ([route()], ["tiny", "tiny-2"]),
        ([route(to=(Target("large"), Target("tiny")))], ["big", "tiny", "tiny-2"]),
        ([route(to=(Target("tiny", "2"),))], ["tiny"]),
        ([route(to=(Target("tiny", "3"),))], []),
        ([route(to=(Target("gone"),))], []),
        ([route(model="tiny-*")], ["tiny-2"]),
        ([route(model="big", to=(Target("large"),)), route(model="tiny")], ["big", "tiny"]),
        ([route(allow(groups=["research"]))], ["tiny", "tiny-2"]),
        ([route(allow(consumers=["ci"]))], []),
        ([route(allow(models=["*-2"]))], ["tiny-2"]),
        ([route(allow(scopes=["chat"]), model="tiny"), route(allow(consumers=["ci"]))], ["tiny"]),
        # The first route that matches decides, as it does for a request
        ([route(allow(consumers=["ci"])), route(allow(scopes=["chat"]), model="tiny")], []),
        ([route(allow(consumers=["ci"]), model="tiny"), route()], ["tiny-2"]),
        ([route(model="tiny", to=(Target("gone"),)), route()], ["tiny-2"]),
        ([route(allow(consumers=["ci"]), path="/v1/*"), route(path="/pages/*")], []),
        # ... on that path, and with those headers
        ([route(allow(consumers=["ci"]), path="/v1/embeddings"), route()], ["tiny", "tiny-2"]),
        ([route(allow(consumers=["ci"]), headers=(("x-team", "red"),)), route()], ["tiny", "tiny-2"]),
        ([route(headers=(("x-team", "red"),)), route(allow(consumers=["ci"]))], ["tiny", "tiny-2"]),
        ([route(path="/v2/*")], ["tiny", "tiny-2"]),
    ],
)
def test_visible_is_what_this_caller_would_be_served(routes, names):
    assert visible_models(routes, ALICE, OFFERED) == names
