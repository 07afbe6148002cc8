"""What is heard from where: stories with real sources are in tests/integration/test_road_*.py; this is what they tell."""

import contextlib
from random import Random

import pytest

from discovery import source as heard
from gateway import config as configuration
from gateway.children import CannotRun
from gateway.sources import Sources, translated
from observability import events
from tests.support.running_gateway import OPEN_POLICY


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (heard.Rejected("tiny/1", "not JSON"), events.DiscoveryRejected("tiny/1", "not JSON")),
        (heard.Resynced("lost", 7), events.DiscoveryResynced("lost", 7, "backends")),
        (heard.StateChanged(heard.SyncState.STALE, "gone"), events.DiscoveryState("stale", "gone", "backends")),
        (heard.HealthChanged("tiny", "1", False, "no"), events.BackendHealth("tiny", "1", False, "no")),
    ],
)
def test_discovery_s_events_are_told_as_others_know_them(event, told) -> None:
    seen = []
    translated(seen.append, "backends")(event)
    assert seen == [told]


def sources(home, text: str) -> Sources:
    (home / "policy.yaml").write_text(OPEN_POLICY)
    settings = configuration.parse(text.encode(), {}, base=home)
    return Sources(settings, {}, lambda _: None, lambda: 0.0, Random(0))


async def test_without_etcd_a_gateway_is_the_only_one(tmp_path) -> None:
    there = sources(tmp_path, "policy: policy.yaml\ndiscovery: {static: []}\n")
    async with contextlib.AsyncExitStack() as stack:
        assert (await there.join_gateways(stack, lambda _: None, "me", {}))() == 1


async def test_a_policy_that_is_nowhere_is_told_in_a_line(tmp_path) -> None:
    there = sources(tmp_path, "policy: nowhere.yaml\ndiscovery: {static: []}\n")
    async with contextlib.AsyncExitStack() as stack:
        with pytest.raises(CannotRun, match=r"nowhere\.yaml:1:1 cannot be read: No such file"):
            await there.start_policy(stack, None)


async def test_a_policy_is_loaded_when_it_is_there(tmp_path) -> None:
    there = sources(tmp_path, "policy: policy.yaml\ndiscovery: {static: []}\n")
    async with contextlib.AsyncExitStack() as stack:
        assert (await there.start_policy(stack, None)).policy.anonymous
