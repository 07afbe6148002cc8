"""How a gateway ends: not ready, no new connections, then what is under way has its time, then it is told and cut."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.attempts import Forwarder
    from gateway.pipeline import Pipeline
    from gateway.rpc.listener import RpcListener
    from gateway.server import DataServer

ACCEPT_SECONDS = 5.0  # how long a gateway that was told to stop still accepts, so that balancers get to know
DRAIN_SECONDS = 60.0


async def drain(
    pipeline: Pipeline, forwarder: Forwarder, listener: asyncio.Server, server: DataServer, grpc: RpcListener | None
) -> None:
    """Let what is under way end; what will not, or may not because a second signal cancelled this, is told and cut."""
    pipeline.draining = True
    try:
        if server.connections or grpc is not None:
            await asyncio.sleep(ACCEPT_SECONDS if pipeline.inflight else 0)
        listener.close()
        server.close_idle()
        if grpc is not None:
            grpc.stop_accepting()
        await wait_idle(pipeline, DRAIN_SECONDS)
    finally:
        listener.close()
        for relay in tuple(forwarder.relays):
            relay.drain()
        if grpc is not None:
            grpc.drain()
        await wait_idle(pipeline, 1.0)
        server.abort()
        await wait_idle(pipeline, 1.0)  # each request has its record before the log closes


async def wait_idle(pipeline: Pipeline, seconds: float) -> None:
    """Until no request is in flight; so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while pipeline.inflight:  # noqa: ASYNC110  a poll at the end costs less than an event in each request
                await asyncio.sleep(0.05)
