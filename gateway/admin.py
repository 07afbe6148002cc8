"""The operator's listener: console, metrics, health of the process, and read-only JSON about what is in force.

Nothing here is hot, so it is an ordinary aiohttp application. Never reachable from the data port. Without `admin.auth`
it is bound to loopback only (config.py refuses anything else), and the Host header must be an address or localhost,
so that a web page cannot reach it by a name of its own (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import BasicAuth, web

from observability.metrics import Metrics

CONSOLE = Path(__file__).parent / "console"
_SECURE = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_OPEN_TO_PROBES = frozenset({"/livez", "/readyz"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
View = Callable[[], Any]


def admin_app(
    metrics: Metrics, not_ready: Callable[[], tuple[str, ...]], views: Mapping[str, View], token: str | None
) -> web.Application:
    """The application. `not_ready` gives the reasons against readiness; `views` the documents under /api/."""
    app = web.Application(middlewares=[_guard(token)])
    app.router.add_get("/livez", _live)
    app.router.add_get("/readyz", _ready(not_ready))
    app.router.add_get("/metrics", _metrics(metrics))
    for name, view in views.items():
        app.router.add_get(f"/api/{name}", _document(view))
    for file in sorted(CONSOLE.iterdir()):
        app.router.add_get("/" if file.name == "index.html" else f"/{file.name}", _file(file))
    return app


def _guard(token: str | None) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check(request, token)
            response = await handler(request)
        except web.HTTPException as refusal:
            refusal.headers.update(_SECURE)
            raise
        response.headers.update(_SECURE)
        return response

    return guard


def _check(request: web.Request, token: str | None) -> None:
    """Raise HTTPForbidden or HTTPUnauthorized for who may not come in."""
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
        body, content_type = metrics.render(request.headers.get("accept", ""))
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
