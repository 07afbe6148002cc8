"""The run: each workload before each gateway, in turn A B C A B C, so that a noisy minute meets all of them alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.figures import Figure, Round, Spread, spreads
from benchmarks.gateways.gateway import Gateway
from benchmarks.operations import CHURN, LIMITS, RELOAD
from benchmarks.overload import OVERLOAD
from benchmarks.processes import Failed
from benchmarks.rig import Rig, Running
from benchmarks.workloads import IDLE, LATENCY, MANY, STREAM, UNARY, Workload

WORKLOADS = {each.id: each for each in (UNARY, LATENCY, STREAM, MANY, IDLE, LIMITS, OVERLOAD, RELOAD, CHURN)}
WARM_UP_SECONDS = 2.0
RSS = Figure("rss_end_mib", "MiB", "RSS", 0)
OTHERS = Figure("others_percent", "%", "others on its core", 0)
MIB = 1 << 20

Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """What one workload gave: the rounds of each gateway, and why others have none."""

    workload: Workload
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def spreads(self) -> dict[str, dict[str, Spread]]:
        return {name: spreads(rounds) for name, rounds in self.rounds.items() if rounds}


def run(rig: Rig, workload: Workload, gateways: Sequence[Gateway], rounds: int, seconds: float, say: Say) -> Outcome:
    """All rounds of one workload. A gateway that fails drops out, with the reason told."""
    outcome = Outcome(workload)
    chosen = [each for each in gateways if workload.only is None or each.name in workload.only]
    with contextlib.ExitStack() as stack:
        backends = stack.enter_context(_backends(rig, workload))
        under_test: dict[str, Running] = {}
        for gateway in chosen:
            with _dropping_out(outcome, under_test, gateway.name, say):
                is_stream = workload.backends != "json"
                running = stack.enter_context(rig.running(gateway, backends, stream=is_stream))
                workload.warm_up(rig, running, WARM_UP_SECONDS)
                under_test[gateway.name] = running
        for number in range(1, rounds + 1):
            for name, running in list(under_test.items()):
                with _dropping_out(outcome, under_test, name, say):
                    measured = _measured(rig, workload, running, seconds)
                    outcome.rounds.setdefault(name, []).append(measured)
                    say(f"{workload.id} {number}/{rounds} {name}: {told(workload, measured)}")
    return outcome


def _measured(rig: Rig, workload: Workload, running: Running, seconds: float) -> Round:
    """One round, with how much of the gateway's core others took meanwhile."""
    clock, busy, before = time.monotonic(), running.core_busy_seconds(), running.usage()
    measured = workload.measure(rig, running, seconds)
    after = running.usage()
    others = running.core_busy_seconds() - busy - (after.cpu_seconds - before.cpu_seconds)
    return {
        **measured,
        "others_percent": max(0.0, 100 * others / (time.monotonic() - clock)),
        "rss_start_mib": running.idle.rss_bytes / MIB,
        "rss_end_mib": after.rss_bytes / MIB,
    }


def told(workload: Workload, measured: Round) -> str:
    """One round in one line."""
    return ", ".join(
        f"{figure.title} {measured[figure.name]:.{figure.digits}f} {figure.unit}".rstrip()
        for figure in workload.figures
        if figure.name in measured
    )


@contextlib.contextmanager
def _dropping_out(outcome: Outcome, under_test: dict[str, Running], name: str, say: Say):  # type: ignore[no-untyped-def]
    try:
        yield
    except Failed as failure:
        under_test.pop(name, None)
        outcome.missing[name] = str(failure)
        say(f"{outcome.workload.id} {name}: {failure}")


def _backends(rig: Rig, workload: Workload):  # type: ignore[no-untyped-def]
    if workload.backends == "json":
        return rig.json()
    return rig.events(workload.backends)
