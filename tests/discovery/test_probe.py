import asyncio
import contextlib
import socket
import ssl
from contextlib import asynccontextmanager
from random import Random
from types import MappingProxyType

import pytest

from discovery.endpoint import Endpoint
from discovery.probe import Checked, HttpProbe, Pace, Prober, Tally, health_paths
from discovery.source import Health, HealthChanged
from discovery.store import Snapshot
from tests.support.certificates import Authority, client_tls, server_tls
from tests.support.virtual_clock import virtual_time


def backend(key="s/1", **fields):
    service, _, name = key.partition("/")
    place = {"scheme": "http", "host": "gpu.example", "port": 9000, "address": "127.0.0.1", **fields}
    return Endpoint(key=key, service=service, id=name, **place)


@pytest.mark.parametrize(
    ("outcomes", "health"),
    [
        ("", Health.UNKNOWN),
        ("+", Health.PASSING),
        ("--", Health.UNKNOWN),
        ("--+", Health.PASSING),
        ("---", Health.FAILING),
        ("---+", Health.FAILING),
        ("---+-+", Health.FAILING),
        ("---++", Health.PASSING),
        ("+--", Health.PASSING),
        ("+--+--", Health.PASSING),
        ("+---", Health.FAILING),
    ],
)
def test_three_failures_and_two_successes_count(outcomes, health):
    tally = Tally(Pace())
    for outcome in outcomes:
        before = tally.health
        assert tally.record(outcome == "+") is (tally.health is not before)
    assert tally.health is health


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({}, ("/health", "/v1/models")),
        ({"protocols": ("oip", "openai"), "base_path": "/t"}, ("/t/health", "/t/v1/models")),
        ({"protocols": ("oip",)}, ("/v2/health/ready",)),
        ({"protocols": ("http",)}, ("/",)),
        ({"health_path": "/ping", "base_path": "/t"}, ("/ping",)),
    ],
)
def test_where_health_is_asked(fields, paths):
    assert health_paths(backend(**fields)) == paths


class Backends:
    """A probe whose outcomes a test writes, and who was asked when."""

    def __init__(self):
        self.failing = set()
        self.asked = []
        self.takes = 0.0
        self.running = self.most_running = 0

    async def __call__(self, endpoint):
        self.asked.append((asyncio.get_running_loop().time(), endpoint.key))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await asyncio.sleep(self.takes)
        self.running -= 1
        if endpoint.key in self.failing:
            return Checked(False, "status 503")
        return Checked(True, "status 200", load=f"load of {endpoint.key}")


class Ward:
    """A prober with everything it said."""

    def __init__(self, *endpoints):
        self.backends = Backends()
        self.events = []
        self.changes = []
        self.loads = {}
        self.prober = Prober(self.backends, self.events.append, Random(1), on_load=self.loads.__setitem__)
        self.prober.subscribe(lambda key, is_passing: self.changes.append((key, is_passing)))
        self.show(*endpoints)

    def show(self, *endpoints):
        self.prober.update(Snapshot(1, MappingProxyType({each.key: each for each in endpoints})))


@asynccontextmanager
async def rounds(ward):
    task = asyncio.create_task(ward.prober.run())
    try:
        yield ward
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


@virtual_time
async def test_known_at_once_and_asked_each_two_seconds():
    ward = Ward(backend("s/1"))
    assert ward.prober.health("s/1") is Health.UNKNOWN
    async with rounds(ward):
        await asyncio.sleep(20)
        assert ward.prober.is_passing("s/1")
        assert ward.events == [HealthChanged("s", "1", True, "status 200")]
        assert ward.loads == {"s/1": "load of s/1"}
        times = [when for when, _ in ward.backends.asked]
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        assert times[0] == 0
        assert 1.8 <= min(gaps) < 1.95
        assert 2.05 < max(gaps) <= 2.21


@virtual_time
async def test_what_is_waited_for_is_the_first_check_of_each_however_it_ends():
    ward = Ward(backend("s/well"), backend("s/ill"))
    ward.backends.failing.add("s/ill")
    ward.backends.takes = 0.5
    async with rounds(ward):
        await ward.prober.wait_tried()
        assert asyncio.get_running_loop().time() == pytest.approx(0.5, abs=0.01)
        assert ward.changes == [("s/well", True)]
        await ward.prober.wait_tried()
        assert len(ward.backends.asked) == 2


@virtual_time
async def test_who_leaves_is_waited_for_no_longer_and_who_moves_is_asked_again():
    ward = Ward(backend("s/goes"), backend("s/moves"))
    ward.backends.takes = 100.0
    async with rounds(ward):
        waiting = asyncio.create_task(ward.prober.wait_tried())
        await asyncio.sleep(1)
        ward.backends.takes = 0.5
        ward.show(backend("s/moves", port=1))
        await waiting
        assert asyncio.get_running_loop().time() == pytest.approx(1.5, abs=0.01)
        assert ward.changes == [("s/moves", True)]
        ward.show()
        await ward.prober.wait_tried()


@virtual_time
async def test_where_nobody_is_nothing_is_waited_for():
    await Ward().prober.wait_tried()


@virtual_time
async def test_falls_after_three_and_rises_after_two():
    ward = Ward(backend("s/1"))
    async with rounds(ward):
        await asyncio.sleep(1)
        ward.backends.failing.add("s/1")
        await asyncio.sleep(4.5)
        assert ward.prober.is_passing("s/1")
        await asyncio.sleep(2.5)
        assert ward.prober.health("s/1") is Health.FAILING
        ward.backends.failing.clear()
        await asyncio.sleep(5)
        assert ward.changes == [("s/1", True), ("s/1", False), ("s/1", True)]
        assert repr(ward.prober) == "<Prober 1 of 1 passing>"


@virtual_time
async def test_what_is_known_stays_with_the_place():
    ward = Ward(backend("s/1"))
    async with rounds(ward):
        await asyncio.sleep(1)
        ward.show(backend("s/1", weight=7, draining=True))
        assert ward.prober.is_passing("s/1")
        ward.show(backend("s/1", address="127.0.0.2"))
        assert ward.prober.health("s/1") is Health.UNKNOWN
        ward.show()
        assert ward.prober.health("s/1") is Health.UNKNOWN
        asked = len(ward.backends.asked)
        await asyncio.sleep(10)
        assert len(ward.backends.asked) == asked
        assert repr(ward.prober) == "<Prober 0 of 0 passing>"


@virtual_time
async def test_the_outcome_of_a_check_that_comes_too_late_is_dropped():
    ward = Ward(backend("s/1"))
    ward.backends.takes = 0.5
    async with rounds(ward):
        await asyncio.sleep(0.1)
        ward.show()
        await asyncio.sleep(0.1)
        ward.show(backend("s/1"))
        await asyncio.sleep(0.35)
        assert ward.prober.health("s/1") is Health.UNKNOWN
        await asyncio.sleep(0.5)
        assert ward.prober.is_passing("s/1")
        assert len(ward.events) == 1


@virtual_time
async def test_thousands_are_asked_in_turn_and_not_all_at_once():
    ward = Ward(*(backend(f"s/{i}") for i in range(2_000)))
    async with rounds(ward):
        await asyncio.sleep(7.999)  # 250 in a second
        first = [key for _, key in ward.backends.asked]
        assert len(set(first)) == len(first) == 2_000
        await asyncio.sleep(9)
        again = [key for _, key in ward.backends.asked[2_000:]]
        assert len(set(again)) >= 1_990


@virtual_time
async def test_backends_that_swallow_checks_hold_up_64_at_most():
    ward = Ward(*(backend(f"s/{i}") for i in range(1_000)))
    ward.backends.takes = 1.0
    async with rounds(ward):
        await asyncio.sleep(10)
        assert ward.backends.most_running == 64


@virtual_time
async def test_a_probe_that_raises_is_a_backend_that_fails():
    events = []

    async def broken(endpoint):
        raise KeyError(endpoint.key)

    prober = Prober(broken, events.append, Random(0))
    prober.update(Snapshot(1, MappingProxyType({"s/1": backend()})))
    task = asyncio.create_task(prober.run())
    await asyncio.sleep(10)
    task.cancel()
    await asyncio.wait({task})
    assert events == [HealthChanged("s", "1", False, "the check failed: KeyError")]


class Server:
    """Answers each path with fixed bytes, keeps what it was asked, and hangs on a path that it does not know."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []

    async def serve(self, reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode())
            answer = self.answers.get(head.split()[1].decode())
            if answer is None:
                await reader.read()
            elif callable(answer):
                await answer(writer)
            else:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(tls=None, **answers):
    server = Server({path.replace("_", "/") if path != "slash" else "/": each for path, each in answers.items()})
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    async with listener, HttpProbe() as probe:
        server.port = listener.sockets[0].getsockname()[1]
        server.probe = probe
        yield server


def reply(status, *headers, body=b""):
    lines = (f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


async def endless(writer):
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize(
    ("answers", "fields", "is_passing", "reason"),
    [
        ({"_health": reply(200, body=b"ok")}, {}, True, "status 200"),
        ({"_health": reply(503)}, {}, False, "status 503"),
        ({"_health": reply(404), "_v1_models": reply(200)}, {}, True, "status 200"),
        ({"_health": reply(404), "_v1_models": reply(404)}, {}, False, "status 404"),
        ({"_health": reply(301, "location: /ok"), "_ok": reply(200)}, {}, False, "status 301"),
        ({"_v2_health_ready": reply(200)}, {"protocols": ("oip",)}, True, "status 200"),
        ({"_v2_health_ready": reply(404)}, {"protocols": ("oip",)}, False, "status 404"),
        ({"slash": reply(404)}, {"protocols": ("http",)}, True, "status 404"),
        ({"slash": reply(500)}, {"protocols": ("http",)}, False, "status 500"),
        ({"_ping?full=1": reply(204)}, {"health_path": "/ping?full=1"}, True, "status 204"),
        ({"_ping": reply(404)}, {"health_path": "/ping"}, False, "status 404"),
        ({"_health": b"SSH-2.0-OpenSSH_9.6\r\n\r\n"}, {}, False, "the answer is not HTTP"),
        ({"_health": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"}, {}, False, "the answer is not HTTP"),
        ({"_health": b""}, {}, False, "the connection broke"),
        ({"_health": endless}, {}, True, "status 200"),
        (
            {"_health": reply(200, "set-cookie: a=b; domain=", "content-encoding: gzip", body=b"no")},
            {},
            True,
            "status 200",
        ),
    ],
)
async def test_what_counts_as_health(answers, fields, is_passing, reason):
    async with serving(**answers) as server:
        assert await server.probe(backend(port=server.port, **fields)) == Checked(is_passing, reason)


async def test_asks_the_pinned_address_by_the_registered_name_and_hands_on_the_load():
    async with serving(_health=reply(200, 'endpoint-load-metrics: JSON {"cpu_utilization": 0.3}')) as server:
        checked = await server.probe(backend(port=server.port))
        assert checked == Checked(True, "status 200", 'JSON {"cpu_utilization": 0.3}')
        (request,) = server.requests
        lines = request.lower().split("\r\n")
        assert lines[0] == "get /health http/1.1"
        assert f"host: gpu.example:{server.port}" in lines
        assert "endpoint-load-metrics-format: json" in lines


async def test_a_load_report_that_is_too_long_is_none():
    async with serving(_health=reply(200, "endpoint-load-metrics: " + "x" * 5000)) as server:
        assert await server.probe(backend(port=server.port)) == Checked(True, "status 200")


async def test_silence_fails_after_a_second():
    async with serving() as server:
        assert await server.probe(backend(port=server.port)) == Checked(False, "no answer within 1 s")


async def test_nobody_there():
    async with serving() as server:
        port = server.port
    async with HttpProbe() as probe:
        assert await probe(backend(port=port)) == Checked(False, "cannot connect")


async def test_a_tls_backend_is_checked_by_name(tmp_path):
    authority = Authority(tmp_path)
    mine = authority.issue("server", names=["gpu.example"])
    believing = client_tls(authority.cert)
    trusting = HttpProbe(lambda: believing)
    async with serving(tls=server_tls(mine), _health=reply(200)) as server, trusting as probe:
        endpoint = backend(port=server.port, scheme="https")
        assert await probe(endpoint) == Checked(True, "status 200")
        other = backend(port=server.port, scheme="https", host="other.example")
        reason = "its certificate is not accepted: Hostname mismatch, certificate is not valid for 'other.example'."
        assert await probe(other) == Checked(False, reason)
        assert await probe(backend(port=server.port)) == Checked(False, "the connection broke")  # plain HTTP to it


def refuse(listener, tls):
    """A server of blocking sockets, which tells each client why, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ssl.SSLError):
                tls.wrap_socket(connection, server_side=True)


@pytest.mark.parametrize(
    ("newest", "reason"),
    [
        (ssl.TLSVersion.TLSv1_3, "the connection broke; our certificate may be refused"),
        (ssl.TLSVersion.TLSv1_2, "the TLS handshake failed: sslv3 alert handshake failure"),
    ],
)
async def test_a_backend_that_wants_a_certificate_of_ours_says_so(tmp_path, newest, reason):
    authority = Authority(tmp_path)
    tls = server_tls(authority.issue("server", ["gpu.example"]), believes=authority.cert)
    tls.maximum_version = newest
    believing = client_tls(authority.cert)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = asyncio.create_task(asyncio.to_thread(refuse, listener, tls))
        async with HttpProbe(lambda: believing) as probe:
            checked = await probe(backend(port=listener.getsockname()[1], scheme="https"))
        listener.shutdown(socket.SHUT_RDWR)
        await refusing
    assert checked == Checked(False, reason)
