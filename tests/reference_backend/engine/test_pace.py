"""What steps cost, and how much the next one may read."""

import pytest

from reference_backend.engine.pace import LEAST, NOTHING_KNOWN, Ahead, Beside, Pace, Readable, predicted_reading_end


def test_nothing_is_known_at_first():
    pace = Pace(0.1)
    pace.took(0.02, 0, 1)
    assert pace.readable() is None


@pytest.mark.parametrize(
    ("generating", "reading", "readable"),
    [
        (0.02, (0.22, 100), Readable(40, LEAST)),  # 2 ms a token, 80 ms left
        (0.02, (0.03, 100), Readable(800, 200)),
        (0.02, (0.01, 100), None),  # a step that was faster than one that reads nothing teaches nothing
        (0.09, (2.09, 100), Readable(LEAST, LEAST)),
        (0.50, (0.60, 100), Readable(LEAST, 500)),  # those who generate take longer than the target by themselves
    ],
)
def test_what_is_left_of_the_target_is_for_reading_and_no_prompt_is_begun_after_half_a_step(
    generating, reading, readable
):
    pace = Pace(0.1)
    pace.took(generating, 0, 1)
    pace.took(*reading, 1)
    assert pace.readable() == readable


def test_a_step_full_of_prompts_is_foreseen():
    pace = Pace(0.1)
    pace.took(0.02, 0, 1)
    assert pace.longest_step_seconds(1000) == 0.0
    pace.took(0.22, 100, 1)
    assert pace.longest_step_seconds(1000) == pytest.approx(2.02)


def test_a_prompt_before_anybody_generates_counts_alone():
    pace = Pace(0.1)
    pace.took(0.2, 100, 0)
    assert pace.readable() == Readable(50, LEAST)


def test_new_steps_count_and_old_ones_fade():
    pace = Pace(1.0)
    pace.took(0.1, 100, 0)
    for _ in range(60):
        pace.took(0.2, 100, 0)
    assert pace.readable().most == pytest.approx(500, abs=2)


@pytest.mark.parametrize(
    ("steps", "beside"),
    [
        ([], NOTHING_KNOWN),
        ([(0.02, 0, 4)], NOTHING_KNOWN),
        ([(0.02, 0, 1), (0.027, 0, 8)], Beside(3, 0)),  # 3 ms to spare, 1 ms for each; nothing was read yet
        ([(0.02, 0, 2), (0.02, 0, 8)], Beside(None, 0)),  # a device on which more cost nothing
        ([(0.02, 0, 1), (0.16, 0, 8)], Beside(1, 0)),  # one more always goes on
        ([(0.02, 0, 1), (0.027, 0, 8), (0.0313, 100, 8)], Beside(3, 30)),  # 0.1 ms for each token read
        ([(0.02, 0, 1), (0.027, 0, 8), (0.0414, 100, 8)], Beside(3, 0)),  # fewer than LEAST are not worth it
        ([(0.02, 0, 1), (0.027, 0, 8), (0.5, 0, 0)], Beside(3, 0)),  # a turn without work teaches nothing
    ],
)
def test_beside_those_in_a_hurry_is_room_for_what_stretches_a_step_a_little(steps, beside):
    pace = Pace(0.1)
    for step in steps:
        pace.took(*step)
    assert pace.beside() == beside


@pytest.mark.parametrize(
    ("ahead", "rate", "slot_seconds", "seconds"),
    [
        (Ahead(0, 0, 500), 0.0, 0.0, 0.0),  # nothing is known: nothing is foreseen
        (Ahead(3, 900, 500), 0.0, 0.0, 0.0),
        (Ahead(0, 0, 500), 1000.0, 0.0, 0.5),
        (Ahead(0, 0, 500), 1000.0, 9.0, 0.5),  # it need not wait for a slot
        (Ahead(0, 700, 500), 1000.0, 0.0, 1.2),
        (Ahead(3, 0, 500), 1000.0, 2.0, 6.5),
        (Ahead(3, 700, 500), 1000.0, 2.0, 6.5),  # they are read while slots are waited for
        (Ahead(1, 7000, 500), 1000.0, 2.0, 7.5),
        (Ahead(2, 0, 500), 0.0, 3.0, 6.0),
    ],
)
def test_when_a_prompt_will_have_been_read(ahead, rate, slot_seconds, seconds):
    assert predicted_reading_end(100.0, ahead, rate, slot_seconds) == pytest.approx(100.0 + seconds)


def test_how_often_there_is_a_slot_is_learnt_while_somebody_waits_for_one():
    pace = Pace(0.1)
    pace.gave_slots(1.0, 4, 0)
    pace.gave_slots(5.0, 1, 3)  # nobody had waited
    assert pace.slot_seconds == 0.0
    pace.gave_slots(6.0, 0, 3)
    pace.gave_slots(9.0, 2, 1)
    assert pace.slot_seconds == 2.0
    pace.gave_slots(10.0, 1, 0)
    assert pace.slot_seconds == pytest.approx(1.8)
    pace.gave_slots(60.0, 1, 5)
    pace.gave_slots(62.0, 1, 5)
    assert pace.slot_seconds == pytest.approx(1.84)
