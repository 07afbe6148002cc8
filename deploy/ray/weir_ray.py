"""The reference backend as a Ray Serve deployment: Ray decides how many run, and on which machines.

    serve run deploy.ray.weir_ray:build model=tiny etcd=http://127.0.0.1:2379

A replica keeps one `python -m reference_backend` running, which registers itself in etcd; gateways find it there and
send to it directly. So no request passes Ray's proxy, and what Ray knows of the load is what the backend reports of it
(docs/backend.md): `ByLoad` makes of that how many replicas there should be.

A replica is healthy while its backend is. When Ray stops it, the backend is told to end: it withdraws its registration,
finishes what it has, and is waited for. When the replica is killed, the kernel tells the backend to end.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import urllib.request
from typing import Any

import ray
from ray import serve

STATS = ("running", "waiting", "max_running")  # of the load report: what `ByLoad` needs
FINISH_SECONDS = 70.0  # a backend that is told to end takes 60 for what is in flight


class BackendEnded(RuntimeError):  # noqa: N818  what has happened
    """The backend of this replica is gone: Ray replaces the replica."""


class ByLoad:
    """How many replicas there should be: as many as keep each at `share` of the requests it can run at a time."""

    def __init__(self, share: float = 0.7) -> None:
        self._share = share

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The policy, as Ray calls it: with what each replica has recorded, averaged over the look-back period."""
        told = context.aggregated_metrics or {}
        requests = sum(told.get("running", {}).values()) + sum(told.get("waiting", {}).values())
        places = list(told.get("max_running", {}).values())
        return replicas_for(requests, sum(places) / len(places) if places else 0.0, self._share, context), {}


def replicas_for(requests: float, places: float, share: float, context: Any) -> int:
    """Replicas for so many requests, where each has so many places; what there is while nobody has told."""
    if not places:
        return context.target_num_replicas
    wanted = math.ceil(requests / (share * places))
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)


@serve.deployment(
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=FINISH_SECONDS,
    health_check_period_s=5,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 8,
        "look_back_period_s": 15,
        "upscale_delay_s": 5,
        "downscale_delay_s": 300,
        "policy": {"policy_function": ByLoad},
    },
)
class Backend:
    """One backend process. `arguments` are those of `python -m reference_backend`; it listens where its node is."""

    def __init__(self, arguments: list[str], python: str = sys.executable) -> None:
        host = [] if "--host" in arguments else ["--host", ray.util.get_node_ip_address()]
        command = [python, "-m", "reference_backend", *host, *arguments]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said.startswith("serving "):
            raise BackendEnded(f"the backend has ended with exit code {self._process.wait()}; its log says why")
        self.url = said.split()[3]

    async def check_health(self) -> None:
        """Raises when this replica should be replaced."""
        await asyncio.to_thread(self._get, "/health")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray asks of each replica, for the policy below."""
        event = await asyncio.to_thread(self._get, "/load/stream")
        report = json.loads(event.removeprefix(b"data: "))
        return {name: float(report[name]) for name in STATS}

    async def __call__(self) -> dict[str, str]:
        """Where the backend is, for whoever asks Ray: requests go there, or to a gateway."""
        return {"url": self.url}

    def _get(self, path: str) -> bytes:
        if self._process.poll() is not None:
            raise BackendEnded(f"exit code {self._process.returncode}")
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return response.readline()

    async def __del__(self) -> None:
        self._process.terminate()
        await asyncio.to_thread(self._process.wait, FINISH_SECONDS)


def build(options: dict[str, str]) -> serve.Application:
    """The application, from `model=... etcd=...` and any other option of the backend; `python` is who runs it."""
    options = dict(options)
    python = options.pop("python", sys.executable)
    return Backend.bind([word for name, value in options.items() for word in (f"--{name}", value)], python)
