import pytest

from policies.overload import Overload

LIMITS = (("normal", ""), ("no_keep_alive", "memory"), ("shedding", "memory"))


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(None, 0), (0.0, 0), (0.9199, 0), (0.92, 1), (0.9499, 1), (0.95, 2), (1.0, 2), (1.5, 2)],
)
def test_memory_has_two_steps(memory, expected) -> None:
    overload = Overload()
    assert overload.note(0.0, 0.0, memory) is bool(expected)
    assert (overload.state, overload.reason) == LIMITS[expected]
    assert overload.keeps_connections is (expected == 0)
    assert overload.takes_requests is (expected < 2)
    assert overload.note(1.0, 0.0, memory) is False
    assert overload.note(2.0, 0.0, 0.5) is bool(expected)
    assert overload.state == "normal"


@pytest.mark.parametrize(
    ("readings", "states"),
    [
        ([(0, 0.3), (2.5, 0.3), (4.9, 0.3), (5.0, 0.3)], "nnns"),
        ([(0, 9.0), (9, 0.0), (9.5, 9.0)], "nnn"),  # one long pause, and another
        ([(0, 0.3), (3, 0.25), (5, 0.3), (9.9, 0.3), (10, 0.3)], "nnnns"),  # in time once: it begins anew
        ([(0, 0.3), (5, 0.3), (6, 0.3), (7, 0.1), (8, 0.3)], "nssnn"),
    ],
)
def test_a_loop_that_is_late_for_five_seconds_takes_on_nothing_new(readings, states) -> None:
    overload = Overload()
    told = []
    for now, lag in readings:
        overload.note(now, lag, None)
        assert overload.keeps_connections
        assert overload.reason == ("event loop" if overload.state == "shedding" else "")
        told.append(overload.state[0])
    assert "".join(told) == states


def test_both_at_once_are_both_obeyed() -> None:
    overload = Overload(late_for=0.0)
    assert overload.note(0.0, 1.0, 0.93)
    assert repr(overload) == "<Overload shedding event loop>"
    assert not overload.keeps_connections
    assert overload.note(1.0, 0.0, 0.93)
    assert repr(overload) == "<Overload no_keep_alive memory>"
