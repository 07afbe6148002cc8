"""Who is behind whom, as a table; what follows for steps is told in test_scheduler.py."""

from collections import Counter

import pytest

from reference_backend.admission import OUTPUT_WEIGHT
from reference_backend.engine.request import Priority, Sampling, Sequence
from reference_backend.engine.standing import QUANTUM, Standing, dispensable

ARRIVALS = iter(range(1 << 30))
FORGIVEN = 8 * QUANTUM * OUTPUT_WEIGHT


def standing(running, served):
    made = Standing(lambda tenant: served.get(tenant, 0.0), 8)
    made.running = Counter(running)
    return made


def sequences(tenant, count, priority=Priority.NORMAL):
    made = [Sequence([1], Sampling(max_tokens=99), None, priority, tenant) for _ in range(count)]
    for each in made:
        each.arrival = next(ARRIVALS)
    return made


@pytest.mark.parametrize(
    ("running", "served", "is_behind", "handicap"),
    [
        ({}, {}, False, 0),  # nobody to be behind
        ({"other": 1}, {}, False, 0),
        ({"other": 2}, {}, True, 0),
        ({"own": 1, "other": 2}, {}, False, 1),
        ({"own": 1, "other": 3}, {}, True, 1),
        ({"own": 7}, {}, False, 7),
        ({"other": 7}, {"own": FORGIVEN}, True, 0),
        ({"other": 7}, {"own": FORGIVEN + 1}, False, 8),  # served too much: it goes after all others
        ({"other": 7}, {"own": FORGIVEN + 5, "other": 5}, True, 0),
        ({"other": 7, "third": 2}, {"own": FORGIVEN + 5, "third": 5}, True, 8),
    ],
)
def test_who_is_behind_has_fewer_running_and_was_not_served_more(running, served, is_behind, handicap):
    subject = standing(running, served)
    assert (subject.is_behind("own"), subject.handicap("own")) == (is_behind, handicap)


def test_those_who_have_most_give_way_newest_first_until_all_are_level():
    most, more, urgent = sequences("most", 4), sequences("more", 3), sequences("urgent", 5, Priority.HIGH)
    subject = standing({"most": 4, "more": 3, "urgent": 5}, {})
    [asked] = sequences("light", 1)
    assert list(subject.ahead_of(asked, [*most, *more, *urgent])) == [most[3], more[2], most[2], more[1], most[1]]


def test_who_is_in_its_quantum_has_those_of_no_better_class_pause():
    [light], flood, urgent = sequences("light", 1), sequences("flood", 3), sequences("flood", 1, Priority.HIGH)
    subject = standing({"light": 1, "flood": 4}, {})
    assert subject.pausing([light, *flood, *urgent]) == flood
    light.tokens += [7] * QUANTUM
    assert subject.pausing([light, *flood, *urgent]) == []


def test_among_equals_the_newest_gives_way_and_a_better_class_last():
    few, many, urgent = sequences("few", 2), sequences("many", 3), sequences("few", 1, Priority.HIGH)
    low = sequences("many", 1, Priority.LOW)
    expected = [*low, many[2], few[1], many[1], few[0], many[0], *urgent]
    assert dispensable([*many, *few, *low, *urgent]) == expected
