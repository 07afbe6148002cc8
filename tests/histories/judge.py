"""All checks of one history, with the numbers that its world was run with."""

from __future__ import annotations

from tests.histories import checks, recording_gateway, world
from tests.histories.history import History

SLACK_SECONDS = 1.0  # for etcd, sockets and the pace of snapshots (0.1 s), on a machine that does other things, too
GRACE_SECONDS = recording_gateway.GRACE_SECONDS + recording_gateway.DAMPING_SECONDS + SLACK_SECONDS
RECOVERY_SECONDS = 3.0  # to find etcd or Redis again: the longest delay between two tries, connecting, and the slack


def judge(history: History, *, charges: int | None) -> list[str]:
    """What is wrong with it. `charges`: how many tokens may be lacking for nothing; None: Redis has forgotten some."""
    requests = {each.request: each for each in history.answered}
    admitted = [
        (requests[each.request].sent, requests[each.request].ended)
        for each in history.ended
        if each.consumer == "paced" and checks.is_charged(each)
    ]
    recovery = RECOVERY_SECONDS + history.stall
    allowances = checks.limit_allowances(
        history.troubles, len(history.gateways), world.PACED_BURST, world.PACED_RATE, recovery
    )
    return [
        *vacuous(history),
        *checks.requests_told_twice(history),
        *checks.windows_over_limit(admitted, world.PACED_BURST, world.PACED_RATE, allowances),
        *checks.views_that_go_back(history.views),
        *checks.last_views_that_differ(history.views, history.gateways, history.registered),
        *checks.attempts_too_late(history, GRACE_SECONDS + history.stall, recovery),
        *checks.probes_too_many(history, world.PROBES),
        *([] if charges is None else checks.charges_that_differ(history, "counted", may_be_more=charges)),
    ]


def vacuous(history: History) -> list[str]:
    """Why the history says nothing."""
    found = []
    for gateway in history.gateways:
        served = sum(each.gateway == gateway and each.status == 200 for each in history.answered)
        views = sum(view.gateway == gateway for view in history.views)
        if served < 50 or views < 3:
            found.append(f"{gateway} served {served} requests and had {views} views: too few to judge by")
    if not history.breakers:
        found.append("no breaker opened")
    return found
