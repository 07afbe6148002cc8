import pytest

from policies.deadline import Kind, Phase, next_due, remaining_ms
from policies.policy import Timeouts

TIMEOUTS = Timeouts(connect=1.0, first_byte=30.0, idle=20.0, total=60.0)


@pytest.mark.parametrize(
    ("phase", "phase_at", "when", "kind"),
    [
        (Phase.CONNECTING, 100.0, 101.0, Kind.CONNECT),
        (Phase.CONNECTING, 159.5, 160.0, Kind.TOTAL),
        (Phase.WAITING, 100.2, 130.2, Kind.FIRST_BYTE),
        (Phase.WAITING, 130.0, 160.0, Kind.TOTAL),
        (Phase.WAITING, 140.0, 160.0, Kind.TOTAL),
        (Phase.STREAMING, 110.0, 130.0, Kind.IDLE),
        (Phase.STREAMING, 139.0, 159.0, Kind.IDLE),
        (Phase.STREAMING, 141.0, 160.0, Kind.TOTAL),
    ],
)
def test_the_earlier_of_the_phase_and_the_total_is_due(phase, phase_at, when, kind):
    assert next_due(phase, TIMEOUTS, 100.0, phase_at) == (pytest.approx(when), kind)


@pytest.mark.parametrize(
    ("now", "left"), [(100.0, 60_000), (100.0005, 59_999), (159.9995, 0), (160.0, 0), (161.0, 0), (99.0, 61_000)]
)
def test_what_is_left_of_the_total_is_rounded_down(now, left):
    assert remaining_ms(TIMEOUTS, 100.0, now) == left
