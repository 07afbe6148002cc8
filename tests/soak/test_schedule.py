from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from tests.soak.schedule import LANES, SERVICES, Kind, Lane, plan

LANE = Lane(("x", "y", "z"), (Kind.CRASH, Kind.STALL, Kind.BUSY), lasts=(1.0, 2.0), pause=(0.5, 1.5))


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert plan(LANES, Random(7), 40.0, 60.0) == plan(LANES, Random(7), 40.0, 60.0)
    assert plan(LANES, Random(7), 40.0) != plan(LANES, Random(8), 40.0)


@pytest.mark.parametrize("seed", range(20))
def test_faults_of_a_lane_do_not_overlap_and_end_in_time(seed) -> None:
    [phase] = plan({"one": LANE}, Random(seed), 100.0)
    faults = phase["one"]
    assert len(faults) > 20
    for before, after in pairwise(faults):
        assert 0.5 <= after.at - (before.at + before.lasts) <= 1.5
    assert faults[-1].at + faults[-1].lasts <= 100.0


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_and_target_comes_as_often_as_the_others_and_none_twice_in_a_row(seed) -> None:
    phases = plan({"one": LANE}, Random(seed), 30.0, 70.0)
    faults = [fault for phase in phases for fault in phase["one"]]
    for names in ([fault.kind for fault in faults], [fault.target for fault in faults]):
        counts = Counter(names)
        assert len(counts) == 3
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(before != after for before, after in pairwise(names))


def test_a_pack_goes_on_in_the_next_phase() -> None:
    first, second = plan({"one": LANE}, Random(1), 5.0, 5.0)
    dealt = [fault.kind for phase in (first, second) for fault in phase["one"]]
    assert len(set(dealt[:3])) == 3


def test_a_phase_too_short_for_a_fault_has_none() -> None:
    assert plan({"one": LANE}, Random(1), 0.5) == [{"one": ()}]


def test_every_kind_has_its_lane_and_no_two_lanes_share_a_target() -> None:
    assert {kind for lane in LANES.values() for kind in lane.kinds} == set(Kind)
    targets = [target for lane in LANES.values() for target in lane.targets]
    assert len(targets) == len(set(targets))
    assert all(LANES[service].targets == names for service, names in SERVICES.items())
