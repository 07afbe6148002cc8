"""Weir, everything on: JWT, limits in Redis, breaker, balancing over backends from etcd, metrics, 1 % of traces.

Twice: with its data path compiled, as it is run where CPU counts (`make compiled`), and as Python.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.credentials import AUDIENCE, ISSUER
from benchmarks.etcd import Etcd
from benchmarks.gateways.gateway import (
    BURST,
    CONSUMER,
    LIMIT_PER_SECOND,
    LIMITED,
    NARROW,
    REFUSED,
    Launch,
    Site,
    bearer,
)
from benchmarks.payloads import MODEL
from benchmarks.processes import HOST

SERVICE = "bench"

POLICY = f"""\
version: 1
issuers:
  - {{issuer: "{ISSUER}", audience: {AUDIENCE}, algorithms: [RS256], jwks: jwks.json}}
plans:
  open: {{requests: 1000000/second, burst: 100000, concurrency: 20000}}
  limited: {{requests: {LIMIT_PER_SECOND}/second, burst: {BURST}}}
  refused: {{requests: 1/day, burst: 1}}
consumers:
  - {{match: {{consumer: {LIMITED}}}, plan: limited}}
  - {{match: {{consumer: {REFUSED}}}, plan: refused}}
  - {{match: {{any: true}}, plan: open}}
routes:
  - name: chat
    match: {{path: /v1/chat/completions, model: "{MODEL}*"}}
    to: [{{service: {SERVICE}}}]
"""

POLICY_WITH_NARROW = POLICY.replace(
    "routes:\n",
    f"routes:\n  - {{name: narrow, match: {{header: {{{CONSUMER}: {NARROW}}}}}, to: [{{service: {NARROW}}}]}}\n",
)
"""Before the others, a route for the consumer NARROW, to the service of that name."""

CANARIES = 500


def canary(number: int) -> str:
    """A service, and the model that is routed to it, that nobody else uses."""
    return f"canary-{number % CANARIES}"


def policy_with_canaries() -> str:
    """POLICY with a route to the service of each canary behind the others."""
    routes = (
        f"  - name: {canary(number)}\n"
        f"    match: {{path: /v1/chat/completions, model: {canary(number)}}}\n"
        f"    to: [{{service: {canary(number)}}}]\n"
        for number in range(CANARIES)
    )
    return POLICY + "".join(routes)


ROOT = Path(__file__).parent.parent.parent
COMPILED = ROOT / "build" / "compiled"
PACKAGES = ("gateway", "discovery", "policies", "observability")


@dataclass(frozen=True, slots=True)
class Weir:
    is_compiled: bool
    features: str = (
        "JWT RS256 with token cache, limits shared through Redis, breaker, least load over backends from etcd, "
        "metrics, 1 % traces, usage metering, access log"
    )

    @property
    def name(self) -> str:
        return "weir" if self.is_compiled else "weir_python"

    def absent(self) -> str | None:
        if not self.is_compiled:
            return None
        made = COMPILED / ".made"
        if not made.exists():
            return "not compiled (make compiled)"
        newest = max(path.stat().st_mtime for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
        return "compiled from older sources (make compiled)" if newest > made.stat().st_mtime else None

    def launch(self, site: Site) -> Launch | None:
        (site.folder / "policy.yaml").write_text(POLICY)
        (site.folder / "jwks.json").write_bytes(site.credentials.jwks)
        config = {
            "listen": f"{HOST}:{site.port}",
            "admin": {"listen": f"{HOST}:{site.admin_port}"},
            "policy": "policy.yaml",
            "discovery": {"etcd": {"endpoints": [site.etcd], "prefix": prefix(site)}},
            "redis": {"url": site.redis},
            "telemetry": {"otlp": site.otlp, "sample": 0.01},
        }
        (site.folder / "weir.yaml").write_text(json.dumps(config, indent=2))  # YAML holds JSON
        etcd = Etcd(site.etcd)
        for number, url in enumerate(site.backends):
            etcd.put(backend_key(site, SERVICE, f"b{number}"), registration(url, MODEL))
        root = str(COMPILED if self.is_compiled else ROOT)
        command = (sys.executable, "-m", "gateway.cli", "serve", "--config", str(site.folder / "weir.yaml"))
        return Launch(command, {"PYTHONPATH": root})

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return {**bearer(site, consumer), **({CONSUMER: NARROW} if consumer == NARROW else {})}


def prefix(site: Site) -> str:
    """Each start has its own part of etcd."""
    return f"/bench/{site.port}"


def backend_key(site: Site, service: str, name: str) -> str:
    return f"{prefix(site)}/backends/{service}/{name}"


def registration(url: str, model: str, *, weight: int = 1, max_concurrency: int | None = None) -> str:
    told = {"url": url, "protocols": ["openai"], "models": [{"name": model}], "weight": weight}
    return json.dumps({**told, "max_concurrency": max_concurrency})
