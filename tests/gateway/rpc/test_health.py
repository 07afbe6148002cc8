"""What counts as health over gRPC, asked of a backend on the loopback interface."""

import grpc
import pytest

from discovery.probe import Checked
from discovery.store import Snapshot
from gateway.certificates import Pem
from gateway.rpc.health import GrpcProbe, speaking_grpc
from tests.support.certificates import Authority
from tests.support.grpc_backend import NOT_SERVING, SERVING, GrpcBackend
from tests.support.ports import silent_listener
from tests.support.upstream import endpoint

pytestmark = pytest.mark.integration


async def checked(port, pem=Pem(), **fields) -> Checked:  # noqa: B008  frozen
    return await GrpcProbe(lambda: pem)(endpoint(grpc_port=port, **fields))


@pytest.mark.parametrize(
    ("answer", "service", "is_passing", "reason"),
    [
        (SERVING, None, True, "gRPC: SERVING"),
        (SERVING, "model/tiny@1", True, "gRPC: SERVING"),
        (NOT_SERVING, None, False, "gRPC: NOT_SERVING"),
        (b"", None, False, "gRPC: UNKNOWN"),
        (b"\x08\x63", None, False, "gRPC: the answer is not one to grpc.health.v1"),
        (b"\xff\xff", None, False, "gRPC: the answer is not one to grpc.health.v1"),
        (b"\x0a" * 8192, None, False, "gRPC: RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.UNIMPLEMENTED, None, True, "gRPC: UNIMPLEMENTED"),
        (grpc.StatusCode.UNIMPLEMENTED, "model/tiny@1", False, "gRPC: UNIMPLEMENTED"),
        (grpc.StatusCode.NOT_FOUND, "model/tiny@1", False, "gRPC: NOT_FOUND"),
        (grpc.StatusCode.UNAVAILABLE, None, False, "gRPC: UNAVAILABLE"),
    ],
)
async def test_what_counts_as_health(answer, service, is_passing, reason):
    async with GrpcBackend() as backend:
        backend.health = answer
        assert await checked(backend.port, grpc_health=service) == Checked(is_passing, reason)
        asked = service.encode() if service else b""
        assert backend.health_asked == [b"\x0a%c%b" % (len(asked), asked) if asked else b""]


async def test_nobody_there_and_silence():
    async with GrpcBackend() as backend:
        await backend.stop()
        assert await checked(backend.port) == Checked(False, "gRPC: cannot connect")
    with silent_listener() as port:
        assert await checked(port) == Checked(False, "gRPC: no answer within 1 s")


async def test_a_tls_backend_is_checked_by_name(tmp_path):
    authority = Authority(tmp_path)
    pem = authority.issue("backend", ["gpu.example"])
    credentials = grpc.ssl_server_credentials([(pem.key.read_bytes(), pem.cert.read_bytes())])
    believing = Pem(ca=authority.cert.read_bytes())
    async with GrpcBackend(credentials=credentials) as backend:
        place = {"scheme": "https", "address": "127.0.0.1"}
        assert await checked(backend.port, believing, host="gpu.example", **place) == Checked(True, "gRPC: SERVING")
        assert not (await checked(backend.port, believing, host="other.example", **place)).is_passing


def test_only_those_that_have_a_port_are_asked():
    one, two = endpoint("tiny/a", grpc_port=9), endpoint("tiny/b")
    assert speaking_grpc(Snapshot(1, {one.key: one, two.key: two})).endpoints == {one.key: one}
