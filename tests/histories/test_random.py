"""Random operations against everything at once, and then: could a gateway that keeps its promises have made this?

Two gateways as processes, real etcd and Redis, four backends that serve, fail and dawdle, ten clients of which two leave
before they are answered. The seed chooses the order of what is done (world.py). Scale: one round and one seed each in CI,
a dozen operations and some 1,000 requests; more with WEIR_HISTORY_ROUNDS=5 and WEIR_HISTORY_SEEDS=1,2,3.
"""

import os

import pytest

from tests.histories.judge import judge
from tests.histories.world import World

pytestmark = pytest.mark.integration

SEEDS = [int(seed) for seed in os.environ.get("WEIR_HISTORY_SEEDS", "1").split(",")]
ROUNDS = int(os.environ.get("WEIR_HISTORY_ROUNDS", "1"))

ETCD = {
    "register": 4, "withdraw": 3, "flap": 1, "lapse": 1, "sicken": 2, "slow_down": 1, "restart_etcd": 1, "freeze_etcd": 1,
}  # fmt: skip
REDIS = {
    "register": 3, "withdraw": 2, "sicken": 2, "slow_down": 1, "restart_redis": 1, "freeze_redis": 2, "flush_redis": 1,
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
async def test_while_etcd_and_backends_break(tmp_path, seed) -> None:
    async with World(tmp_path, seed=seed) as world:
        for _ in range(ROUNDS):
            await world.play(**ETCD)
        history = await world.end()
    assert judge(history, charges=0) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
async def test_while_redis_breaks_too(tmp_path, seed) -> None:
    async with World(tmp_path, seed=seed) as world:
        for _ in range(ROUNDS):
            await world.play(**REDIS)
        history = await world.end()
    assert judge(history, charges=None) == []
