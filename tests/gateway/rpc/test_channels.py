"""Channels to a backend on the loopback interface."""

import asyncio

import grpc
import pytest

from gateway.certificates import Pem
from gateway.rpc.channels import Channel
from tests.support.certificates import Authority
from tests.support.grpc_backend import GrpcBackend, infer, inferred
from tests.support.running_gateway import until
from tests.support.upstream import endpoint

pytestmark = pytest.mark.integration

NAME = "/inference.GRPCInferenceService/ModelInfer"


def channel_to(port: int, pem: Pem = Pem(), **fields) -> Channel:  # noqa: B008  frozen
    return Channel(endpoint(grpc_port=port, **fields), 1000, lambda: pem)


async def test_it_goes_to_the_pinned_address_under_the_registered_name() -> None:
    async with GrpcBackend() as backend:
        channel = channel_to(backend.port, host="nowhere.invalid", address="127.0.0.1")
        with channel:
            assert await channel.is_ready()
            assert await channel.unary(NAME)(infer()) == inferred()
            assert channel.unary(NAME) is channel.unary(NAME)
            assert repr(channel) == "<Channel 1 under way>"
        channel.close()


async def test_one_that_cannot_connect_says_so_at_once() -> None:
    async with GrpcBackend() as backend:
        await backend.stop()
        channel = channel_to(backend.port)
        assert not await channel.is_ready()
        channel.close()


async def test_what_is_under_way_may_end_after_its_close() -> None:
    go = asyncio.Event()

    async def wait(message, context):
        await go.wait()
        return inferred()

    async with GrpcBackend(wait) as backend:
        channel = channel_to(backend.port)
        with channel:
            await channel.is_ready()
            call = channel.unary(NAME)(infer())
            await until(lambda: backend.open)
            channel.close()
            go.set()
            assert await call == inferred()
        await until(channel._closing.done)


@pytest.mark.parametrize(("host", "is_believed"), [("model.example", True), ("other.example", False)])
async def test_over_tls_the_certificate_must_name_the_host(tmp_path, host, is_believed) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("backend", ["model.example"])
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
    async with GrpcBackend(credentials=credentials) as backend:
        channel = channel_to(backend.port, Pem(ca=authority.cert.read_bytes()), scheme="https", host=host)
        assert await channel.is_ready() is is_believed
        channel.close()
