import asyncio
import base64

import pytest
from aiohttp.test_utils import TestClient, TestServer

from gateway.admin import admin_app
from observability.metrics import Metrics

TOKEN = "s3cret"


class Now:
    """A clock that stands, and a document that takes 50 ms of it to make."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def take_long(self) -> dict[str, str]:
        self.time += 0.05
        return {}


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def client(token: str | None = None, reasons: tuple[str, ...] = (), now: Now | None = None) -> TestClient:
    views = {"backends": lambda: {"backends": []}, "slow": (now or Now()).take_long}
    app = admin_app(Metrics(), lambda: reasons, views, token, now or Now())
    return TestClient(TestServer(app))


@pytest.mark.parametrize(
    ("path", "content_type", "contains"),
    [
        ("/", "text/html", "<html"),
        ("/console.js", "javascript", ""),
        ("/console.css", "text/css", ""),
        ("/icon.svg", "image/svg+xml", "<svg"),
        ("/livez", "text/plain", "ok\n"),
        ("/readyz", "text/plain", "ok\n"),
        ("/metrics", "text/plain", "weir_requests_total"),
        ("/api/backends", "application/json", '{"backends":[]}'),
    ],
)
async def test_what_is_there(path, content_type, contains) -> None:
    async with client() as admin:
        answer = await admin.get(path)
        assert answer.status == 200
        assert answer.content_type.endswith(content_type)
        assert contains in await answer.text()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/api/backends", {}, 200),
        ("GET", "/nothing", {}, 404),
        ("GET", "/console/../admin.py", {}, 404),
        ("GET", "/%2e%2e/admin.py", {}, 404),
        ("POST", "/api/backends", {}, 405),
        ("GET", "/api/backends", {"host": "evil.example"}, 403),
    ],
)
async def test_every_answer_is_guarded_against_framing_sniffing_and_caching(method, path, headers, status) -> None:
    async with client() as admin:
        answer = await admin.request(method, path, headers=headers)
        assert answer.status == status
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; frame-ancestors 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8081", 200),
        ("127.0.0.1", 200),
        ("localhost:8081", 200),
        ("LocalHost", 200),
        ("[::1]:8081", 200),
        ("[::1]", 200),
        ("10.1.2.3:8081", 200),
        ("evil.example", 403),
        ("evil.example:8081", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8081", 403),
        ("127.0.0.1@evil.example", 403),
        ("localhost:evil", 200),
        ("", 403),
    ],
)
async def test_a_name_of_somebody_elses_leads_nowhere(host, status) -> None:
    async with client() as admin:
        assert (await admin.get("/api/backends", headers={"host": host})).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer(TOKEN), 200),
        ({"authorization": f"bearer {TOKEN}"}, 200),
        (basic(TOKEN), 200),
        (bearer("wrong"), 401),
        (bearer(TOKEN + "x"), 401),
        (bearer(""), 401),
        (basic("wrong"), 401),
        ({"authorization": "Basic %%%"}, 401),
        ({"authorization": "Basic bm8tY29sb24="}, 401),
        ({"authorization": TOKEN}, 401),
        ({"authorization": "Bearer \udc80"}, 401),
    ],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/api/backends", "/nothing"])
async def test_with_a_token_nothing_is_told_without_it(headers, status, path) -> None:
    async with client(TOKEN) as admin:
        answer = await admin.get(path, headers=headers | {"host": "admin.example"})
        assert answer.status == (404 if status == 200 and path == "/nothing" else status)
        if status == 401:
            assert answer.headers["www-authenticate"] == 'Basic realm="weir"'


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/api/backends", "/nothing"])
async def test_what_came_through_a_gateway_is_answered_to_nobody(token, path) -> None:
    async with client(token) as admin:
        answer = await admin.get(path, headers=bearer(TOKEN) | {"X-Weir-Consumer": "anonymous"})
        assert answer.status == 403


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_probes_need_no_token(path) -> None:
    async with client(TOKEN) as admin:
        assert (await admin.get(path)).status == 200


async def test_why_it_is_not_ready() -> None:
    reasons = ("the gateway is draining", "discovery has not listed the backends yet")
    async with client(reasons=reasons) as admin:
        answer = await admin.get("/readyz")
        assert (answer.status, await answer.text()) == (503, "".join(reason + "\n" for reason in reasons))
        assert (await admin.get("/livez")).status == 200


async def test_who_asks_without_end_is_told_when_to_come_back_and_probes_are_heard() -> None:
    now = Now()
    async with client(now=now) as admin:
        answers = await asyncio.gather(*(admin.get(path) for path in ["/metrics", "/api/backends", "/", "/no"] * 25))
        admitted = [answer for answer in answers if answer.status != 429]
        assert len(admitted) == 40
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["cache-control"] == "no-store"
        assert {(await admin.get(path)).status for path in ["/livez", "/readyz"] * 10} == {200}
        now.time += 0.1
        assert [(await admin.get("/metrics")).status for _ in range(3)] == [200, 200, 429]


async def test_a_document_that_takes_long_may_be_asked_for_less_often() -> None:
    now = Now()
    async with client(now=now) as admin:
        async with asyncio.timeout(60):
            while (await admin.get("/api/slow")).status == 200:
                pass
        began, made = now.time, 0
        for _ in range(1000):
            now.time += 0.02
            made += (await admin.get("/api/slow")).status == 200
        assert 0.05 * made <= 0.1 * (now.time - began) + 0.05


async def test_who_may_not_come_in_uses_up_nobodys_allowance() -> None:
    async with client(TOKEN, now=Now()) as admin:
        assert {(await admin.get("/metrics")).status for _ in range(100)} == {401}
        assert (await admin.get("/metrics", headers=bearer(TOKEN))).status == 200
