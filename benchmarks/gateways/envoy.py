"""Envoy, twice: as a bare router, and with the filters that do what Weir does.

Full is jwt_authn (RS256, its token cache on), local_ratelimit, outlier_detection and the OpenTelemetry tracer at 1 %
over OTLP/HTTP. Its limits are each process's own, where Weir's are shared through Redis; it writes no access log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.credentials import AUDIENCE, ISSUER
from benchmarks.gateways.gateway import (
    AT_ONCE,
    BURST,
    CONSUMER,
    LIMIT_PER_SECOND,
    LIMITED,
    NARROW,
    PEERS,
    REFUSED,
    Launch,
    Site,
    bearer,
)
from benchmarks.processes import HOST

Json = dict[str, Any]

TYPES = "type.googleapis.com/envoy"
LOCAL_RATELIMIT = "envoy.filters.http.local_ratelimit"
UNLIMITED = 100_000_000


def binary() -> Path | None:
    """The real program inside the package: its command is a Python script that turns into it."""
    return next(iter((PEERS / "envoy").glob("lib/python*/site-packages/envoy/_bin/envoy")), None)


@dataclass(frozen=True, slots=True)
class Envoy:
    full: bool

    @property
    def name(self) -> str:
        return "envoy_full" if self.full else "envoy_router"

    @property
    def features(self) -> str:
        if self.full:
            return "JWT RS256 with token cache, local rate limit, outlier detection, least request, 1 % traces"
        return "router, least request"

    def absent(self) -> str | None:
        return None if binary() else "not installed (make bench-peers)"

    def launch(self, site: Site) -> Launch | None:
        config = site.folder / "envoy.json"
        config.write_text(json.dumps(self._config(site)))
        flags = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
        return Launch((str(binary()), "-c", str(config), *flags))

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return {**bearer(site, consumer), CONSUMER: consumer}

    def _config(self, site: Site) -> Json:
        backends = _cluster("backends", site.backend_ports)
        if self.full:
            backends["outlier_detection"] = {"consecutive_5xx": 20, "base_ejection_time": "5s"}
        narrow = _cluster("narrow", site.backend_ports)
        narrow["circuit_breakers"]["thresholds"][0]["max_requests"] = AT_ONCE
        clusters = [backends, narrow, _cluster("otlp", (int(site.otlp.rpartition(":")[2]),))]
        address = {"socket_address": {"address": HOST, "port_value": site.port}}
        chain = {"filters": [_typed("envoy.filters.network.http_connection_manager", self._connections(site))]}
        listener = {"name": "data", "address": address, "filter_chains": [chain]}
        return {"static_resources": {"listeners": [listener], "clusters": clusters}}

    def _connections(self, site: Site) -> Json:
        router = _typed("envoy.filters.http.router", {"@type": f"{TYPES}.extensions.filters.http.router.v3.Router"})
        kind = f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        plain = {"@type": kind, "stat_prefix": "data", "codec_type": "HTTP1"}
        narrow = _route({"headers": [_is_from(NARROW)]}, "narrow")
        if not self.full:
            routes = {"name": "all", "virtual_hosts": [_host([narrow, _route()])]}
            return {**plain, "route_config": routes, "http_filters": [router]}
        limits = [_limited(REFUSED, 1, 1, "3600s"), _limited(LIMITED, BURST, LIMIT_PER_SECOND // 20, "0.05s")]
        return {
            **plain,
            "route_config": {"name": "all", "virtual_hosts": [_host([*limits, narrow, _route()])]},
            "http_filters": [_jwt(site), _typed(LOCAL_RATELIMIT, _bucket(UNLIMITED, UNLIMITED, "1s")), router],
            "tracing": _tracing(),
        }


def _typed(name: str, config: Json) -> Json:
    return {"name": name, "typed_config": config}


def _route(match: Json | None = None, cluster: str = "backends") -> Json:
    return {"match": {"prefix": "/", **(match or {})}, "route": {"cluster": cluster, "timeout": "600s"}}


def _is_from(consumer: str) -> Json:
    return {"name": CONSUMER, "string_match": {"exact": consumer}}


def _host(routes: list[Json]) -> Json:
    return {"name": "all", "domains": ["*"], "routes": routes}


def _limited(consumer: str, capacity: int, fill: int, interval: str) -> Json:
    return {
        **_route({"headers": [_is_from(consumer)]}),
        "typed_per_filter_config": {LOCAL_RATELIMIT: _bucket(capacity, fill, interval)},
    }


def _bucket(capacity: int, fill: int, interval: str) -> Json:
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return {
        "@type": f"{TYPES}.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "limit",
        "token_bucket": {"max_tokens": capacity, "tokens_per_fill": fill, "fill_interval": interval},
        "filter_enabled": always,
        "filter_enforced": always,
    }


def _jwt(site: Site) -> Json:
    provider = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "forward": True,
        "local_jwks": {"inline_string": site.credentials.jwks.decode()},
        "jwt_cache_config": {"jwt_cache_size": 1000},
    }
    rule = {"match": {"prefix": "/"}, "requires": {"provider_name": "bench"}}
    kind = f"{TYPES}.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
    return _typed("envoy.filters.http.jwt_authn", {"@type": kind, "providers": {"bench": provider}, "rules": [rule]})


def _tracing() -> Json:
    export = {"http_uri": {"uri": "http://otlp/v1/traces", "cluster": "otlp", "timeout": "1s"}}
    kind = f"{TYPES}.config.trace.v3.OpenTelemetryConfig"
    return {
        "random_sampling": {"value": 1.0},
        "provider": _typed("envoy.tracers.opentelemetry", {"@type": kind, "http_service": export, "service_name": "e"}),
    }


def _cluster(name: str, ports: tuple[int, ...]) -> Json:
    plenty = {"max_connections": 65536, "max_pending_requests": 65536, "max_requests": 65536}
    places = [{"socket_address": {"address": HOST, "port_value": port}} for port in ports]
    return {
        "name": name,
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [plenty]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": place}} for place in places]}],
        },
    }
