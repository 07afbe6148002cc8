"""Nothing of the operator's is reachable through the data port, whatever a client sends and wherever a backend leads."""

import asyncio

import pytest

from gateway import config as configuration
from gateway.app import Gateway
from policies.problems import InvalidDocument
from tests.support.admin_client import page, scrape
from tests.support.ports import free_port
from tests.support.raw_client import RawClient
from tests.support.running_gateway import OPEN_POLICY, running_gateway, until
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"

OPERATORS = (
    "/",
    "/metrics",
    "/livez",
    "/readyz",
    "/api/backends",
    "/api/routes",
    "/api/policy",
    "/api/requests",
    "/console.js",
)
MARKS = (b"weir_requests_total", b'"last_error"', b'"inflight"', b'"end_reason"', b"<html", b"PERIOD_MS", b'"breaker"')
ROUTED = OPEN_POLICY.replace('"/*"', '"/v1/*"')  # nothing else has a route
CATCH_ALL = OPEN_POLICY


def targets(path: str, gateway) -> list[bytes]:
    """The ways to write a request for the admin listener's path."""
    admin = str(gateway.admin_address).encode()
    encoded = path.encode()
    return [
        encoded,
        b"http://" + admin + encoded,
        b"//" + admin + encoded,
        b"/v1/.." + encoded,
        b"/v1/%2e%2e" + encoded,
        b"/v1/..%2f" + encoded[1:],
        b"/v1\\.." + encoded,
        b"/healthz/.." + encoded,
        b"/healthz;" + encoded,
        b"/healthz%00" + encoded,
        b"/." + encoded,
        b"/" + encoded,
        encoded + b"?x=/healthz",
        encoded + b"#",
        encoded.upper(),
        b"*",
    ]


def hosts(gateway) -> list[list[bytes]]:
    """Header lines that point at the admin listener, or claim to come from it."""
    admin = str(gateway.admin_address).encode()
    return [
        [b"host: " + admin],
        [b"host: localhost:%d" % gateway.admin_address.port],
        [b"host: gateway", b"x-forwarded-host: " + admin],
        [b"host: gateway", b"forwarded: for=127.0.0.1;host=" + admin],
        [b"host: gateway", b"x-forwarded-for: 127.0.0.1"],
        [b"host: gateway", b"x-original-url: /metrics", b"x-rewrite-url: /metrics"],
        [b"host: gateway", b"x-http-method-override: GET"],
        [b"host: " + admin, b"host: gateway"],
        [b"host: gateway", b"authorization: Bearer admin-token-admin-token"],
    ]


async def raw(address, method: bytes, target: bytes, lines: list[bytes]) -> bytes:
    """The whole answer to one request on a connection of its own."""
    async with RawClient(address) as client:
        client.send(b"%b %b HTTP/1.1\r\n%b\r\nconnection: close\r\n\r\n" % (method, target, b"\r\n".join(lines)))
        async with asyncio.timeout(10):
            return await client.reader.read()


@pytest.mark.parametrize("path", OPERATORS)
async def test_no_way_to_write_it_leads_there(tmp_path, path):
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, policy=ROUTED) as gateway:
        for target in targets(path, gateway):
            for lines in hosts(gateway):
                answer = await raw(gateway.data_address, b"GET", target, lines)
                status = int(answer.split()[1])
                assert status in (400, 404), (target, lines, answer)
                assert not any(mark in answer for mark in MARKS), (target, lines)
        assert not backend.heads


@pytest.mark.parametrize("method", [b"HEAD", b"POST", b"PUT", b"OPTIONS", b"CONNECT", b"TRACE", b"DEBUG"])
async def test_no_method_does(tmp_path, method):
    async with running_gateway(tmp_path, policy=ROUTED) as gateway:
        admin = str(gateway.admin_address).encode()
        for target in (b"/metrics", b"http://" + admin + b"/metrics", admin):
            answer = await raw(gateway.data_address, method, target, [b"host: " + admin, b"content-length: 0"])
            assert int(answer.split()[1]) in (400, 404, 405), answer
            assert not any(mark in answer for mark in MARKS)


async def test_under_a_route_for_everything_these_paths_are_the_backends_own(tmp_path):
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, policy=CATCH_ALL) as gateway:
        for path in OPERATORS:
            answer = await raw(gateway.data_address, b"GET", path.encode(), [b"host: gateway"])
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert not any(mark in answer for mark in MARKS)
        assert len(backend.heads) == len(OPERATORS)


async def test_a_backend_that_is_registered_as_our_admin_listener_leads_nowhere(tmp_path):
    """Whoever may write registrations cannot open the operator's listener to clients: not ours, not another gateway's."""
    (tmp_path / "other").mkdir()
    async with running_gateway(tmp_path / "other") as victim:
        url = f"http://{victim.admin_address}"
        async with running_gateway(tmp_path, url, policy=CATCH_ALL, healthy=False) as gateway:
            for path in OPERATORS:
                for method in (b"GET", b"HEAD"):
                    answer = await raw(gateway.data_address, method, path.encode(), [b"host: localhost"])
                    assert not any(mark in answer for mark in MARKS), answer
                    assert not answer.startswith(b"HTTP/1.1 200"), answer
            assert (await page(victim, "/metrics")).status == 200


async def test_the_admin_listener_is_on_loopback_unless_it_has_a_token(tmp_path):
    text = "policy: p\ndiscovery: {static: []}\n"
    assert configuration.parse(text.encode(), {}, base=tmp_path).admin.listen.is_loopback
    for address in ("0.0.0.0:8081", "'[::]:8081'", "10.0.0.1:8081", "example.com:8081"):
        with pytest.raises(InvalidDocument):
            configuration.parse(f"{text}admin: {{listen: {address}}}\n".encode(), {}, base=tmp_path)
    (tmp_path / "token").write_text("t" * 32)
    shown = configuration.parse(
        f"{text}admin: {{listen: '0.0.0.0:8081', auth: {{token_file: token}}}}\n".encode(), {}, base=tmp_path
    )
    assert "t" * 32 not in repr(shown)


async def test_a_backend_that_is_registered_as_the_gateway_itself_ends_the_loop_at_once(tmp_path):
    """Else one request, or one health check, becomes thousands within its second."""
    port = free_port()
    (tmp_path / "policy.yaml").write_text(CATCH_ALL)
    text = f"""
listen: 127.0.0.1:{port}
admin: {{listen: 127.0.0.1:0}}
policy: policy.yaml
discovery: {{static: [{{service: tiny, url: "http://127.0.0.1:{port}", models: [tiny]}}]}}
"""
    gateway = Gateway(configuration.parse(text.encode(), {}, base=tmp_path))
    async with gateway.running(), RawClient(gateway.data_address) as client:
        answer = await client.ask()
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_failed")
        await until(lambda: next(iter(gateway.fleet.backends.values())).healthy is False, 30)
        requests = (await scrape(gateway)).value("weir_requests_total")
        assert requests < 100, requests
