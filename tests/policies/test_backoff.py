from random import Random

import pytest

from policies.backoff import Backoff, full_jitter


class Highest(Random):
    """Chance at its worst: every delay is as long as it can be."""

    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("failures", "longest"),
    [(0, 0.1), (1, 0.2), (2, 0.4), (6, 6.4), (7, 10.0), (8, 10.0), (5000, 10.0)],
)
def test_the_ceiling_doubles_up_to_the_cap(failures, longest):
    assert full_jitter(failures, 0.1, 10.0, Highest()) == pytest.approx(longest)


def test_delays_spread_over_the_whole_range():
    rng = Random(1)
    delays = [full_jitter(3, 0.1, 10.0, rng) for _ in range(1000)]

    assert min(delays) < 0.01
    assert max(delays) > 0.79
    assert sum(delays) / len(delays) == pytest.approx(0.4, abs=0.02)


def test_a_backoff_grows_and_starts_again_after_a_success():
    backoff = Backoff(1.0, 3.0, Highest())
    assert repr(backoff) == "<Backoff 0 failures, 1..3 s>"

    assert [backoff.next_delay() for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert repr(backoff) == "<Backoff 4 failures, 1..3 s>"

    backoff.reset()
    assert backoff.next_delay() == 1.0
