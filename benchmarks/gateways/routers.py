"""The routers of vLLM and SGLang: Rust programs with a Python command line. Neither checks tokens or limits here."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gateways.gateway import PEERS, Launch, Site, bearer
from benchmarks.processes import HOST


@dataclass(frozen=True, slots=True)
class Router:
    name: str
    module: str
    flags: tuple[str, ...]
    features: str = "round robin, health checks, circuit breaker; no authentication, no limits"

    def absent(self) -> str | None:
        return None if (PEERS / self.name / "bin" / "python").exists() else "not installed (make bench-peers)"

    def launch(self, site: Site) -> Launch | None:
        python = str(PEERS / self.name / "bin" / "python")
        place = ("--host", HOST, "--port", str(site.port), "--prometheus-port", str(site.admin_port))
        work = ("--worker-urls", *site.backends, "--policy", "round_robin", "--log-level", "error")
        # One worker thread, as every gateway here has one core.
        return Launch((python, "-m", self.module, *place, *work, *self.flags), {"TOKIO_WORKER_THREADS": "1"})

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return bearer(site, consumer)


def vllm_router() -> Router:
    return Router("vllm_router", "vllm_router.launch_router", ("--max-concurrent-requests", "65536"))


def sglang_router() -> Router:
    return Router("sglang_router", "sglang_router.launch_router", ("--max-concurrent-requests", "65536"))
