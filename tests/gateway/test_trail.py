import pytest

from gateway.admission import UNLIMITED
from tests.support.call import call_of, trail_of


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_phases_follow_each_other_without_gaps() -> None:
    clock = Clock()
    trail = trail_of(clock, 1_700_000_000.0)
    for seconds, phase in enumerate(("auth", "limit", "body", "pick", "connect", "upstream"), start=1):
        clock.now += seconds
        setattr(trail, phase, trail.lap())
    trail.end()
    phases = trail.auth + trail.limit + trail.body + trail.queue + trail.pick + trail.connect + trail.upstream
    assert phases == trail.total == 21.0
    assert trail.overhead == trail.auth + trail.limit + trail.pick == 7.0


@pytest.mark.parametrize("ended", ["auth", "limit", "body", "pick"])
def test_a_refusal_ends_the_phase_that_was_under_way(ended: str) -> None:
    clock = Clock()
    trail = trail_of(clock)
    for phase in ("auth", "limit", "body", "pick"):
        clock.now += 1.0
        if phase == ended:
            break
        setattr(trail, phase, trail.lap())
        if phase == "auth":
            trail.payer = UNLIMITED
    trail.end_phase()
    trail.end()
    assert getattr(trail, ended) == 1.0
    assert trail.auth + trail.limit + trail.body + trail.pick == trail.total


def test_the_timing_header_tells_phases_and_total_in_milliseconds() -> None:
    clock = Clock()
    trail = trail_of(clock)
    clock.now += 0.0015
    trail.auth = trail.lap()
    line = trail.server_timing()
    assert line.startswith(b"server-timing: auth;dur=1.500, limit;dur=0.000, ")
    assert line.endswith(b"upstream;dur=0.000, total;dur=1.500\r\n")


def test_waiting_is_not_counted_as_ours_and_overhead_is_never_negative() -> None:
    clock = Clock()
    trail = trail_of(clock)
    clock.now += 3.0
    trail.waited = 5.0
    trail.end()
    assert trail.overhead == 0.0


def test_what_never_became_a_call_is_recorded_under_the_id_it_was_answered_with() -> None:
    event = trail_of(Clock(), 5.0)
    event.end("id-1")
    assert (event.request_id, event.trace_id, event.method, event.protocol, event.bytes_in) == (
        "id-1",
        "",
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


def test_a_call_lends_its_ids_and_sizes_and_is_let_go() -> None:
    trail = trail_of(Clock())
    trail.call = call = call_of(stream=True)
    trail.status, trail.end_reason = 200, "ok"
    trail.end("ignored")
    assert (trail.request_id, trail.trace_id, trail.span_id) == (call.request_id, call.trace_id, call.span_id)
    assert (trail.method, trail.protocol, trail.stream, trail.bytes_in) == ("POST", "openai", True, len(call.body))
    assert (trail.status, trail.end_reason, trail.attempts) == (200, "ok", [])
    assert (trail.call, trail.payer) == (None, None)
