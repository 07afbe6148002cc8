"""The workloads of an operator's day: a limit that is met, a policy that is swapped, backends that come and go."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from benchmarks.etcd import Etcd
from benchmarks.figures import Figure, Round, admitted_share, micros_each, percentile
from benchmarks.gateways.gateway import BURST, LIMIT_PER_SECOND, LIMITED, OPEN, REFUSED
from benchmarks.gateways.weir import (
    CANARIES,
    POLICY,
    SERVICE,
    backend_key,
    canary,
    policy_with_canaries,
    registration,
)
from benchmarks.payloads import MODEL
from benchmarks.processes import HOST, Failed
from benchmarks.rig import Rig, Running
from benchmarks.workloads import CONNECTIONS, FAILED, Workload, loaded
from benchmarks.wrk import Target, Wrk

LIMIT_SECONDS = 10.0
REFILL_SECONDS = 2 * BURST / LIMIT_PER_SECOND
CHURN_BACKENDS = 1000
CHANGES_PER_SECOND = 50
CANARY_SECONDS = 5.0
CANARY_PAUSE = 0.05
CONNECT_SECONDS = 2.0
LOAD_CONNECTIONS = 16
"""Under churn: enough to see a pause, little enough that latency is not the queue."""


def limits(_: Rig, running: Running, seconds: float) -> Round:
    """Against a limit of LIMIT_PER_SECOND; then, for the price of a refusal, as a consumer who is always refused."""
    time.sleep(REFILL_SECONDS)  # the bucket is full when the time begins
    load, _cpu = loaded(running, running.target(consumer=LIMITED), CONNECTIONS, LIMIT_SECONDS)
    refusals, cpu = loaded(running, running.target(consumer=REFUSED), CONNECTIONS, seconds)
    return {
        "admitted": admitted_share(
            load.requests - load.refused, rate=LIMIT_PER_SECOND, burst=BURST, seconds=load.seconds
        ),
        "refusal_us": micros_each(cpu, refusals.requests),
        "refusals": refusals.per_second,
        "passed": refusals.requests - refusals.refused,
        "failed": load.broken + refusals.broken,
    }


def reload(_: Rig, running: Running, seconds: float) -> Round:
    """The same load twice: with the policy left alone, and with another one put there each second."""
    quiet, _cpu = loaded(running, running.target(), LOAD_CONNECTIONS, seconds)
    swapper = Wrk(running.target(), connections=LOAD_CONNECTIONS, seconds=seconds, folder=running.site.folder)
    before = running.usage()
    swaps = 0
    while swapper.is_running():
        swaps += 1
        put_policy(running, POLICY.replace("name: chat", f"name: {POLICY_MARK.format(swaps)}", 1))
        wait_in_force(running, POLICY_MARK.format(swaps))
        time.sleep(1.0)
    swapped = swapper.result()
    cpu = running.usage().cpu_seconds - before.cpu_seconds
    return {
        "quiet_p99_ms": quiet.p99_ms,
        "swapped_p99_ms": swapped.p99_ms,
        "cpu_us": micros_each(cpu, swapped.requests),
        "swaps": swaps,
        "failed": quiet.failed + swapped.failed,
    }


def churn(rig: Rig, running: Running, seconds: float) -> Round:
    """The same load twice before CHURN_BACKENDS backends: left alone, and with CHANGES_PER_SECOND changes."""
    put_policy(running, policy_with_canaries())
    wait_in_force(running, canary(CANARIES - 1))
    etcd = Etcd(rig.etcd)
    for number in range(CHURN_BACKENDS):
        etcd.put(*_backend(running, number, weight=1))
    wait_known(running, "churn-", CHURN_BACKENDS)
    _warm_up(rig, running, CONNECT_SECONDS)  # the first request to each backend makes a connection
    quiet, quiet_cpu = loaded(running, running.target(), LOAD_CONNECTIONS, seconds)
    before = running.usage()
    load = Wrk(running.target(), connections=LOAD_CONNECTIONS, seconds=seconds, folder=running.site.folder)
    with _changing(rig, running):
        lags = list(canary_lags(rig, running, load))
        busy = load.result()
    cpu = running.usage().cpu_seconds - before.cpu_seconds
    return {
        "quiet_us": micros_each(quiet_cpu, quiet.requests),
        "churned_us": micros_each(cpu, busy.requests),
        "quiet_p99_ms": quiet.p99_ms,
        "churned_p99_ms": busy.p99_ms,
        "lag_p50_ms": percentile(lags, 0.5) * 1e3,
        "lag_p99_ms": percentile(lags, 0.99) * 1e3,
        "lags": len(lags),
        "failed": quiet.failed + busy.failed,
    }


# A policy that is swapped

POLICY_MARK = "swap-{}"  # the name of its first route


def put_policy(running: Running, text: str) -> None:
    """Another policy by rename."""
    path = running.site.folder / "policy.yaml"
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def wait_in_force(running: Running, mark: str) -> None:
    """Until the gateway says that it serves by it: a swap that came to nothing would measure nothing."""
    _wait(f"the policy with {mark} in force", lambda: mark in _admin(running, "/api/routes"))


# Backends that come and go


def _backend(running: Running, number: int, *, weight: int) -> tuple[str, str]:
    url = f"{running.site.backends[number % 2]}/b{number}"
    return backend_key(running.site, SERVICE, f"churn-{number}"), registration(url, MODEL, weight=weight)


@contextmanager
def _changing(rig: Rig, running: Running) -> Iterator[None]:
    """Changes backends all the while: a new weight, away, back."""
    over = threading.Event()
    etcd = Etcd(rig.etcd)

    def change() -> None:
        due = time.monotonic()
        for step in itertools.count():
            number = step // 3 * 7 % CHURN_BACKENDS
            if step % 3 == 1:
                etcd.delete(_backend(running, number, weight=1)[0])
            else:
                etcd.put(*_backend(running, number, weight=2 - step % 3 // 2))
            due += 1 / CHANGES_PER_SECOND
            if over.wait(max(0.0, due - time.monotonic())):
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def canary_lags(rig: Rig, running: Running, load: Wrk) -> Iterator[float]:
    """How long each new backend took from its put to the first request that it answered.

    Each is the first and only one of a service of its own, so that it is chosen as soon as the gateway knows of it.
    """
    etcd = Etcd(rig.etcd)
    with closing(http.client.HTTPConnection(HOST, running.site.port, timeout=10)) as connection:
        while load.is_running():
            service = canary(next(_canaries))
            target = running.target(model=service)
            key = backend_key(running.site, service, "only")
            put = time.perf_counter()
            etcd.put(key, registration(running.site.backends[0], service))
            while not _is_answered(connection, target):
                if time.perf_counter() - put > CANARY_SECONDS:
                    raise Failed(
                        f"{running.gateway.name} did not choose a backend {CANARY_SECONDS:.0f} s after its put"
                    )
            yield time.perf_counter() - put
            etcd.delete(key)
            time.sleep(CANARY_PAUSE)


_canaries = itertools.count()


def _is_answered(connection: http.client.HTTPConnection, target: Target) -> bool:
    connection.request("POST", target.path, target.body, dict(target.headers))
    answer = connection.getresponse()
    answer.read()
    return answer.status == 200


def wait_known(running: Running, name: str, count: int) -> None:
    """Until that many backends whose names begin so can be chosen."""
    _wait(f"{count} backends {name}", lambda: _admin(running, "/api/backends").count(f'"{name}') >= count)


def _admin(running: Running, path: str) -> str:
    connection = http.client.HTTPConnection(HOST, running.site.admin_port, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def _wait(what: str, condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"no {what} after 20 s")
        time.sleep(0.02)


def _warm_up(_: Rig, running: Running, seconds: float) -> None:
    loaded(running, running.target(consumer=OPEN), CONNECTIONS, seconds)


LIMITS = Workload(
    "limits",
    f"{CONNECTIONS} connections against {LIMIT_PER_SECOND}/s, burst {BURST}, {LIMIT_SECONDS:.0f} s",
    (
        Figure("admitted", "", "admitted ÷ allowed", 3),
        Figure("refusal_us", "µs", "CPU per refusal"),
        Figure("refusals", "/s", "refusals", 0),
        Figure("passed", "", "passed when refused", 0),
        FAILED,
    ),
    limits,
    _warm_up,
    only=frozenset({"weir", "weir_python", "envoy_full"}),
)
RELOAD = Workload(
    "reload",
    f"{LOAD_CONNECTIONS} connections, policy swapped each second",
    (
        Figure("quiet_p99_ms", "ms", "p99 left alone", 2),
        Figure("swapped_p99_ms", "ms", "p99 swapped", 2),
        Figure("cpu_us", "µs", "CPU per request"),
        Figure("swaps", "", "swaps", 0),
        FAILED,
    ),
    reload,
    _warm_up,
    only=frozenset({"weir", "weir_python"}),
)
CHURN = Workload(
    "churn",
    f"{CHURN_BACKENDS} backends in etcd, {CHANGES_PER_SECOND} changes/s, {LOAD_CONNECTIONS} connections",
    (
        Figure("quiet_us", "µs", "CPU left alone"),
        Figure("churned_us", "µs", "CPU churned"),
        Figure("quiet_p99_ms", "ms", "p99 left alone", 2),
        Figure("churned_p99_ms", "ms", "p99 churned", 2),
        Figure("lag_p50_ms", "ms", "lag p50"),
        Figure("lag_p99_ms", "ms", "lag p99"),
        Figure("lags", "", "lags", 0),
        FAILED,
    ),
    churn,
    _warm_up,
    only=frozenset({"weir", "weir_python"}),
)
