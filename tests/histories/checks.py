"""Whether a history could have been made by a gateway that keeps its promises. Pure: each check returns what is wrong.

Nothing here is a measurement: where a moment is known only to lie between two others, the one that speaks for the
gateway is taken, so a slow machine makes a check blind before it makes it wrong.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.histories.history import Attempt, BreakerChange, Change, Ended, History, Registration, Trouble, View

# Limits


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a window may have on top when it touches [begin, end]: `burst`, and `rate` for the time they share."""

    begin: float
    end: float
    burst: float
    rate: float = 0.0

    def within(self, begin: float, end: float) -> float:
        shared = min(end, self.end) - max(begin, self.begin)
        return self.burst + self.rate * shared if shared >= 0 else 0.0


def limit_allowances(
    troubles: Iterable[Trouble], gateways: int, capacity: float, rate: float, recovery: float
) -> list[Allowance]:
    """What trouble with Redis may cost.

    Each time that Redis loses what it held, or that nobody can ask it, costs one burst at most. A gateway that is cut
    off alone spends its share (limit / gateways) on top of what the others get, until `recovery` after the line is back.
    """
    found = []
    for trouble in troubles:
        if trouble.what != "redis":
            continue
        end = trouble.end + recovery
        alone = len(trouble.gateways)
        if trouble.lost or alone == gateways:
            found.append(Allowance(trouble.begin, end, capacity))
        else:
            found.append(Allowance(trouble.begin, end, capacity * alone / gateways, rate * alone / gateways))
    return found


def windows_over_limit(
    admitted: Iterable[tuple[float, float]], capacity: float, rate: float, allowances: Sequence[Allowance] = ()
) -> list[str]:
    """Windows in which more was admitted than capacity + rate x window, and what is allowed for trouble.

    Each admission happened at some moment of its [sent, answered]; a window holds it when it holds all of that.
    """
    latest: list[float] = []  # of the admissions that were sent no earlier than `begin`, in order
    found = []
    for begin, answered in sorted(admitted, reverse=True):
        insort(latest, answered)
        for count, end in enumerate(latest, 1):
            if count <= capacity + rate * (end - begin):
                continue
            allowed = capacity + rate * (end - begin) + sum(each.within(begin, end) for each in allowances)
            if count > allowed + 1e-6:
                found.append(f"{count} admitted in {end - begin:.3f} s from {begin:.3f}: at most {allowed:.1f} may be")
                break
    return found


# Views of the backends


def views_that_go_back(views: Iterable[View]) -> list[str]:
    """Views that know less, or something older, than one before them at the same gateway."""
    revisions: dict[str, int] = defaultdict(int)
    shown: dict[tuple[str, str], int] = {}  # (gateway, key) -> the newest number that it ever showed
    gone: set[tuple[str, str]] = set()
    found = []
    for view in views:
        if view.revision < revisions[view.gateway]:
            found.append(f"{view.gateway} went back from revision {revisions[view.gateway]} to {view.revision}")
        revisions[view.gateway] = view.revision
        for key, seen in view.backends.items():
            place, number = (view.gateway, key), seen.registration.number
            if number < shown.get(place, 0):
                found.append(f"{view.gateway} showed {key} as of {number} after {shown[place]}")
            elif number == shown.get(place) and place in gone:
                found.append(f"{view.gateway} showed {key} as of {number} again after it was gone")
            shown[place] = max(number, shown.get(place, 0))
        gone = {place for place in shown if place[0] != view.gateway and place in gone} | {
            place for place in shown if place[0] == view.gateway and place[1] not in view.backends
        }
    return found


def last_views_that_differ(
    views: Iterable[View], gateways: Iterable[str], etcd: Mapping[str, Registration]
) -> list[str]:
    """How the last view of each gateway differs from what etcd holds at the end."""
    last = {view.gateway: view for view in views}
    found = []
    for gateway in gateways:
        shown = {key: seen.registration for key, seen in last[gateway].backends.items()} if gateway in last else {}
        found += [f"{gateway} shows {key}, which etcd does not have" for key in sorted(shown.keys() - etcd.keys())]
        found += [f"{gateway} does not show {key}" for key in sorted(etcd.keys() - shown.keys())]
        found += [
            f"{gateway} shows {key} as {shown[key]}, etcd has {etcd[key]}"
            for key in sorted(shown.keys() & etcd.keys())
            if shown[key] != etcd[key]
        ]
    return found


def attempts_too_late(history: History, grace: float, recovery: float) -> list[str]:
    """Attempts at an address that etcd had not had for the backend for longer than `grace`.

    What a gateway cannot hear while it is away from etcd it may not know until `recovery` after that.
    """
    found = []
    timelines = _timelines(history.changes)
    views = _views_by_gateway(history.views)
    for attempt in history.attempts:
        seen = _seen_at(views[attempt.gateway], attempt.key, attempt.began)
        if seen is None:
            found.append(f"{attempt.gateway} sent {attempt.request} to {attempt.key}, which it did not know")
            continue
        until = _address_ended(timelines[attempt.key], seen.address, attempt.began)
        if until is None:
            continue
        until += grace
        for trouble in sorted(history.troubles, key=lambda each: each.begin):
            if trouble.what == "etcd" and attempt.gateway in trouble.gateways and trouble.begin <= until:
                until = max(until, trouble.end + recovery + grace)
        if attempt.began > until:
            late = attempt.began - until
            found.append(
                f"{attempt.gateway} sent {attempt.request} to {attempt.key} at {seen.address} {late:.3f} s late"
            )
    return found


def _timelines(changes: Iterable[Change]) -> dict[str, list[Change]]:
    timelines: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        timelines[change.key].append(change)
    return timelines


def _views_by_gateway(views: Iterable[View]) -> dict[str, list[View]]:
    by_gateway: dict[str, list[View]] = defaultdict(list)
    for view in views:
        by_gateway[view.gateway].append(view)
    return by_gateway


def _seen_at(views: Sequence[View], key: str, at: float) -> Registration | None:
    """What the view in force at that moment says of the key."""
    after = bisect_right(views, at, key=lambda view: view.at)
    seen = views[after - 1].backends.get(key) if after else None
    return seen.registration if seen is not None else None


def _address_ended(timeline: Sequence[Change], address: str, at: float) -> float | None:
    """When etcd last stopped having this address for the key, before `at`; None while it has it."""
    ended: float | None = None
    has_it = False
    for change in timeline:
        if change.at > at:
            # It may have taken force before it was known to have: then it is in force already.
            if change.registration is not None and change.registration.address == address:
                return None
            break
        if change.registration is not None and change.registration.address == address:
            has_it = True
        elif has_it:
            has_it, ended = False, change.at
    return None if has_it else ended if ended is not None else float("-inf")


# Breakers


def probes_too_many(history: History, probes: int) -> list[str]:
    """Attempts at a backend whose breaker was open, and more than `probes` in flight at one that was half open."""
    found = []
    by_key: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in history.attempts:
        by_key[attempt.gateway, attempt.key].append(attempt)
    for (gateway, key), begin, end, state in _shut_times(history):
        during = [attempt for attempt in by_key[gateway, key] if begin <= attempt.began < end]
        if state == "open":
            found += [f"{gateway} sent {each.request} to {key}, whose breaker was open" for each in during]
        elif (most := _most_at_once(during)) > probes:
            found.append(f"{gateway} had {most} requests at {key} while its breaker was half open")
    return found


def _shut_times(history: History) -> Iterator[tuple[tuple[str, str], float, float, str]]:
    """Each time in which a breaker was not closed: of whom, from when, until when, how."""
    lives = _lives(history.views)
    changes: dict[tuple[str, str, int], list[BreakerChange]] = defaultdict(list)
    for change in history.breakers:
        changes[change.gateway, change.key, change.life].append(change)
    for (gateway, key, life), of_this in changes.items():
        born, died = lives.get((gateway, key, life), (0.0, 0.0))
        moments = [*of_this, None]
        for one, following in pairwise(moments):
            end = died if following is None else min(died, following.at)
            if one is not None and one.state != "closed" and max(one.at, born) < end:
                yield (gateway, key), max(one.at, born), end, one.state


def _lives(views: Iterable[View]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """From when to when each backend of a gateway was in its views."""
    lives: dict[tuple[str, str, int], tuple[float, float]] = {}
    for gateway, of_this in _views_by_gateway(views).items():
        for view, end in zip(of_this, [*(later.at for later in of_this[1:]), float("inf")], strict=True):
            for key, seen in view.backends.items():
                born, _ = lives.get((gateway, key, seen.life), (view.at, 0.0))
                lives[gateway, key, seen.life] = (born, end)
    return lives


def _most_at_once(attempts: Iterable[Attempt]) -> int:
    # At one moment an end comes before a beginning: a probe that ended gives its place to the next.
    steps = sorted([*((each.began, 1) for each in attempts), *((each.ended, -1) for each in attempts)])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


# Charges

_REFUNDED = frozenset({"no_backend", "circuit_open", "overloaded", "queue_full", "draining"})
_NO_WORK = frozenset({"connect_fail", "shed"})


def charges_that_differ(history: History, consumer: str, *, may_be_more: int = 0) -> list[str]:
    """Whether the tokens that a consumer's bucket lacks are one for each of its requests that did work, and no other.

    Up to `may_be_more` may be lacking on top: an answer of Redis that was lost costs tokens, and never gives any.
    """
    requests = [each for each in history.ended if each.consumer == consumer]
    working = sum(is_charged(each) for each in requests)
    charged = history.charged[consumer]
    if working <= charged <= working + may_be_more:
        return []
    return [f"{charged} tokens were charged to {consumer} for {working} requests that did work, of {len(requests)}"]


def is_charged(request: Ended) -> bool:
    """Whether a backend may have had work with it."""
    if request.code in _REFUNDED:
        return any(attempt.outcome not in _NO_WORK for attempt in request.attempts)
    return bool(request.attempts)


def requests_told_twice(history: History) -> list[str]:
    """Requests with more than one end, or with none although they were answered; arrivals without an attempt."""
    ends: dict[str, int] = defaultdict(int)
    attempts: dict[str, int] = defaultdict(int)
    for request in history.ended:
        ends[request.request] += 1
        attempts[request.request] += len(request.attempts)
    found = [f"{request} ended {count} times" for request, count in ends.items() if count > 1]
    found += [
        f"{each.request} was answered and never ended"
        for each in history.answered
        if each.status and each.request not in ends
    ]
    # A connection of the pool that turned out to be dead is replaced once, for free, within its attempt.
    return found + [
        f"backends saw {request} {count} times, in {attempts[request]} attempts"
        for request, count in history.arrivals.items()
        if count > 2 * attempts[request]
    ]
