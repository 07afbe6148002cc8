"""What the admin listener shows under /api/: plain documents, made when somebody asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from re import Pattern
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discovery.discovery import Discovery
    from gateway.reload import PolicySource
    from gateway.upstream.endpoint import Backend
    from gateway.upstream.fleet import Fleet
    from observability.recent import Recent
    from policies.policy import Route


def views(
    fleet: Fleet, discovery: Discovery, policy: PolicySource, recent: Recent
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of the document -> what makes it."""
    return {
        "backends": lambda: {
            "backends": [_backend(fleet.backends[key]) for key in sorted(fleet.backends)],
            "discovery": _discovery(discovery),
        },
        "routes": lambda: {"routes": [_route(route) for route in policy.policy.routes]},
        "policy": lambda: _policy(policy),
        "requests": lambda: {"requests": recent.requests()},
    }


def _discovery(discovery: Discovery) -> dict[str, Any]:
    watch = discovery.watch
    return {
        "state": watch.state.value,
        "revision": watch.revision,
        "stale_seconds": round(watch.seconds_since_contact, 3) if watch.seconds_since_contact is not None else None,
    }


def _backend(backend: Backend) -> dict[str, Any]:
    endpoint = backend.endpoint
    return {
        "service": endpoint.service,
        "id": endpoint.id,
        "url": f"{endpoint.scheme}://{endpoint.authority}{endpoint.base_path}",
        "grpc_port": endpoint.grpc_port,
        "models": [{"name": model.name, "version": model.version} for model in endpoint.models],
        "state": "draining" if endpoint.draining else "serving",
        "healthy": backend.healthy is True,
        "grpc_healthy": backend.grpc_healthy,
        "breaker": backend.breaker_state.value,
        "inflight": backend.inflight,
        "weight": endpoint.weight,
        "zone": endpoint.zone,
        "reported_load": backend.reported,
    }


def _route(route: Route) -> dict[str, Any]:
    match, allow = route.match, route.allow
    return {
        "name": route.name,
        "match": {
            "path": as_glob(match.path) if match.path else None,
            "model": as_glob(match.model) if match.model else None,
            "header": dict(match.headers),
        },
        "allow": [
            *(f"group:{name}" for name in sorted(allow.groups)),
            *(f"consumer:{name}" for name in sorted(allow.consumers)),
            *(f"scope:{name}" for name in sorted(allow.scopes)),
            *(f"model:{as_glob(pattern)}" for pattern in allow.models),
        ],
        "to": [{"service": to.service, "version": to.version, "weight": to.weight} for to in route.to],
        "balance": route.balance.kind.value,
    }


# What fnmatch.translate makes of a glob, piece by piece: a star, a class of one character, an escaped one, a bracket.
_PIECES = re.compile(r"(?P<star>\(\?>\.\*\?|\.\*)|\[\\?(?P<one>.)\]|\\(?P<escaped>.)|(?P<bracket>[()])", re.DOTALL)


def as_glob(pattern: Pattern[str]) -> str:
    """The glob that a route's pattern was compiled from: what the operator wrote."""
    inner = pattern.pattern.removeprefix("(?s:").removesuffix(r")\Z")
    return _PIECES.sub(lambda piece: "*" if piece["star"] else piece["one"] or piece["escaped"] or "", inner)


def _policy(source: PolicySource) -> dict[str, Any]:
    error = source.last_error
    return {
        "version": source.policy.version,
        "loaded_at": source.loaded_at,
        "source": source.name,
        "last_error": {"errors": error.errors, "at": error.at} if error else None,
    }
