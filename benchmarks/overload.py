"""The workload of a bad day: three times as many requests as the backends can take.

The backends take AT_ONCE requests at a time, 100 ms each: AT_ONCE / 0.1 a second are their capacity, and whoever comes
beyond is to be refused. A client waits 100 ms before each request, as one that was refused should: so CLIENTS fill the
backends, served for half of their time, and with OVERLOAD_CLIENTS half of the time of as many is left for refusals, of
which twice the capacity are due. Goodput should not fall, refusals should cost little, and health should still answer.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.etcd import Etcd
from benchmarks.figures import Figure, Round, micros_each, percentile
from benchmarks.gateways.gateway import AT_ONCE, NARROW
from benchmarks.gateways.weir import POLICY_WITH_NARROW, backend_key, registration
from benchmarks.operations import put_policy, wait_in_force, wait_known
from benchmarks.payloads import MODEL
from benchmarks.processes import HOST
from benchmarks.rig import Rig, Running
from benchmarks.workloads import Workload, loaded
from benchmarks.wrk import Load

PAUSE_MS = 100
CLIENTS = 2 * AT_ONCE
OVERLOAD_CLIENTS = 2 * CLIENTS
LOOK_SECONDS = 0.05
OURS = frozenset({"weir", "weir_python"})


def overload(_: Rig, running: Running, seconds: float) -> Round:
    """The same clients as the backends can take; then twice as many, who ask for three times as much."""
    target = running.target(consumer=NARROW, stream=True)
    fair, fair_cpu = loaded(running, target, CLIENTS, seconds, PAUSE_MS)
    with _watched(running) as health:
        much, much_cpu = loaded(running, target, OVERLOAD_CLIENTS, seconds, PAUSE_MS)
    measured = told(fair, fair_cpu, much, much_cpu)
    if health.seconds:
        measured["health_p99_ms"] = percentile(health.seconds, 0.99) * 1e3
        measured["failed"] += health.failed
    return measured


def told(fair: Load, fair_cpu: float, much: Load, much_cpu: float) -> dict[str, float]:
    """The figures of a load that can be borne and of one that cannot, with the CPU seconds that each took.

    What a refusal costs is what is left of the CPU when the requests that were served are paid as they were before.
    """
    served, still_served = fair.requests - fair.refused, much.requests - much.refused
    paid = fair_cpu * still_served / served if served else 0.0
    return {
        "goodput": served / fair.seconds,
        "goodput_over": still_served / much.seconds,
        "offered": much.per_second / (served / fair.seconds) if served else 0.0,
        "refusal_us": micros_each(max(0.0, much_cpu - paid), much.refused),
        "failed": fair.broken + much.broken,
    }


@dataclass(slots=True)
class Health:
    """How long the gateway took each time it was asked how it is, and how often it did not say that it is well."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    def look(self, port: int, path: str) -> None:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(HOST, port, timeout=10)
        try:
            connection.request("GET", path)
            self.failed += connection.getresponse().status != 200
        except OSError:
            self.failed += 1
        finally:
            connection.close()
        self.seconds.append(time.perf_counter() - began)


@contextmanager
def _watched(running: Running) -> Iterator[Health]:
    """Asks all the while: on the data port, on the admin port, and for the metrics. Only ours is known to answer."""
    health, over = Health(), threading.Event()
    places = [
        (running.site.port, "/healthz"),
        (running.site.admin_port, "/readyz"),
        (running.site.admin_port, "/metrics"),
    ]

    def watch() -> None:
        while not over.is_set():
            for port, path in places:
                health.look(port, path)
                over.wait(LOOK_SECONDS if path != "/metrics" else 10 * LOOK_SECONDS)

    if running.gateway.name not in OURS:
        yield health
        return
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield health
    finally:
        over.set()
        thread.join()


def warm_up(rig: Rig, running: Running, seconds: float) -> None:
    """Half of what the backends take may go to each; Envoy counts for both together."""
    if running.gateway.name in OURS:
        put_policy(running, POLICY_WITH_NARROW)
        wait_in_force(running, NARROW)
        etcd = Etcd(rig.etcd)
        for number, url in enumerate(running.site.backends):
            key = backend_key(running.site, NARROW, f"narrow-{number}")
            etcd.put(key, registration(url, MODEL, max_concurrency=AT_ONCE // 2))
        wait_known(running, "narrow-", len(running.site.backends))
    loaded(running, running.target(consumer=NARROW, stream=True), CLIENTS, seconds, PAUSE_MS)


OVERLOAD = Workload(
    "overload",
    f"backends for {AT_ONCE} requests of 100 ms at a time; {CLIENTS} clients, then {OVERLOAD_CLIENTS}",
    (
        Figure("goodput", "/s", "goodput at capacity", 0),
        Figure("goodput_over", "/s", "goodput at overload", 0),
        Figure("offered", "", "offered ÷ capacity", 2),
        Figure("refusal_us", "µs", "CPU per refusal"),
        Figure("health_p99_ms", "ms", "health p99", 1),
        Figure("failed", "", "failed", 0),
    ),
    overload,
    warm_up,
    "brief",
    only=OURS | {"envoy_router", "envoy_full"},
)
