"""The operator's listener: console, metrics, health of the process, and read-only JSON about what is in force.

Nothing here is hot, so it is an ordinary aiohttp application. Never reachable from the data port. Without `admin.auth`
it is bound to loopback only (config.py refuses anything else), and the Host header must be an address or localhost,
so that a web page cannot reach it by a name of its own (DNS rebinding).

Whoever asks without end must not take time from requests: all answers but those to probes are made one after the other
and share an allowance of time, and beyond it there is 429. Metrics become text in a thread. Whoever only connects must
not take the files that clients need: connections are few, and those that ask nothing are closed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import BasicAuth, web

from observability.metrics import Metrics
from policies.bucket import Bucket

CONSOLE = Path(__file__).parent / "console"
_SECURE = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_OPEN_TO_PROBES = frozenset({"/livez", "/readyz"})
IDLE_SECONDS = 30.0  # for the next request, and for the first one to come whole
MOST_CONNECTIONS = 256
_PER_SECOND = 20.0  # answers, all kinds together
_BURST = 40.0
_SECONDS_EACH = 0.005  # one that takes longer counts as several: so all of them take a tenth of a core at most

# Whatever a gateway hands on has it, and no client can take it away: so registering this listener as a backend opens it
# to nobody, whichever gateway the registration is for.
FORWARDED = "x-weir-consumer"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
View = Callable[[], Any]


def admin_app(
    metrics: Metrics,
    not_ready: Callable[[], tuple[str, ...]],
    views: Mapping[str, View],
    token: str | None,
    clock: Callable[[], float],
) -> web.Application:
    """The application. `not_ready` gives the reasons against readiness; `views` the documents under /api/."""
    app = web.Application(middlewares=[_guard(token, Allowance(clock))])
    app.router.add_get("/livez", _live)
    app.router.add_get("/readyz", _ready(not_ready))
    app.router.add_get("/metrics", _metrics(metrics))
    for name, view in views.items():
        app.router.add_get(f"/api/{name}", _document(view))
    for file in sorted(CONSOLE.iterdir()):
        app.router.add_get("/" if file.name == "index.html" else f"/{file.name}", _file(file))
    return app


def at_most(connections: int, server: web.Server) -> Callable[[], asyncio.Protocol]:
    """What makes the protocols of a listener; whoever comes when there are so many is closed at once."""

    def protocol() -> asyncio.Protocol:
        return server() if len(server.connections) < connections else _Closed()

    return protocol


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Allowance:
    """What the answers together may cost: a share of the time. Each counts as what the last one of its kind took."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bucket = Bucket(_PER_SECOND, _BURST, clock())
        self._costs: dict[Handler, float] = {}
        self._turn = asyncio.Lock()

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer when it is this request's turn. Raises HTTPTooManyRequests when the allowance is used up."""
        async with self._turn:
            begun = self._clock()
            document = request.match_info.handler
            wait = self._bucket.take(begun, self._costs.get(document, 1.0))
            if wait:
                raise web.HTTPTooManyRequests(
                    text=f"The admin listener is asked too often; come back in {wait:.1f} s.\n",
                    headers={"retry-after": str(ceil(wait))},
                )
            response = await handler(request)
            self._costs[document] = min(max((self._clock() - begun) / _SECONDS_EACH, 1.0), _BURST)
            return response


def _guard(token: str | None, allowance: Allowance) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check(request, token)
            is_probe = request.path in _OPEN_TO_PROBES
            response = await (handler(request) if is_probe else allowance.answer(request, handler))
        except web.HTTPException as refusal:
            refusal.headers.update(_SECURE)
            raise
        response.headers.update(_SECURE)
        return response

    return guard


def _check(request: web.Request, token: str | None) -> None:
    """Raise HTTPForbidden or HTTPUnauthorized for who may not come in."""
    if FORWARDED in request.headers:
        raise web.HTTPForbidden(text="The admin listener answers nothing that has come through a gateway.\n")
    if token is None:
        if not _is_plain_host(request.host):
            raise web.HTTPForbidden(text="Call the admin listener by its address or as localhost.\n")
    elif request.path not in _OPEN_TO_PROBES and not _has_token(request, token):
        raise web.HTTPUnauthorized(
            text="The admin listener needs its token.\n", headers={"www-authenticate": 'Basic realm="weir"'}
        )


def _is_plain_host(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _has_token(request: web.Request, token: str) -> bool:
    """The token as a bearer token, or as the password of Basic authentication: what a browser can ask for."""
    given = request.headers.get("authorization", "")
    scheme, _, value = given.partition(" ")
    if scheme.lower() == "basic":
        try:
            value = BasicAuth.decode(given).password
        except ValueError:
            return False
    return hmac.compare_digest(value.encode("utf-8", "replace"), token.encode())


async def _live(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _ready(not_ready: Callable[[], tuple[str, ...]]) -> Handler:
    async def ready(_request: web.Request) -> web.Response:
        reasons = not_ready()
        return web.Response(status=503 if reasons else 200, text="".join(f"{reason}\n" for reason in reasons) or "ok\n")

    return ready


def _metrics(metrics: Metrics) -> Handler:
    async def scrape(request: web.Request) -> web.Response:
        body, content_type = await asyncio.to_thread(metrics.snapshot().render, request.headers.get("accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})

    return scrape


def _document(view: View) -> Handler:
    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(view()), content_type="application/json")

    return show


def _file(file: Path) -> Handler:
    async def show(_request: web.Request) -> web.StreamResponse:
        return web.FileResponse(file)

    return show
