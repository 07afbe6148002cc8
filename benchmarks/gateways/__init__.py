"""The gateways that can be measured, by name. Each file says how one kind of them is configured and started."""

from __future__ import annotations

from benchmarks.gateways.envoy import Envoy
from benchmarks.gateways.gateway import Gateway
from benchmarks.gateways.libraries import LiteLLM, Portkey
from benchmarks.gateways.plain import Direct, HAProxy, Nginx
from benchmarks.gateways.routers import sglang_router, vllm_router
from benchmarks.gateways.weir import Weir

ALL: tuple[Gateway, ...] = (
    Direct(),
    Nginx(),
    HAProxy(),
    Envoy(full=False),
    Envoy(full=True),
    vllm_router(),
    sglang_router(),
    Portkey(),
    LiteLLM(),
    Weir(is_compiled=True),
    Weir(is_compiled=False),
)
BY_NAME = {gateway.name: gateway for gateway in ALL}
