"""The HTTP application: all paths, and what wraps them.

Every path exists twice: as itself, and below `/models/{name}/{number}` for one version alone. Every error is JSON in
the form of the protocol whose path it is; no input leads to a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from reference_backend import embeddings, images_api, open_inference, openai_api
from reference_backend.changing import InFlight
from reference_backend.incoming import POOL, PREFIX, SERVED, WALL, is_at, json_response
from reference_backend.load_report import PATH as LOAD_PATH
from reference_backend.load_report import Reporter, form_asked, in_band, metrics_page
from reference_backend.pool import Pool
from reference_backend.refusals import LONGEST_SHOWN, ApiError, bad
from reference_backend.served import Served, State
from reference_backend.structured import Trials

log = logging.getLogger(__name__)
# Decompressed, a body could grow a thousandfold before anybody has looked at it, or break where nobody expects it.
HTTP: dict[str, Any] = {"logger": log, "access_log": None, "auto_decompress": False}
INFERENCE_PATH = re.compile(r"(/models/[^/]+/[^/]+)?/v2(/|$)")


class Connection(web.RequestHandler):
    """One of aiohttp's, that tells in our form what it refuses before there is anything to handle."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is no HTTP, or not even text, is the fault of whoever sent it: a line in the log, and no traceback."""
        if not isinstance(exc, HttpProcessingError | UnicodeError | ConnectionError):
            return super().handle_error(request, status, exc, message)
        why = f"the request cannot be read: {' '.join((message or str(exc)).split())}"[:LONGEST_SHOWN]
        log.info("from %s: %s", request.remote, why)
        refusal = _refusal(request, bad(why))
        refusal.force_close()
        return refusal

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Above the application an `Expect` that nobody knows is refused."""
        told = _refusal(request, _refused_by_aiohttp(resp)) if isinstance(resp, web.HTTPException) else resp
        return await super().finish_response(request, told, start_time)


class Api:
    """The application's parts. `end` is called when somebody asks that the process drain and end."""

    def __init__(self, pool: Pool, *, wall: Callable[[], float], end: Callable[[], None]) -> None:
        self.in_flight = InFlight()
        self._pool, self._wall, self._end = pool, wall, end

    def application(self, *middlewares: Middleware) -> web.Application:
        """All paths. `middlewares` stand outside of everything, and see every answer."""
        app = web.Application(middlewares=[*middlewares, self._count, self._rescue])
        app[POOL], app[WALL] = self._pool, self._wall
        app[openai_api.TRIALS], app[openai_api.STARTED_AT] = Trials(), int(self._wall())
        app.on_response_prepare.append(self._report_load)
        routes = [
            *openai_api.routes,
            *images_api.routes,
            *open_inference.routes,
            *embeddings.routes,
            web.get("/health", self._health),
            web.get("/ping", self._health),
            web.get("/metrics", self._metrics),
            web.get(LOAD_PATH, self._push_load),
            web.get("/v2/health/live", self._live),
            web.get("/v2/health/ready", self._ready),
        ]
        app.router.add_routes([web.post("/drain", self._drain), *routes])
        app.router.add_routes([_below_prefix(route) for route in routes if isinstance(route, web.RouteDef)])
        return app

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int, *middlewares: Middleware) -> AsyncIterator[int]:
        """The application in service, and its port. What is still in flight at the end is cut. Raises OSError."""
        # Without handler_cancellation a client that left would be generated for to the end.
        runner = web.AppRunner(self.application(*middlewares), handler_cancellation=True, shutdown_timeout=0.0)
        await runner.setup()
        loop = asyncio.get_running_loop()
        made = cast("web.Server", runner.server)
        connect = partial(Connection, made, loop=loop, **HTTP)
        try:
            server = await loop.create_server(connect, host, port, backlog=128)
            try:
                yield server.sockets[0].getsockname()[1]
            finally:
                server.close()
        finally:
            await runner.cleanup()

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What somebody waits for an answer to: the process ends after it."""
        if request.method != "POST":
            return await handler(request)
        with self.in_flight:
            return await handler(request)

    @web.middleware
    async def _rescue(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever went wrong before the head went out, as an answer."""
        try:
            return await handler(request)
        except ApiError as error:
            return _refusal(request, error)
        except web.HTTPException as error:
            return _refusal(request, _refused_by_aiohttp(error))
        except Exception:  # a bug of ours: the client learns that, the log learns which
            log.exception("internal error")
            return _refusal(request, ApiError(500, "internal_error", "internal error"))

    async def _report_load(self, request: web.Request, response: web.StreamResponse) -> None:
        if form := form_asked(request.headers):
            response.headers["endpoint-load-metrics"] = in_band(self._reporters(request).values(), form)

    def _meant(self, request: web.Request) -> list[Served]:
        """The versions that a request is about: its own, or all below its path."""
        return [request[SERVED]] if SERVED in request else [each for each in self._pool if is_at(request, each)]

    def _reporters(self, request: web.Request) -> dict[str, Reporter]:
        return {str(each.entry): each.model.reporter for each in self._meant(request) if each.model is not None}

    def _state(self, request: web.Request) -> State:
        if "name" not in request.match_info:
            return self._pool.state
        meant = self._meant(request)
        return meant[0].state if meant else State.CLOSED

    async def _health(self, request: web.Request) -> web.Response:
        state = self._state(request)
        return json_response({"status": state.value}, status=200 if state.is_useful else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        text = metrics_page(self._reporters(request))
        return web.Response(text=text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _push_load(self, request: web.Request) -> web.StreamResponse:
        reporters = self._reporters(request)
        if len(reporters) != 1:
            message = f"{len(reporters)} models are served here; ask for one at {PREFIX}{LOAD_PATH}"
            raise ApiError(404, "not_found", message)
        return await next(iter(reporters.values())).stream(request)

    async def _live(self, request: web.Request) -> web.Response:
        is_live = all(each.is_alive for each in self._meant(request))
        return json_response({"live": is_live}, status=200 if is_live else 503)

    async def _ready(self, request: web.Request) -> web.Response:
        is_ready = self._state(request).is_useful
        return json_response({"ready": is_ready}, status=200 if is_ready else 503)

    async def _drain(self, _request: web.Request) -> web.Response:
        self._end()
        return json_response({"status": State.DRAINING.value})


def _below_prefix(route: web.RouteDef) -> web.RouteDef:
    """The same route for one version alone."""
    return web.RouteDef(route.method, PREFIX + route.path, route.handler, route.kwargs)


def _refused_by_aiohttp(error: web.HTTPException) -> ApiError:
    """What aiohttp refuses by itself, in our words."""
    code, message = {
        404: ("not_found", "there is no such path"),
        405: ("method_not_allowed", "this path does not take that method"),
        417: ("expectation_failed", "of what a client may expect, only 100-continue is known here"),
    }.get(error.status, ("bad_request", "the request cannot be read"))
    return ApiError(error.status, code, message)


def _refusal(request: web.BaseRequest, error: ApiError) -> web.Response:
    """An error in the form of the protocol whose path it is."""
    body = {"error": error.message} if INFERENCE_PATH.match(request.path) else error.body()
    response = json_response(body, error.status, error.headers)
    if "connection" in error.headers:
        response.force_close()
    return response
