"""Gateways that translate between providers: LiteLLM (Python) and Portkey (Node.js). Each with one worker."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateways.gateway import PEERS, Launch, Site, bearer
from benchmarks.payloads import MODEL
from benchmarks.processes import HOST

LITELLM_KEY = "sk-bench"


@dataclass(frozen=True, slots=True)
class LiteLLM:
    name: str = "litellm"
    features: str = (
        "one static key (its JWT is for the paid edition), router over two deployments; no limits, no traces"
    )

    def absent(self) -> str | None:
        return None if (PEERS / self.name / "bin" / "litellm").exists() else "not installed (make bench-peers)"

    def launch(self, site: Site) -> Launch | None:
        deployments = [
            {
                "model_name": MODEL,
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "k"},
            }
            for url in site.backends
        ]
        config = site.folder / "litellm.json"  # YAML holds JSON
        config.write_text(json.dumps({"model_list": deployments, "general_settings": {"master_key": LITELLM_KEY}}))
        command = str(PEERS / self.name / "bin" / "litellm")
        place = ("--host", HOST, "--port", str(site.port), "--num_workers", "1")
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
        return Launch((command, "--config", str(config), *place), quiet)

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return {**bearer(site, consumer), "Authorization": f"Bearer {LITELLM_KEY}"}


@dataclass(frozen=True, slots=True)
class Portkey:
    name: str = "portkey"
    features: str = "load balance over two targets; no authentication, no limits, no traces"

    def absent(self) -> str | None:
        if shutil.which("node") is None:
            return "no node"
        return None if self._script().exists() else "not installed (make bench-peers)"

    def _script(self) -> Path:
        return PEERS / self.name / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"

    def launch(self, site: Site) -> Launch | None:
        trusted = {"TRUSTED_CUSTOM_HOSTS": HOST, "NODE_ENV": "production", "PORT": str(site.port)}
        return Launch(
            (shutil.which("node") or "node", str(self._script()), "--headless", f"--port={site.port}"), trusted
        )

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        targets = [{"provider": "openai", "custom_host": f"{url}/v1", "api_key": "k"} for url in site.backends]
        config = {"strategy": {"mode": "loadbalance"}, "targets": targets}
        return {**bearer(site, consumer), "x-portkey-config": json.dumps(config)}
