"""The order of the rounds, and what becomes of a gateway that fails, with a rig that measures nothing."""

import contextlib

import pytest

from benchmarks.bench import run
from benchmarks.figures import Figure
from benchmarks.processes import Failed, Usage
from benchmarks.workloads import Workload


class Named:
    features = ""

    def __init__(self, name):
        self.name = name


class Put:
    """A gateway that runs, as far as this module looks."""

    def __init__(self, name):
        self.name = name
        self.is_dead = False
        self.idle = Usage(0.0, 2 << 20)

    def core_busy_seconds(self):
        return 0.0

    def usage(self):
        if self.is_dead:
            raise Failed(f"{self.name} ended with code 1")
        return Usage(0.0, 3 << 20)


class NoRig:
    def __init__(self, *broken):
        self._broken = broken
        self.stopped = []

    @contextlib.contextmanager
    def json(self):
        yield None

    @contextlib.contextmanager
    def running(self, gateway, _, *, stream):
        assert not stream
        if gateway.name in self._broken:
            raise Failed(f"{gateway.name} did not serve")
        try:
            yield Put(gateway.name)
        finally:
            self.stopped.append(gateway.name)


def workload(measured, **more):
    def measure(_rig, running, seconds):
        measured.append((running.name, seconds))
        return {"cpu_us": 1.0}

    def warm_up(_rig, running, _seconds):
        measured.append((running.name, "warm"))

    return Workload("unary", "work", (Figure("cpu_us", "µs", "CPU"),), measure, warm_up, **more)


def gateways(*names):
    return [Named(name) for name in names]


def test_all_are_warmed_up_and_then_measured_in_turn():
    measured, rig = [], NoRig()
    outcome = run(rig, workload(measured), gateways("a", "b"), 2, 5, lambda _: None)
    assert measured == [("a", "warm"), ("b", "warm"), ("a", 5), ("b", 5), ("a", 5), ("b", 5)]
    assert {name: len(rounds) for name, rounds in outcome.rounds.items()} == {"a": 2, "b": 2}
    assert outcome.spreads["a"]["rss_end_mib"].median == 3.0
    assert rig.stopped == ["b", "a"]


def test_one_that_does_not_start_is_missing_and_the_others_are_measured():
    said = []
    outcome = run(NoRig("a"), workload([]), gateways("a", "b"), 1, 5, said.append)
    assert outcome.missing == {"a": "a did not serve"}
    assert list(outcome.rounds) == ["b"]
    assert said[0] == "unary a: a did not serve"


def test_one_that_dies_keeps_the_rounds_it_had():
    def measure(_rig, running, _seconds):
        running.is_dead = running.name == "a" and measure.rounds == 1
        measure.rounds += running.name == "a"
        return {"cpu_us": 1.0}

    measure.rounds = 0
    work = Workload("unary", "work", (), measure, lambda *_: None)
    outcome = run(NoRig(), work, gateways("a", "b"), 3, 5, lambda _: None)
    assert {name: len(rounds) for name, rounds in outcome.rounds.items()} == {"a": 1, "b": 3}
    assert outcome.missing == {"a": "a ended with code 1"}


@pytest.mark.parametrize(("only", "expected"), [(None, ["a", "b"]), (frozenset({"b"}), ["b"])])
def test_a_workload_may_be_for_some_only(only, expected):
    outcome = run(NoRig(), workload([], only=only), gateways("a", "b"), 1, 5, lambda _: None)
    assert list(outcome.rounds) == expected
