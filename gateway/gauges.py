"""What the metrics read from the gateway's parts when they are scraped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from observability.metrics import BREAKER_VALUES, Metrics

if TYPE_CHECKING:
    from discovery.discovery import Discovery
    from gateway.certificates import Certificates
    from gateway.identify import Identifier
    from gateway.keys import KeyStore
    from gateway.memory import Memory
    from gateway.pipeline import Pipeline
    from gateway.reload import PolicySource
    from gateway.server import DataServer
    from gateway.store import RedisStore
    from gateway.upstream.fleet import Fleet
    from gateway.upstream.load_stream import LoadStreams
    from policies.overload import Overload

Samples = Iterable[tuple[tuple[str, ...], float]]

OVERLOAD_VALUES = {"normal": 0.0, "no_keep_alive": 1.0, "shedding": 2.0}  # what weir_overload_state says


def register_gauges(
    metrics: Metrics,
    pipeline: Pipeline,
    server: DataServer,
    fleet: Fleet,
    discovery: Discovery,
    policy: PolicySource,
    store: RedisStore | None,
    loop_lag: Callable[[], float],
    certificates: Collection[Certificates],
) -> None:
    """Tell the metrics where to look."""
    watch = discovery.watch
    metrics.gauge("weir_inflight", "Requests being served.", (), _one(lambda: pipeline.inflight))
    metrics.gauge("weir_connections", "Open client connections.", (), _one(lambda: len(server.connections)))
    metrics.counter(
        "weir_connections_refused_total",
        "Client connections closed at once because limits.connections was reached.",
        (),
        _one(lambda: server.refused_connections),
    )
    metrics.gauge("weir_tasks", "Tasks of the event loop.", (), _one(lambda: len(asyncio.all_tasks())))
    metrics.gauge("weir_backends", "Backends known to discovery.", ("service", "state"), lambda: _backends(fleet))
    metrics.gauge(
        "weir_breaker_state",
        "Circuit breaker of a backend: 0 closed, 1 half open, 2 open.",
        ("service", "backend"),
        lambda: [
            ((backend.endpoint.service, backend.endpoint.id), BREAKER_VALUES[backend.breaker_state.value])
            for backend in fleet.backends.values()
        ],
    )
    metrics.gauge("weir_discovery_revision", "Newest revision of etcd that is known.", (), _one(lambda: watch.revision))
    metrics.gauge(
        "weir_discovery_lag_seconds",
        "Seconds since discovery last heard from its source.",
        (),
        _one(lambda: watch.seconds_since_contact),
    )
    metrics.gauge(
        "weir_discovery_held",
        "Backends that vanished together with most others and stay in service while their health check passes.",
        (),
        _one(lambda: discovery.store.statistics().held),
    )
    metrics.gauge("weir_policy_info", "The policy in force.", ("version",), lambda: [((policy.policy.version,), 1.0)])
    if store is not None:
        metrics.gauge("weir_store_up", "Whether Redis answers: 1 or 0.", (), _one(lambda: float(store.up)))
    metrics.gauge(
        "weir_tls_certificate_expires_timestamp_seconds",
        "When the certificate in force stops being valid, in Unix seconds.",
        ("use",),
        lambda: [((one.use,), one.in_force.expires_at) for one in certificates if one.in_force.expires_at is not None],
    )
    metrics.gauge("weir_loop_lag_seconds", "Worst delay of the event loop in the last 10 s.", (), _one(loop_lag))


def register_load(metrics: Metrics, overload: Overload, memory: Memory) -> None:
    """Tell the metrics how much the process has to do."""
    metrics.gauge(
        "weir_overload_state",
        "0 normal, 1 connections are not kept, 2 new requests are refused.",
        (),
        _one(lambda: OVERLOAD_VALUES[overload.state]),
    )
    metrics.gauge(
        "weir_memory_used_ratio", "Share in use of the memory that the cgroup may use.", (), _one(memory.share)
    )


def register_load_streams(metrics: Metrics, streams: LoadStreams) -> None:
    """Tell the metrics how well backends that push their load are heard."""
    metrics.gauge("weir_load_streams", "Backends whose load stream is heard.", (), _one(lambda: streams.connected))
    metrics.counter(
        "weir_load_reports_total",
        "Reports of their load that backends pushed: taken, old (a newer one was known) or nonsense.",
        ("result",),
        lambda: [((result,), float(count)) for result, count in streams.counts.items()],
    )


def register_identity(metrics: Metrics, keys: KeyStore, identifier: Identifier) -> None:
    """Tell the metrics what is known of issuers and callers."""
    metrics.gauge(
        "weir_jwks_age_seconds",
        "Seconds since the keys of an issuer were last read well.",
        ("issuer",),
        lambda: [((status.issuer,), status.age) for status in keys.statistics() if status.age is not None],
    )
    metrics.gauge(
        "weir_clock_skew_seconds",
        "How far our clock is ahead of an issuer's.",
        ("issuer",),
        lambda: [((status.issuer,), status.skew) for status in keys.statistics() if status.skew is not None],
    )
    metrics.gauge(
        "weir_tokens_remembered",
        "Tokens that need not be looked at again, by what was found: verified or refused.",
        ("found",),
        lambda: [((found,), float(count)) for found, count in identifier.statistics().items()],
    )


def _one(read: Callable[[], float | None]) -> Callable[[], Samples]:
    """A sample without labels, or none."""

    def samples() -> Samples:
        value = read()
        return [] if value is None else [((), float(value))]

    return samples


def _backends(fleet: Fleet) -> Samples:
    counts: Counter[tuple[str, str]] = Counter()
    for backend in fleet.backends.values():
        health = "unknown" if backend.healthy is None else "healthy" if backend.healthy else "unhealthy"
        counts[backend.endpoint.service, "draining" if backend.endpoint.draining else health] += 1
    return [(labels, float(count)) for labels, count in counts.items()]
