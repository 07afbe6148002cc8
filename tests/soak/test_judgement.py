import pytest

from tests.soak.judgement import (
    INTRUDER,
    KILL_LOSES_SECONDS,
    LIMITED,
    NOMAD,
    Ending,
    Line,
    Outcome,
    Window,
    log_faults,
    loss,
    losses,
    recoveries,
)
from tests.soak.schedule import Kind

LEFT, WHOLE, REFUSED, CUT, UNANSWERED = Ending.LEFT, Ending.WHOLE, Ending.REFUSED, Ending.CUT, Ending.UNANSWERED


def asked(ending=WHOLE, status=200, code="", **changes) -> Outcome:
    """Sent at 10, ended at 11."""
    fields = {
        "gateway": "a",
        "service": "chat",
        "consumer": "gold",
        "backend": "chat-0",
        "sent_at": 10.0,
        "ended_at": 11.0,
    }
    return Outcome("r-1", **{**fields, "ending": ending, "status": status, "code": code, **changes})


def window(kind: Kind, target: str = "chat-0", begun: float = 9.0, ended: float = 12.0) -> Window:
    return Window(kind, target, begun, ended)


TIMEOUT = asked(REFUSED, 504, "upstream_timeout")
FAILED = asked(REFUSED, 502, "upstream_failed")
NO_BACKEND = asked(REFUSED, 503, "no_backend")
NO_KEYS = {"ending": REFUSED, "status": 503, "code": "keys_unavailable"}
BROKEN = asked(CUT, is_told=True)


@pytest.mark.parametrize(
    ("outcome", "kind", "why"),
    [
        (asked(), None, None),
        (asked(LEFT, 0), None, None),
        (asked(Ending.HUNG, 0), Kind.STALL, "neither answered nor refused"),
        # Before the first byte
        (FAILED, None, "refused with 502 upstream_failed"),
        (FAILED, Kind.CRASH, None),
        (FAILED, Kind.RESET, None),
        (FAILED, Kind.ERROR, None),
        (FAILED, Kind.CUT, None),
        (FAILED, Kind.STALL, None),  # it hangs up in the end
        (FAILED, Kind.NOT_STARTED, "refused with 502 upstream_failed"),
        (asked(REFUSED, 502, "upstream_failed", service="embed"), Kind.CRASH, "refused with 502 upstream_failed"),
        (TIMEOUT, Kind.STALL, None),
        (TIMEOUT, Kind.DRIP, "refused with 504 upstream_timeout"),
        (NO_BACKEND, Kind.CRASH, "refused with 503 no_backend"),
        (asked(REFUSED, 503, "circuit_open"), Kind.ERROR, "refused with 503 circuit_open"),
        (asked(REFUSED, 503, "overloaded"), Kind.NOT_STARTED, "refused with 503 overloaded"),
        (asked(REFUSED, 429, "queue_full"), Kind.BUSY, "refused with 429 queue_full"),
        (asked(REFUSED, 500, "internal_error"), Kind.CRASH, "refused with 500 internal_error"),
        # After it
        (BROKEN, None, "cut"),
        (BROKEN, Kind.CRASH, None),
        (BROKEN, Kind.STALL, None),
        (BROKEN, Kind.FLAP, "cut"),
        (asked(CUT), Kind.CRASH, "cut without a word"),
        (asked(CUT, is_told=True, backend="chat-1"), Kind.CRASH, "cut"),
    ],
)  # fmt: skip
def test_what_a_fault_of_a_backend_may_do(outcome, kind, why) -> None:
    assert loss(outcome, [window(kind)] if kind else []) == why


@pytest.mark.parametrize(
    ("outcome", "fault", "is_lost"),
    [
        (asked(UNANSWERED, 0), window(Kind.WORKER_KILL, "a"), False),
        (asked(UNANSWERED, 0), window(Kind.DRAIN, "b"), True),
        (asked(UNANSWERED, 0), window(Kind.CRASH), True),
        (asked(CUT), window(Kind.WORKER_KILL, "a"), False),
        (NO_BACKEND, window(Kind.ETCD_WIPE, "etcd"), True),
        (NO_BACKEND, window(Kind.WITHDRAW), True),
        (asked(REFUSED, 429, "rate_limited"), window(Kind.REDIS_KILL, "redis"), True),
        (asked(REFUSED, 429, "rate_limited", consumer=LIMITED), window(Kind.REDIS_KILL, "redis"), False),
        (asked(REFUSED, 401, "unauthenticated"), window(Kind.KEYS_ROTATE, "keys"), True),
        (asked(REFUSED, 401, "unauthenticated", consumer=NOMAD), window(Kind.KEYS_ROTATE, "keys"), True),
        (asked(**NO_KEYS, consumer=NOMAD), window(Kind.KEYS_ERROR, "keys"), False),
        (asked(**NO_KEYS, consumer=NOMAD), window(Kind.KEYS_SILENT, "keys", 0.0, 1.0), False),
        (asked(**NO_KEYS), window(Kind.KEYS_SILENT, "keys"), True),
        (asked(REFUSED, 401, consumer=INTRUDER), window(Kind.KEYS_ERROR, "keys"), False),
        (asked(consumer=INTRUDER), window(Kind.KEYS_ERROR, "keys"), True),
    ],
)
def test_what_any_other_fault_may_do(outcome, fault, is_lost) -> None:
    assert (loss(outcome, [fault]) is not None) is is_lost


@pytest.mark.parametrize(
    ("begun", "ended", "is_lost"),
    [(0.0, 9.9, True), (0.0, 10.0, False), (10.5, 10.6, False), (11.0, 20.0, False), (11.1, 20.0, True)],
)
def test_only_a_fault_that_was_in_force_meanwhile_counts(begun, ended, is_lost) -> None:
    assert (loss(BROKEN, [window(Kind.CRASH, begun=begun, ended=ended)]) is not None) is is_lost


@pytest.mark.parametrize(
    ("faults", "is_lost"),
    [
        ([window(Kind.ETCD_WIPE, "etcd", 0.0, 5.0), window(Kind.DRAIN, "a", 0.0, 6.0)], False),
        ([window(Kind.ETCD_WIPE, "etcd", 0.0, 5.0), window(Kind.DRAIN, "b", 0.0, 6.0)], True),
        ([window(Kind.ETCD_KILL, "etcd", 0.0, 5.0), window(Kind.DRAIN, "a", 0.0, 6.0)], True),
        ([window(Kind.ETCD_WIPE, "etcd", -9.0, -1.0), window(Kind.DRAIN, "a", 0.0, 6.0)], True),
        ([window(Kind.ETCD_FREEZE, "etcd", 0.0, 6.6), window(Kind.DRAIN, "a", 0.0, 7.0)], False),
        ([window(Kind.ETCD_FREEZE, "etcd", 0.0, 6.4), window(Kind.DRAIN, "a", 0.0, 7.0)], True),
    ],
)
def test_a_gateway_that_starts_when_etcd_has_lost_everything_knows_no_better(faults, is_lost) -> None:
    assert (loss(NO_BACKEND, faults) is not None) is is_lost


# Two of the three of `chat`: broken now, and its breaker still at rest.
TWO_GONE = [window(Kind.RESET), window(Kind.ERROR, "chat-1", 3.0, 5.0)]


@pytest.mark.parametrize(
    ("third", "is_lost"),
    [
        ([], True),
        ([window(Kind.CUT, "chat-2", 0.0, 2.0)], True),  # long over
        ([window(Kind.CUT, "chat-2", 2.0, 4.5)], False),
        ([window(Kind.BUSY, "embed-2", 2.0, 4.5)], True),
        ([window(Kind.WITHDRAW, "chat-2", 0.0, 2.0)], True),
        # registered again while etcd could not tell
        ([window(Kind.WITHDRAW, "chat-2", 0.0, 2.0), window(Kind.ETCD_HOLE, "etcd", 1.0, 3.0)], False),
        ([window(Kind.FLAP, "chat-2", -20.0, -17.0), window(Kind.ETCD_KILL, "etcd", -18.0, -10.0)], True),
        (
            [
                window(Kind.FLAP, "chat-2", -20.0, -17.0),
                window(Kind.ETCD_KILL, "etcd", -18.0, -10.0),
                window(Kind.ETCD_FREEZE, "etcd", -5.0, 0.0),
            ],
            False,
        ),
        ([window(Kind.WITHDRAW, "chat-2", 0.0, 2.0), window(Kind.ETCD_HOLE, "etcd", 2.5, 9.0)], True),
    ],
)  # fmt: skip
def test_a_service_without_a_backend_that_could_be_used_loses_nothing(third, is_lost) -> None:
    for code, status in (("no_backend", 503), ("circuit_open", 503), ("overloaded", 503)):
        refused = asked(REFUSED, status, code)
        assert (loss(refused, [*TWO_GONE, *third]) is not None) is is_lost
    assert loss(asked(REFUSED, 401, "unauthenticated"), [*TWO_GONE, *third]) is not None


def test_losses_are_told_with_their_reason() -> None:
    assert losses([asked(), FAILED], []) == [(FAILED, "refused with 502 upstream_failed")]


KILLED = window(Kind.WORKER_KILL, "a", 11.0 + KILL_LOSES_SECONDS / 2, 15.0)


@pytest.mark.parametrize(
    ("outcome", "statuses", "windows", "faults"),
    [
        (asked(), [200], [], []),
        (asked(), [], [], ["r-1 has no access line"]),
        (asked(), [], [KILLED], []),
        (asked(gateway="b"), [], [KILLED], ["r-1 has no access line"]),
        (asked(), [200, 200], [], ["r-1 has 2 access lines"]),
        (asked(), [502], [], ["r-1 was answered 200 and logged as 502"]),
        (asked(LEFT, 0), [], [], []),
        (asked(LEFT, 0), [499], [], []),
        (asked(LEFT, 0), [499, 499], [], ["r-1 has 2 access lines"]),
        (asked(LEFT, 200), [], [], ["r-1 has no access line"]),
        (asked(UNANSWERED, 0), [], [], []),
    ],
)
def test_each_request_has_one_access_line(outcome, statuses, windows, faults) -> None:
    assert log_faults([outcome], [Line("r-1", status) for status in statuses], windows) == faults


def test_a_line_of_nobody_is_a_fault() -> None:
    assert log_faults([], [Line("r-9", 200)], []) == ["r-9 was logged and never sent"]


def test_recovery_is_the_time_to_the_first_whole_answer_from_there() -> None:
    crash = window(Kind.CRASH, begun=0.0, ended=5.0)
    again = window(Kind.CRASH, begun=20.0, ended=21.0)
    outcomes = [
        asked(sent_at=4.9, ended_at=5.1),  # sent before its end: it may have waited for it
        asked(sent_at=6.0, ended_at=6.5, backend="chat-1"),
        asked(REFUSED, 502, sent_at=6.0, ended_at=6.5),
        asked(sent_at=7.0, ended_at=8.0),
        asked(sent_at=21.0, ended_at=22.0),
    ]
    assert recoveries(outcomes, [crash, again, window(Kind.STALL, ended=100.0)]) == {Kind.CRASH: 2.0}
