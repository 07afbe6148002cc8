"""Certificates as they are renewed on a real disk, and whatever else may lie where one should."""

import asyncio
import contextlib
import os
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as form

from gateway import certificates as module
from gateway.certificates import (
    Certificates,
    Files,
    InvalidCertificates,
    Pem,
    client_context,
    named_in,
    server_context,
    system_context,
)
from gateway.config import parse
from observability.events import CertificatesRead
from tests.support.certificates import Authority

FAST = {"poll": 0.002, "settle": 0.002}
WALL = 4_000_000_000.0  # after every certificate of a test


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def files_of(issued, ca=None) -> Files:
    return Files(issued.cert, issued.key, ca)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


class Kept:
    """Certificates that run, and what was told of them."""

    def __init__(self, files, make=server_context, wall=lambda: 0.0) -> None:
        self.told: list[CertificatesRead] = []
        self.certificates = Certificates("listener", files, make, self.told.append, wall, **FAST)
        self.changes: list[ssl.SSLContext] = []
        self.certificates.subscribe(lambda: self.changes.append(self.certificates.context()))

    @contextlib.asynccontextmanager
    async def running(self):
        await self.certificates.start()
        task = asyncio.create_task(self.certificates.run())
        try:
            yield self
        finally:
            task.cancel()

    @property
    def results(self):
        return [each.result for each in self.told]

    async def wait_told(self, count) -> CertificatesRead:
        await until(lambda: len(self.told) >= count)
        return self.told[-1]


# In force, and changed


async def test_a_renewed_pair_is_put_in_force_whole_and_told(authority):
    pair = authority.issue("gateway", ["127.0.0.1"])
    kept = Kept(files_of(pair))
    async with kept.running():
        before = kept.certificates.context()
        authority.issue("renewed", ["127.0.0.1"]).put_in_place_of(pair)
        told = await kept.wait_told(2)
        assert told.result == "ok"
        assert kept.certificates.context() is not before
        assert kept.changes == [before, kept.certificates.context()]
        assert kept.certificates.in_force.pem.cert == pair.cert.read_bytes()


async def test_a_directory_swapped_by_a_symlink_as_kubernetes_does_it(authority, tmp_path):
    for name in ("one", "two"):
        issued = authority.issue(name, ["127.0.0.1"])
        folder = tmp_path / f"..{name}"
        folder.mkdir()
        issued.cert.rename(folder / "tls.crt")
        issued.key.rename(folder / "tls.key")
    (tmp_path / "..data").symlink_to("..one")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    kept = Kept(Files(tmp_path / "tls.crt", tmp_path / "tls.key"))
    async with kept.running():
        (tmp_path / "..new").symlink_to("..two")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await until(lambda: kept.certificates.in_force.pem.cert == (tmp_path / "..two" / "tls.crt").read_bytes())
        assert kept.results == ["ok", "ok"]  # never one's certificate with the other's key


async def test_the_same_bytes_are_no_change_and_told_only_when_asked(authority):
    pair = authority.issue("gateway", ["127.0.0.1"])
    kept = Kept(files_of(pair))
    async with kept.running():
        before = kept.certificates.context()
        pair.put_in_place_of(pair)
        kept.certificates.reload()
        await kept.wait_told(2)
        assert kept.certificates.context() is before
        assert kept.results == ["ok", "ok"]


async def test_files_swapped_while_they_are_loaded_count_for_nothing(authority, monkeypatch):
    """OpenSSL reads by path: here it finds a key that is not the one that was read before it."""
    pair, next_pair = authority.issue("gateway", ["127.0.0.1"]), authority.issue("next", ["127.0.0.1"])
    kept = Kept(files_of(pair))
    loads = []

    def swap_then_load(files, pem, make):
        if not loads:
            next_pair.put_in_place_of(pair)
        loads.append(pem)
        return load(files, pem, make)

    async with kept.running():
        load = module._load
        monkeypatch.setattr(module, "_load", swap_then_load)
        authority.issue("between", ["127.0.0.1"]).put_in_place_of(pair)
        await kept.wait_told(2)
        assert kept.results == ["ok", "ok"]
        assert kept.certificates.in_force.pem.cert == next_pair.cert.read_bytes()
        assert len(loads) == 2


# Refused


def key_of_another(pair, other):
    pair.key.write_bytes(other.key.read_bytes())


def cut(pair, other):
    pair.cert.write_bytes(pair.cert.read_bytes()[:200])


def no_pem(pair, other):
    pair.cert.write_bytes(b"\x30\x82" * 100)


def no_key(pair, other):
    pair.key.write_bytes(pair.cert.read_bytes())


def gone(pair, other):
    pair.key.unlink()


def encrypted(pair, other):
    key = form.load_pem_private_key(pair.key.read_bytes(), None)
    secret = form.BestAvailableEncryption(b"hunter2")
    pair.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, secret))


def a_pipe(pair, other):
    pair.key.unlink()
    os.mkfifo(pair.key)


def emptied(pair, other):
    pair.cert.write_bytes(b"")


BROKEN = [
    (key_of_another, "{key} is not the key of {cert}"),
    (cut, "{cert} with {key}: "),
    (no_pem, "{cert} holds no certificate in PEM form"),
    (no_key, "{key} holds no private key in PEM form"),
    (gone, "{key} cannot be read: No such file or directory"),
    (a_pipe, "{key} cannot be read: not a regular file"),
    (encrypted, "{key} is encrypted; give the key without a passphrase, readable to Weir alone"),
    (emptied, "{cert} holds no certificate in PEM form"),
]


@pytest.mark.parametrize(("spoil", "says"), BROKEN)
async def test_a_broken_pair_changes_nothing_and_is_told_once(authority, monkeypatch, spoil, says):
    pair, other = authority.issue("gateway", ["127.0.0.1"]), authority.issue("other", ["127.0.0.1"])
    kept, read = Kept(files_of(pair)), module._read
    async with kept.running():
        before = kept.certificates.context()
        spoil(pair, other)
        told = await kept.wait_told(2)
        assert told.result == "refused"
        assert told.reason.startswith(says.format(cert=pair.cert, key=pair.key))
        assert "hunter2" not in told.reason
        looks = []
        monkeypatch.setattr(module, "_read", lambda files: (looks.append(files), read(files))[1])
        await until(lambda: len(looks) > 5)
        assert kept.results == ["ok", "refused"]
        assert kept.certificates.context() is before
        other.put_in_place_of(pair)
        assert (await kept.wait_told(3)).result == "ok"


@pytest.mark.parametrize(("spoil", "says"), BROKEN)
async def test_a_broken_pair_at_the_start_is_one_line(authority, spoil, says):
    pair, other = authority.issue("gateway", ["127.0.0.1"]), authority.issue("other", ["127.0.0.1"])
    spoil(pair, other)
    with pytest.raises(InvalidCertificates) as caught:
        await Kept(files_of(pair)).certificates.start()
    assert str(caught.value).startswith(says.format(cert=pair.cert, key=pair.key))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"])
async def test_authorities_that_are_none_are_refused(authority, tmp_path, text):
    pair, ca = authority.issue("gateway", ["127.0.0.1"]), tmp_path / "clients.pem"
    ca.write_bytes(text)
    for make in (server_context, client_context):
        with pytest.raises(InvalidCertificates, match=r"clients\.pem holds no certificates in PEM form"):
            await Kept(files_of(pair, ca), make).certificates.start()


def test_what_goes_together():
    with pytest.raises(InvalidCertificates, match="a certificate and its key go together"):
        client_context(Files(key=Path("k")), Pem(key=b"x"))


# Time


async def test_one_that_has_expired_is_used_at_the_start_and_said_so(authority):
    pair = authority.issue("gateway", ["127.0.0.1"], days=-1)
    kept = Kept(files_of(pair), wall=lambda: WALL)
    await kept.certificates.start()
    [told] = kept.told
    assert (told.result, told.reason) == ("ok", f"{pair.cert} has expired")
    assert told.expires.endswith("Z")


async def test_one_that_has_expired_does_not_replace_one_that_has_not(authority):
    pair = authority.issue("gateway", ["127.0.0.1"])
    kept = Kept(files_of(pair))
    await kept.certificates.start()
    ends = kept.certificates.in_force.expires_at
    old = authority.issue("old", ["127.0.0.1"], days=-1)
    kept.certificates._wall = lambda: ends - 1
    old.put_in_place_of(pair)
    await kept.certificates._judge(module._read(files_of(pair)))
    assert kept.told[-1].reason == f"{pair.cert} has expired"
    assert kept.results == ["ok", "refused"]
    assert kept.certificates.in_force.expires_at == ends


# Contexts


def test_what_every_context_has(authority):
    pair = authority.issue("gateway", ["127.0.0.1"])
    files = files_of(pair, authority.cert)
    pem = module._read(files)
    for context in (server_context(files, pem), client_context(files, pem), system_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
    assert client_context(files, pem).check_hostname
    assert system_context().check_hostname
    assert server_context(files_of(pair), module._read(files_of(pair))).verify_mode is ssl.CERT_NONE


def test_session_keys_are_written_nowhere(authority, monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    pair = authority.issue("gateway", ["127.0.0.1"])
    assert server_context(files_of(pair), module._read(files_of(pair))).keylog_filename is None
    assert client_context(Files(), Pem()).keylog_filename is None
    assert not os.path.exists(tmp_path / "keys")


def test_no_repr_shows_a_key(authority):
    pair = authority.issue("gateway", ["127.0.0.1"])
    loaded = module._load(files_of(pair), module._read(files_of(pair)), server_context)
    assert "PRIVATE" not in repr(loaded)
    assert repr(Kept(files_of(pair)).certificates) == "<Certificates listener unread>"


# What weir.yaml names


def test_each_use_has_its_files(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).write_text("x")
    text = f"""
policy: p.yaml
tls: {{cert: a, key: b, client_ca: c}}
discovery:
  etcd: {{endpoints: ["https://e:1"], ca: d, cert: e, key: f}}
  tls: {{ca: g}}
redis: {{url: "rediss://r?ssl_ca_certs={tmp_path}/h"}}
"""
    at = tmp_path
    assert named_in(parse(text.encode(), {}, base=at)) == [
        ("listener", "tls", Files(at / "a", at / "b", at / "c")),
        ("backends", "discovery.tls", Files(None, None, at / "g")),
        ("etcd", "discovery.etcd", Files(at / "e", at / "f", at / "d")),
        ("redis", "redis.url", Files(None, None, at / "h")),
    ]


def test_nothing_named_is_nothing_watched(tmp_path):
    text = 'policy: p.yaml\ndiscovery: {etcd: {endpoints: "https://e:1"}}\nredis: {url: "rediss://r"}\n'
    assert named_in(parse(text.encode(), {}, base=tmp_path)) == []
