"""Whether backends can serve over gRPC: what `discovery/probe.py` asks over HTTP, asked of their gRPC port.

The two are known apart. A backend whose HTTP is well and whose gRPC is dead gets requests over HTTP and no calls, and
the other way round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import AioRpcError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from discovery.endpoint import Endpoint
from discovery.probe import TIMEOUT_SECONDS, Checked
from discovery.store import Snapshot
from gateway.certificates import Pem
from gateway.rpc.channels import Channel

MAX_ANSWER_BYTES: Final = 4096
_CHECK: Final = "/grpc.health.v1.Health/Check"


class GrpcProbe:
    """One check, on a connection of its own to the pinned address. `pem` gives what is shown and believed."""

    def __init__(self, pem: Callable[[], Pem]) -> None:
        self._pem = pem

    async def __call__(self, endpoint: Endpoint) -> Checked:
        channel = Channel(endpoint, MAX_ANSWER_BYTES, self._pem)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                if not await channel.is_ready():
                    return Checked(False, "gRPC: cannot connect")
                asked = HealthCheckRequest(service=endpoint.grpc_health or "")
                return _judged(await channel.unary(_CHECK)(asked.SerializeToString()))
        except TimeoutError:
            return Checked(False, f"gRPC: no answer within {TIMEOUT_SECONDS:g} s")
        except AioRpcError as error:
            # One that knows nothing of health could be asked, and that is all that can be known of it
            is_without = error.code() is grpc.StatusCode.UNIMPLEMENTED and endpoint.grpc_health is None
            return Checked(is_without, f"gRPC: {error.code().name}")
        finally:
            channel.close()


def _judged(answer: object) -> Checked:
    try:
        status = HealthCheckResponse.FromString(answer)
        name = HealthCheckResponse.ServingStatus.Name(status.status)
    except (DecodeError, TypeError, ValueError):
        return Checked(False, "gRPC: the answer is not one to grpc.health.v1")
    return Checked(name == "SERVING", f"gRPC: {name}")


def speaking_grpc(snapshot: Snapshot) -> Snapshot:
    """Those of them that have a port for gRPC."""
    speaking = {key: one for key, one in snapshot.endpoints.items() if one.grpc_port is not None}
    return replace(snapshot, endpoints=speaking)
