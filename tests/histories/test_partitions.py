"""Two gateways on machines of their own, cut off from etcd, from Redis and from each other, in turn.

The machines are network namespaces (tests/support/namespaces.py), which take root: without it this is skipped, and the
random histories of test_random.py are what there is.
"""

import contextlib

import pytest

from tests.histories.judge import judge
from tests.histories.world import World
from tests.support.namespaces import Hub, NotPermittedError

pytestmark = pytest.mark.integration

CUT_SECONDS = 2.5
STORE_SECONDS = 0.3  # that a request waits for Redis, for 0.025
LOST_ANSWERS = 60
"""Tokens that may be lacking for nothing. An answer of Redis that is lost with the line costs what it granted, or takes a
debt twice: a second's requests of two clients, at most, for each of the two cuts."""


@pytest.fixture
def hub():
    with contextlib.ExitStack() as stack:
        try:
            hub = stack.enter_context(Hub())
        except NotPermittedError as why:
            pytest.skip(f"no network namespaces here: {why}")
        yield hub


@pytest.mark.timeout(300)
async def test_gateways_that_are_cut_off(tmp_path, hub) -> None:
    nodes = [hub.node(name, "etcd", "redis", "data") for name in ("g1", "g2")]
    hub.join(*nodes, "peer")
    async with World(tmp_path, seed=1, nodes=nodes, here=hub.everywhere, store_seconds=STORE_SECONDS) as world:
        await world.play(register=1, sicken=2)
        for line, seconds in (("etcd", CUT_SECONDS), ("redis", CUT_SECONDS), ("peer", 0.5)):
            for gateway in ("g1", "g2"):
                await world.cut(gateway, line, seconds)
                await world.play(register=1, withdraw=1)
        history = await world.end()
    assert history.noticed >= {(gateway, line) for gateway in ("g1", "g2") for line in ("etcd", "redis")}
    assert judge(history, charges=LOST_ANSWERS) == []
