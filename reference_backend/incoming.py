"""What every path needs of a request: its body, its deadline, and the version that it is for."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from reference_backend import protocol
from reference_backend.pool import Pool
from reference_backend.protocol import ApiError
from reference_backend.served import Served

BODY_SECONDS = 30.0
DEADLINE_HEADER = "x-weir-deadline-ms"  # what is left of the client's time
SERVED = web.RequestKey("served", Served)  # whose request it is, for whoever wraps the handler
# One version has all paths below this, too: as such it is registered, so that each can be given a share.
PREFIX = "/models/{name}/{number}"


async def read_body(request: web.Request, largest: int) -> bytes:
    """The whole body. Raises ApiError 408, 413, 415."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "compressed request bodies are not supported")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > largest:
                    raise ApiError(413, "too_large", f"the body is longer than {largest} bytes")
    except TimeoutError as error:
        raise ApiError(408, "client_timeout", "the request's body came too slowly") from error
    return bytes(body)


def deadline(request: web.Request, now: float) -> float | None:
    """When the answer will be of no use any more, on the clock of `now`. Raises ApiError 400."""
    left = milliseconds(request.headers.get(DEADLINE_HEADER))
    return None if left is None else now + left / 1000


def milliseconds(text: str | None) -> int | None:
    """The value of DEADLINE_HEADER. Raises ApiError 400."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ApiError(400, "bad_request", f"{DEADLINE_HEADER} is not a number of milliseconds")
    return int(text)


def find(pool: Pool, request: web.Request, model: str, version: str | None = None) -> Served:
    """The version that a request means by its path, its body, or both. Raises ApiError 404, 503."""
    served = pool.find(model, version or request.match_info.get("number"))
    if not is_at(request, served):
        raise ApiError(404, "model_not_found", f"model {str(served.entry)!r} is not served at this path", param="model")
    request[SERVED] = served
    return served


def is_at(request: web.Request, served: Served) -> bool:
    """Whether a version is among those that the path of a request is for."""
    name, number = request.match_info.get("name"), request.match_info.get("number")
    return name is None or (name, number) == (served.entry.name, served.entry.version)


def check_open(pool: Pool) -> None:
    """Raises ApiError 503 when nothing new is taken any more: to be asked before a body is read."""
    if pool.is_closed:
        raise protocol.draining()


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    encoded = msgspec.json.encode(body)
    return web.Response(body=encoded, status=status, headers=headers, content_type="application/json")
