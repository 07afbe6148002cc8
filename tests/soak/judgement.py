"""What may become of a request while things break, and what is a request lost. Pure: outcomes and windows in, words out.

A request is *lost* when it failed although it could have been saved. Precisely: its client did not get the whole
answer, and none of the faults that were in force while it was under way is allowed by the contract to do this to it.
What the contract allows is the table below, and no more:

- before the first byte, with another backend of the service free of faults: nothing, where the failure leaves no doubt
  that the work was not begun (refused or reset connections, 503 with `x-backend-not-started`, 429), or where the route
  says that a request may run twice. Otherwise 502 for a backend that broke, and 504 for one that said nothing in time;
- after the first byte: an answer that breaks off with its backend, and says so where it is a stream;
- no answer at all: from a worker that was killed, or on a connection that a gateway on its way out has just closed;
- any refusal for want of a backend, from a gateway that has just started after etcd lost everything (wiped, or frozen
  for as long as leases live): it cannot know more than those that have registered again since;
- the same, and 502, when no backend of the service can be used: one has a fault, the others are to be tried again only
  when their breaker has rested, or registered again while etcd could not tell it;
- 503 `keys_unavailable` for a token of a key that the identity provider could not be asked for;
- from etcd, Redis, a policy and a registration: nothing whatsoever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from tests.soak.schedule import SERVICES, Kind


class Ending(Enum):
    """How a request ended for its client."""

    WHOLE = "whole"
    REFUSED = "refused"  # a whole answer with a status from 400 on
    CUT = "cut"  # an answer that began well and is not whole
    UNANSWERED = "unanswered"  # the connection ended before the head of an answer
    LEFT = "left"  # the client did not want to wait
    HUNG = "hung"  # the client gave up after all that the route allows, and more


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request and its end. Times are of one clock, in seconds."""

    request_id: str
    gateway: str
    service: str
    consumer: str
    sent_at: float
    ended_at: float
    ending: Ending
    status: int = 0  # 0: no head has come
    code: str = ""  # of a refusal
    backend: str = ""
    is_told: bool = False  # an answer that was cut had said so


@dataclass(frozen=True, slots=True)
class Window:
    """When a fault was in force."""

    kind: Kind
    target: str
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Line:
    """What an access line says."""

    request_id: str
    status: int


INTRUDER, LIMITED, NOMAD = "intruder", "limited", "nomad"
"""Consumers who meet refusals: a bad signature, a small limit, a key that changes."""
MAY_RUN_TWICE = frozenset({"embed"})
"""Services whose route says `idempotent`."""

_BREAK_BEFORE = frozenset({Kind.CRASH, Kind.RESET, Kind.ERROR, Kind.CUT, Kind.STALL})
_BREAK_AFTER = frozenset({Kind.CRASH, Kind.RESET, Kind.STALL, Kind.CUT})
_AWAY = frozenset({Kind.WORKER_KILL, Kind.DRAIN})
_KEYS_AWAY = frozenset({Kind.KEYS_ERROR, Kind.KEYS_SILENT})

# Seconds that a fault is felt after it was undone.
_ECHOES: Mapping[Kind, float] = {
    Kind.KEYS_ERROR: 12.0,  # keys are asked for once in ten seconds
    Kind.KEYS_SILENT: 12.0,
}
_NO_BACKEND = frozenset({"no_backend", "circuit_open", "overloaded", "queue_full"})
_REGISTRATION = frozenset({Kind.FLAP, Kind.WITHDRAW})
BLIND_SECONDS = 10.0
"""As long as a lease: by then each backend has noticed that it is not registered any more."""
FREEZE_SECONDS = 6.5
"""Frozen for so long, etcd may end each lease when it comes back: they were kept alive a third of a lease before."""
REST_SECONDS = 6.0
"""After a fault of a backend: its breaker rests 3 s, and another time where the last probe met the end of the fault."""
HEAR_SECONDS = 12.0
"""After etcd has come back: a gateway that was refused often tries again within 10 s."""
KILL_LOSES_SECONDS = 1.0
"""What was answered so shortly before SIGKILL may not have been written to the log yet."""


def loss(outcome: Outcome, windows: Iterable[Window]) -> str | None:
    """Why this request is lost; None where it is not."""
    windows = tuple(windows)
    around = [window for window in windows if _meets(outcome, window)]
    match outcome.ending:
        case Ending.LEFT:
            return None
        case Ending.WHOLE:
            return "let in without a good token" if outcome.consumer == INTRUDER else None
        case Ending.REFUSED:
            is_allowed = _may_be_refused(outcome, around) or _is_blind(outcome, windows)
            return (
                None
                if is_allowed or _is_left_alone(outcome, windows)
                else f"refused with {outcome.status} {outcome.code}"
            )
        case Ending.CUT:
            return _cut(outcome, around)
        case Ending.UNANSWERED:
            return None if _is_away(outcome, around) else "not answered"
        case Ending.HUNG:
            return "neither answered nor refused"


def losses(outcomes: Iterable[Outcome], windows: Sequence[Window]) -> list[tuple[Outcome, str]]:
    return [(outcome, why) for outcome in outcomes if (why := loss(outcome, windows)) is not None]


def _meets(outcome: Outcome, window: Window) -> bool:
    return window.begun <= outcome.ended_at and outcome.sent_at <= window.ended + _ECHOES.get(window.kind, 0.0)


def _may_be_refused(outcome: Outcome, around: Sequence[Window]) -> bool:
    if outcome.consumer == INTRUDER:
        return outcome.status == 401
    kinds = {window.kind for window in around}
    if outcome.status == 429:
        return outcome.consumer == LIMITED and outcome.code == "rate_limited"
    if outcome.code == "keys_unavailable":
        return outcome.consumer == NOMAD and bool(kinds & _KEYS_AWAY)
    backends = SERVICES[outcome.service]
    here = {window.kind for window in around if window.target in backends}
    if outcome.code == "upstream_timeout":
        return Kind.STALL in here
    if outcome.code == "upstream_failed":
        return outcome.service not in MAY_RUN_TWICE and bool(here & _BREAK_BEFORE)
    return False


def _is_blind(outcome: Outcome, windows: Iterable[Window]) -> bool:
    lately = [
        each for each in windows if each.begun <= outcome.ended_at and outcome.sent_at <= each.ended + BLIND_SECONDS
    ]
    return outcome.code in _NO_BACKEND and any(map(_loses_leases, lately)) and _is_away(outcome, lately)


def _loses_leases(window: Window) -> bool:
    if window.kind is Kind.ETCD_FREEZE:
        return window.ended - window.begun >= FREEZE_SECONDS
    return window.kind is Kind.ETCD_WIPE


def _is_left_alone(outcome: Outcome, windows: Sequence[Window]) -> bool:
    """Whether no backend of the service could be used when the request came, or one less than that then broke."""
    usable = [
        backend
        for backend in SERVICES[outcome.service]
        if not any(
            window.target == backend and window.begun <= outcome.ended_at and outcome.sent_at <= _over(window, windows)
            for window in windows
        )
    ]
    return outcome.code in (*_NO_BACKEND, "upstream_failed") and not usable


def _over(window: Window, windows: Iterable[Window]) -> float:
    """When the backend is in use again after this fault of it."""
    if window.kind not in _REGISTRATION:
        return window.ended + REST_SECONDS
    heard = window.ended
    for each in sorted(windows, key=lambda each: each.begun):
        if each.target == "etcd" and each.begun <= heard <= each.ended + HEAR_SECONDS:
            heard = each.ended + HEAR_SECONDS
    return max(heard, window.ended + REST_SECONDS)


def _cut(outcome: Outcome, around: Sequence[Window]) -> str | None:
    if _is_away(outcome, around):
        return None
    if not any(window.target == outcome.backend and window.kind in _BREAK_AFTER for window in around):
        return "cut"
    return None if outcome.is_told else "cut without a word"


def _is_away(outcome: Outcome, around: Iterable[Window]) -> bool:
    return any(window.target == outcome.gateway and window.kind in _AWAY for window in around)


def log_faults(outcomes: Iterable[Outcome], lines: Iterable[Line], windows: Sequence[Window]) -> list[str]:
    """What is wrong with the access log: each request that was answered has one line there, with its status.

    A request whose client left, or that was not answered, has one at most. A line belongs to a request.
    """
    told: dict[str, list[int]] = {}
    for line in lines:
        told.setdefault(line.request_id, []).append(line.status)
    faults = []
    for outcome in outcomes:
        statuses = told.pop(outcome.request_id, [])
        if len(statuses) > 1:
            faults.append(f"{outcome.request_id} has {len(statuses)} access lines")
        elif not statuses and outcome.status and not _may_be_unwritten(outcome, windows):
            faults.append(f"{outcome.request_id} has no access line")
        elif statuses and outcome.status not in (0, statuses[0]):
            faults.append(f"{outcome.request_id} was answered {outcome.status} and logged as {statuses[0]}")
    return faults + [f"{request_id} was logged and never sent" for request_id in told]


def _may_be_unwritten(outcome: Outcome, windows: Iterable[Window]) -> bool:
    return any(
        window.kind is Kind.WORKER_KILL
        and window.target == outcome.gateway
        and window.begun - KILL_LOSES_SECONDS <= outcome.ended_at
        and outcome.sent_at <= window.ended
        for window in windows
    )


def recoveries(outcomes: Sequence[Outcome], windows: Iterable[Window]) -> dict[Kind, float]:
    """The longest time, for each kind of fault of a backend, from its end to the first whole answer from there.

    From the first request to its service after the end, in fact: while nobody asks nobody is answered.
    """
    longest: dict[Kind, float] = {}
    for window in windows:
        later = [each for each in outcomes if each.sent_at >= window.ended and window.target in SERVICES[each.service]]
        ends = [each.ended_at for each in later if each.ending is Ending.WHOLE and each.backend == window.target]
        if ends:
            asked_at = min(each.sent_at for each in later)
            longest[window.kind] = max(longest.get(window.kind, 0.0), min(ends) - asked_at)
    return longest
