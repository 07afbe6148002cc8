"""What happened, as records. The core knows these; metrics, traces and logs subscribe to them.

All durations are seconds. No field may carry a token, a prompt, an answer or a backend's address.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from observability.request import RequestEnded


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One try at one backend. `started` is seconds after the request's start."""

    backend: str  # the id in discovery
    service: str
    started: float
    connect: float
    duration: float
    outcome: str  # ok | connect_fail | connect_timeout | upstream_reset | upstream_timeout | upstream_protocol | ...
    status: int  # 0: none came
    span_id: str


END_REASONS = (
    "ok", "client_abort", "client_slow", "parse_error", "auth", "policy", "rate_limited", "shed", "no_backend",
    "breaker_open", "connect_fail", "upstream_reset", "upstream_timeout", "upstream_protocol", "upstream_error",
    "stream_truncated", "drain", "internal",
)  # fmt: skip


class BreakerChanged(msgspec.Struct, frozen=True):
    service: str
    backend: str
    state: str  # closed | open | half_open


class DiscoveryRejected(msgspec.Struct, frozen=True):
    """A registration that was ignored. `key` is truncated to 200 characters of printable ASCII."""

    key: str
    reason: str


class DiscoveryResynced(msgspec.Struct, frozen=True):
    """of: backends | gateways | policies."""

    reason: str  # start | compacted | cluster_changed | lost | frozen | periodic
    revision: int
    of: str


class DiscoveryState(msgspec.Struct, frozen=True):
    """state: cold | watching | stale; of: backends | gateways | policies."""

    state: str
    reason: str  # why it is cold or stale, "" otherwise
    of: str


class BackendHealth(msgspec.Struct, frozen=True):
    service: str
    backend: str
    healthy: bool
    reason: str


class PolicyReloaded(msgspec.Struct, frozen=True):
    """result: ok | invalid | unreadable. `errors` are the lines that `weir policy check` would print."""

    result: str
    version: str
    errors: tuple[str, ...] = ()


class StoreChanged(msgspec.Struct, frozen=True):
    """Redis went away or came back."""

    up: bool
    reason: str


class KeysRefreshed(msgspec.Struct, frozen=True):
    """result: ok | failed | rejected."""

    issuer: str
    result: str
    reason: str = ""


class OverloadChanged(msgspec.Struct, frozen=True):
    """state: normal | no_keep_alive | shedding; reason: event loop | memory, "" when normal."""

    state: str
    reason: str


class CertificatesRead(msgspec.Struct, frozen=True):
    """What is used for TLS was read anew. use: listener | backends | etcd | redis. result: ok | refused.

    Refused: what was in force stays. `expires` is a date as in RFC 3339, "" where only authorities are named.
    """

    use: str
    result: str
    reason: str = ""
    expires: str = ""


class HandshakeFailed(msgspec.Struct, frozen=True):
    """A client that spoke no TLS that is accepted. `reason` is one of a few words, `detail` OpenSSL's text."""

    reason: str  # no_certificate | certificate_refused | refused_by_client | old_version | not_tls | timeout | ...
    detail: str = ""


Event = (
    BreakerChanged | DiscoveryRejected | DiscoveryResynced | DiscoveryState | BackendHealth
    | PolicyReloaded | StoreChanged | KeysRefreshed | OverloadChanged | CertificatesRead | HandshakeFailed
)  # fmt: skip
Observer = Callable[[Event], None]
RequestObserver = Callable[[RequestEnded], None]
