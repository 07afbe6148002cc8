"""What can be told without a server; the rest is in tests/integration/test_discovery_etcd.py."""

from pathlib import Path

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from discovery.etcd import Credentials, EtcdClient, EtcdSettings, _ours, _prefix_end
from discovery.source import Unavailable


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (StatusCode.UNAVAILABLE, "Connection refused", "Unavailable"),
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", "Unavailable"),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "Unavailable"),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", "Unavailable"),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", "Unavailable"),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password", "Unavailable"),
        (StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", "Compacted"),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", "LeaseLost"),
        (StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", "_TokenRefused"),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", "_TokenRefused"),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", "_TokenRefused"),
        (StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 4)", "_TooLarge"),
    ],
)
def test_what_an_error_of_etcd_means(code, text, kind):
    ours = _ours(AioRpcError(code, Metadata(), Metadata(), details=text), "http://etcd:2379")
    assert type(ours).__name__ == kind


@pytest.mark.parametrize(("prefix", "end"), [(b"/a/", b"/a0"), (b"a", b"b")])
def test_the_end_of_a_prefix(prefix, end):
    assert _prefix_end(prefix) == end


async def test_nobody_listens():
    async with EtcdClient(EtcdSettings(("http://127.0.0.1:1", "http://127.0.0.1:2"))) as client:
        for port in (1, 2, 1):
            with pytest.raises(Unavailable, match=f"http://127.0.0.1:{port}: unavailable"):
                await client.grant(10)


async def test_credentials_are_asked_for_at_each_connection():
    given = []

    def credentials():
        given.append(Credentials())
        return given[-1]

    async with EtcdClient(EtcdSettings(("https://127.0.0.1:1",), tls=credentials)) as client:
        for times in (1, 2):
            with pytest.raises(Unavailable):
                await client.put("/k", b"v")
            assert len(given) == times


async def test_a_password_file_that_is_not_there_is_named():
    settings = EtcdSettings(("http://127.0.0.1:1",), username="weir", password_file=Path("/no/such"))
    async with EtcdClient(settings) as client:
        with pytest.raises(Unavailable, match=r"/no/such: No such file"):
            await client.keep_alive(1)


def test_settings_tell_no_secret():
    client = EtcdClient(EtcdSettings(("http://etcd:2379",), username="weir", password_file=Path("/run/pw")))
    assert repr(client) == "<EtcdClient http://etcd:2379 idle>"
