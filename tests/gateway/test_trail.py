import pytest

from gateway.admission import UNLIMITED
from gateway.trail import Trail
from tests.support.call import call_of


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_phases_follow_each_other_without_gaps() -> None:
    clock = Clock()
    trail = Trail(clock, 1_700_000_000.0, "p1")
    for seconds, phase in enumerate(("auth", "limit", "body", "pick", "connect", "upstream"), start=1):
        clock.now += seconds
        setattr(trail, phase, trail.lap())
    event = trail.ended("")
    phases = event.auth + event.limit + event.body + event.queue + event.pick + event.connect + event.upstream
    assert phases == event.total == 21.0
    assert event.overhead == event.auth + event.limit + event.pick == 7.0


@pytest.mark.parametrize("ended", ["auth", "limit", "body", "pick"])
def test_a_refusal_ends_the_phase_that_was_under_way(ended: str) -> None:
    clock = Clock()
    trail = Trail(clock, 0.0, "p1")
    for phase in ("auth", "limit", "body", "pick"):
        clock.now += 1.0
        if phase == ended:
            break
        setattr(trail, phase, trail.lap())
        if phase == "auth":
            trail.payer = UNLIMITED
    trail.end_phase()
    event = trail.ended("")
    assert getattr(event, ended) == 1.0
    assert event.auth + event.limit + event.body + event.pick == event.total


def test_the_timing_header_tells_phases_and_total_in_milliseconds() -> None:
    clock = Clock()
    trail = Trail(clock, 0.0, "p1")
    clock.now += 0.0015
    trail.auth = trail.lap()
    line = trail.server_timing()
    assert line.startswith(b"server-timing: auth;dur=1.500, limit;dur=0.000, ")
    assert line.endswith(b"upstream;dur=0.000, total;dur=1.500\r\n")


def test_waiting_is_not_counted_as_ours_and_overhead_is_never_negative() -> None:
    clock = Clock()
    trail = Trail(clock, 0.0, "p1")
    clock.now += 3.0
    trail.waited = 5.0
    assert trail.ended("").overhead == 0.0


def test_what_never_became_a_call_is_recorded_under_the_id_it_was_answered_with() -> None:
    event = Trail(Clock(), 5.0, "p1").ended("id-1")
    assert (event.request_id, event.trace_id, event.method, event.protocol, event.bytes_in) == (
        "id-1",
        0,
        "",
        "http",
        0,
    )
    assert (event.status, event.end_reason, event.route, event.model, event.started_at) == (
        499,
        "internal",
        "other",
        "other",
        5.0,
    )


def test_a_call_lends_its_ids_and_sizes() -> None:
    trail = Trail(Clock(), 0.0, "p1")
    trail.call = call = call_of(stream=True)
    trail.status, trail.end_reason = 200, "ok"
    event = trail.ended("ignored")
    assert (event.request_id, event.trace_id, event.span_id) == (call.request_id, call.trace_id, call.span_id)
    assert (event.method, event.protocol, event.stream, event.bytes_in) == ("POST", "openai", True, len(call.body))
    assert (event.status, event.end_reason, event.attempts) == (200, "ok", ())
