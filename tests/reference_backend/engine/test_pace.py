"""What steps cost, and how much the next one may read."""

import pytest

from reference_backend.engine.pace import LEAST, Pace


def test_nothing_is_known_at_first():
    pace = Pace(0.1)
    pace.took(0.02, 0)
    assert pace.readable() is None


@pytest.mark.parametrize(
    ("generating", "reading", "readable"),
    [
        (0.02, (0.22, 100), 40),  # 2 ms a token, 80 ms left
        (0.02, (0.03, 100), 800),
        (0.02, (0.01, 100), None),  # a step that was faster than one that reads nothing teaches nothing
        (0.09, (2.09, 100), LEAST),
        (0.50, (0.60, 100), LEAST),  # those who generate take longer than the target by themselves
    ],
)
def test_what_is_left_of_the_target_is_for_reading(generating, reading, readable):
    pace = Pace(0.1)
    pace.took(generating, 0)
    pace.took(*reading)
    assert pace.readable() == readable


def test_a_prompt_before_anybody_generates_counts_alone():
    pace = Pace(0.1)
    pace.took(0.2, 100)
    assert pace.readable() == 50


def test_new_steps_count_and_old_ones_fade():
    pace = Pace(1.0)
    pace.took(0.1, 100)
    for _ in range(60):
        pace.took(0.2, 100)
    assert pace.readable() == pytest.approx(500, abs=2)
