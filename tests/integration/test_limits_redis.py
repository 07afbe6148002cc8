from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.store import SCRIPT, script_arguments
from policies.lease import Ask, Limit
from policies.policy import Rate
from tests.support.lease_ledger import MICRO, Ledger
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.integration

KEYS = itertools.count()
EPOCH = 1_800_000_000 * MICRO


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


SCRIPT_ON_A_GIVEN_CLOCK = SCRIPT.replace("redis.call('TIME')", "{ARGV[14], ARGV[15]}")


class TestScript:
    """The script in Redis and its model in Python give the same answers to the same questions at the same times."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        limit=st.sampled_from([Limit(1, Rate(1, 1.0)), Limit(10, Rate(60, 60.0)), Limit(100, Rate(333.3, 1.0))]),
        questions=st.lists(
            st.fixed_dictionaries(
                {
                    "later": st.sampled_from([-3_600_000_000, 0, 7, 1_000, 90_000, 450_000, 600_000, 20_000_000]),
                    "replica": st.sampled_from("ab"),
                    "unseen": st.booleans(),
                    "stray": st.sampled_from([False, False, False, True]),
                    "need": st.integers(0, 12),
                    "spare": st.integers(0, 5),
                    "held": st.integers(0, 5),
                    "back": st.sampled_from([0, 0, 1, 5]),
                    "debt": st.sampled_from([0, 0, 3]),
                    "quiet": st.sampled_from([0.0, 0.002, 0.3, 5.0]),
                }
            ),
            min_size=1,
            max_size=25,
        ),
    )
    def test_is_what_the_model_says(self, redis, limit: Limit, questions: list[dict[str, object]]):
        ledger, now, number = Ledger(), EPOCH, 10
        key = b"script:%d" % next(KEYS)
        seen = {"a": 0, "b": 0}
        for question in questions:
            now += question.pop("later")
            replica, stray, unseen = (question.pop(name) for name in ("replica", "stray", "unseen"))
            ask = Ask(**question, ack=seen[replica], sent_at=0.0)
            number += 1
            this = number - 5 if stray else number
            expected = ledger.lease(key, limit, replica, this, ask, now)
            arguments = script_arguments(key, replica, this, limit, ask)
            reply = redis.command("EVAL", SCRIPT_ON_A_GIVEN_CLOCK, *arguments, now // MICRO, now % MICRO)
            assert [int(part) for part in reply] == [
                this, expected.tokens, round(expected.level * MICRO), round(expected.wait * MICRO)
            ]  # fmt: skip
            if not unseen:
                seen[replica] = max(this, seen[replica])
