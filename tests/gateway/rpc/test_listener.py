"""The listener for gRPC and what clients could do to it: real sockets, the whole gateway behind them."""

import asyncio
import socket
import ssl
import struct
import subprocess
import sys

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.children import CannotRun
from gateway.rpc.listener import MOST_CALLS, SPARE_BYTES
from tests.support.admin_client import scrape
from tests.support.certificates import Authority
from tests.support.grpc_backend import PREFACE, GrpcBackend, data, frame, grpc_gateway, headers, infer, inferred, reset
from tests.support.running_gateway import running_gateway, until

pytestmark = pytest.mark.integration

INFER = b"/inference.GRPCInferenceService/ModelInfer"


async def spoken(address, *said: bytes, wanted: bytes = b"", seconds: float = 0.3) -> bytes:
    """What somebody is told who says this, until it is `wanted`, he is cut off, or has stayed quiet for so long."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"".join(said))
    heard = b""
    try:
        async with asyncio.timeout(seconds):
            while not (wanted and wanted in heard) and (part := await reader.read(65536)):
                heard += part
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return heard


async def test_no_hostile_client_ends_anybody_elses_calls(tmp_path, capfd) -> None:
    go = asyncio.Event()

    async def wait(message, context):
        await go.wait()
        return inferred()

    async with GrpcBackend(wait) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        call = asyncio.ensure_future(caller.ask(timeout=60))
        await until(lambda: backend.open)
        secret = (b"authorization", b"Bearer s3cr3t\xff")
        hostile = (
            [PREFACE, frame(4, 0, 0, b""), headers(1, b"/\xff\xfe"), data(1, b"")],  # grpc.aio's server ends with it
            [PREFACE, frame(4, 0, 0, b""), headers(1, b"nothing"), data(1, b"")],
            [PREFACE, frame(4, 0, 0, b""), headers(1, INFER, (b"x-a", b"\xff\xfe"), secret), data(1, infer())],
            [PREFACE, frame(4, 0, 0, b""), headers(1, INFER, (b"grpc-timeout", b"junk")), data(1, infer())],
            [PREFACE, frame(4, 0, 0, b""), headers(1, INFER), frame(0, 1, 1, b"\x07\xff\xff\xff\xff")],
            [PREFACE, frame(4, 0, 0, b""), headers(1, INFER), frame(0, 1, 1, b"")],
            [PREFACE, frame(4, 0, 0, b""), headers(1, INFER), data(1, b"\xff" * 1000)],
            [PREFACE, frame(4, 0, 0, b""), headers(1, b"/grpc.health.v1.Health/Check"), data(1, b"\xff" * 1000)],
            [PREFACE, frame(4, 0, 0, b""), *[headers(n, INFER) + reset(n) for n in range(1, 400, 2)]],
            [PREFACE, frame(4, 0, 0, b""), *[frame(6, 0, 0, b"12345678")] * 1000],  # pings
            [PREFACE, frame(4, 0, 0, b""), *[frame(4, 0, 0, b"")] * 1000],  # settings
            [PREFACE, frame(1, 0, 1, b"\0"), *[frame(9, 0, 1, b"\0\x01a\x7f" + b"b" * 127)] * 500],  # no end of a head
            [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"],
            [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500],
            [b"\0" * 5000],
        )
        await asyncio.gather(*(spoken(gateway.grpc_address, *said) for said in hostile))
        assert not call.done()
        go.set()
        assert await call == inferred()
        await until(lambda: not gateway.pipeline.inflight and not backend.open)
        assert await caller.ask() == inferred()
        assert (await scrape(gateway)).value("weir_inflight") == 0
    told = capfd.readouterr()
    assert "s3cr3t" not in told.out + told.err
    assert "Traceback" not in told.out + told.err


async def test_a_stranger_is_told_that_there_is_no_such_method(tmp_path) -> None:
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend) as (gateway, _):
        said, wanted = (PREFACE, frame(4, 0, 0, b""), headers(1, b"/\xff\xfe"), data(1, b"")), b"grpc-status\x0212"
        assert wanted in await spoken(gateway.grpc_address, *said, wanted=wanted, seconds=60)


async def test_sizes_have_bounds(tmp_path) -> None:
    config = "limits: {body: 1KiB, header: 4KiB}\n"
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend, config=config) as (gateway, caller):
        assert await caller.ask(infer(raw_input_contents=[b"x" * 900])) == inferred()
        for size in (2000, SPARE_BYTES + 2000):
            refused = await caller.refused(infer(raw_input_contents=[b"x" * size]))
            assert (refused.code, "larger than" in refused.details) == ("RESOURCE_EXHAUSTED", True)
        assert (await caller.refused(**{f"x_{number}": "y" for number in range(101)})).code == "RESOURCE_EXHAUSTED"
        assert (await caller.refused(x_large="y" * 20_000)).code == "RESOURCE_EXHAUSTED"
        packed = caller.channel.unary_unary(INFER.decode())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await packed(infer(raw_input_contents=[b"x" * 900]), compression=grpc.Compression.Gzip)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert len(backend.messages) == 1

        async def large(message, context):
            return inferred(raw_output_contents=[b"x" * 2000])

        backend.script = large
        assert (await caller.refused()).trailers["x-weir-code"] == "upstream_failed"


async def test_so_many_calls_at_a_time_on_one_connection(tmp_path) -> None:
    async def wait(message, context):
        await asyncio.sleep(60)

    async with GrpcBackend(wait) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        calls = [caller.call(timeout=None) for _ in range(MOST_CALLS + 10)]
        await until(lambda: gateway.pipeline.inflight == MOST_CALLS)
        for call in calls:
            call.cancel()
        await until(lambda: not gateway.pipeline.inflight and not backend.open)


async def test_a_message_must_come_in_time_and_nothing_is_read_before_its_sender_is_known(tmp_path) -> None:
    policy = """
version: 1
anonymous: true
plans: {none: {concurrency: 1}}
consumers: [{match: {any: true}, plan: none}]
routes: [{name: all, to: [{service: tiny}]}]
"""
    config = "limits: {body_timeout: 200ms}\n"
    async with (
        GrpcBackend() as backend,
        grpc_gateway(tmp_path, backend, config=config, policy=policy) as (gateway, caller),
    ):
        stream = caller.stream(timeout=None)
        with pytest.raises(grpc.aio.AioRpcError, match="did not come within"):
            await stream.read()
        assert await stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not backend.messages
        reader, writer = await asyncio.open_connection(gateway.grpc_address.host, gateway.grpc_address.port)
        writer.write(
            PREFACE + frame(4, 0, 0, b"") + headers(1, INFER, (b"authorization", b"Basic x"), (b"authorization", b"y"))
        )
        writer.write(frame(0, 0, 1, b"\0" + struct.pack("!I", 30_000_000) + b"x" * 10_000))
        heard = b""
        async with asyncio.timeout(10):
            while b"at most one Authorization" not in heard:
                heard += await reader.read(65536)
        writer.close()


async def test_what_anybody_may_ask_costs_little(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.rpc.listener.MOST_WATCHES", 2)
    check = b"/grpc.health.v1.Health/Check"
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        reader, writer = await asyncio.open_connection(gateway.grpc_address.host, gateway.grpc_address.port)
        writer.write(PREFACE + frame(4, 0, 0, b""))
        for number in range(1, 41, 2):  # each would fill memory with a message that never ends
            writer.write(headers(number, check) + frame(0, 0, number, b"\0" + struct.pack("!I", 30_000_000)))
        health = health_pb2_grpc.HealthStub(caller.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)  # its turn comes
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        writer.close()
        with pytest.raises(grpc.aio.AioRpcError, match="no message of this method"):
            await caller.channel.unary_unary(check.decode())(b"\xff", timeout=10)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError, match="At most 2 may watch"):
            await health.Watch(health_pb2.HealthCheckRequest()).read()


async def test_a_client_that_does_not_read_keeps_its_place_and_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.rpc.attempt.CLIENT_STALL_SECONDS", 0.5)

    async def pour(message, context):
        for _ in range(1000):
            await context.write(inferred(raw_output_contents=[b"x" * 1_000_000]))

    async with GrpcBackend(pour) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        reader, writer = await asyncio.open_connection(gateway.grpc_address.host, gateway.grpc_address.port)
        stream = b"/inference.GRPCInferenceService/ModelStreamInfer"
        writer.write(PREFACE + frame(4, 0, 0, b"") + headers(1, stream) + data(1, infer()))
        await until(lambda: backend.open)
        await until(lambda: not gateway.pipeline.inflight and not backend.open)
        metrics = await scrape(gateway)
        assert (
            metrics.value("weir_requests_total", route="chat", service="tiny", status="408", reason="client_slow") == 1
        )
        writer.close()


async def test_over_tls_with_clients_certificates_and_a_renewed_one(tmp_path) -> None:
    (tmp_path / "ca").mkdir()
    authority = Authority(tmp_path / "ca")
    shown, later = authority.issue("gateway", ["localhost"]), authority.issue("later", ["localhost"])
    client = authority.issue("client", ["client"])
    tls = f"tls: {{cert: {shown.cert}, key: {shown.key}, client_ca: {authority.cert}}}\n"
    ca = authority.cert.read_bytes()
    with_own = grpc.ssl_channel_credentials(ca, client.key.read_bytes(), client.cert.read_bytes())
    async with GrpcBackend() as backend:
        async with grpc_gateway(tmp_path, backend, config=tls, credentials=with_own) as (gateway, caller):
            assert await caller.ask() == inferred()
            assert backend.metadata[0]["x-forwarded-proto"] == "https"
            async with type(caller)(gateway.grpc_address, grpc.ssl_channel_credentials(ca)) as stranger:
                assert (await stranger.refused(timeout=5)).code == "UNAVAILABLE"
            before = gateway.certificates["listener"].in_force
            later.put_in_place_of(shown)
            await until(lambda: gateway.certificates["listener"].in_force is not before)
            place = (gateway.grpc_address.host, gateway.grpc_address.port)
            told = await asyncio.to_thread(serial_shown, place, authority, client)
            assert told == later.serial
            assert await caller.ask() == inferred()


def serial_shown(place, authority, client) -> int:
    context = ssl.create_default_context(cafile=authority.cert)
    context.load_cert_chain(client.cert, client.key)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(place) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True)).serial_number


async def test_a_port_that_is_taken(tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotRun, match=f"cannot listen on 127.0.0.1:{port}: .*; set another `grpc.listen`"):
            async with running_gateway(tmp_path, config=f"grpc: {{listen: 127.0.0.1:{port}}}\n"):
                pass


def test_without_it_nothing_of_it_is_loaded() -> None:
    look = "import gateway.app, sys; print([n for n in sys.modules if n.startswith(('gateway.rpc', 'open_inference', 'grpc_health.v1'))])"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout == "[]\n"
