"""What every path needs of a request: its body, its deadline, and the version that it is for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import StreamReader, web

from reference_backend import protocol, refusals
from reference_backend.engine.request import Priority
from reference_backend.pool import Pool
from reference_backend.refusals import ApiError, bad
from reference_backend.served import Served
from reference_backend.tensors import Terms

BODY_SECONDS = 30.0
LARGEST_BODY = 4 * 1024 * 1024
DEADLINE_HEADER = "x-weir-deadline-ms"  # what is left of the client's time
CONSUMER_HEADER = "x-weir-consumer"  # who shares this backend fairly with others
PRIORITY_HEADER = "x-weir-priority"
POOL = web.AppKey("pool", Pool)
WALL: web.AppKey[Callable[[], float]] = web.AppKey("wall")
SERVED = web.RequestKey("served", Served)  # whose request it is, for whoever wraps the handler
# One version has all paths below this, too: as such it is registered, so that each can be given a share.
PREFIX = "/models/{name}/{number}"


async def read(request: web.Request, form: type[protocol.Request], largest: int = LARGEST_BODY) -> protocol.Request:
    """A request of the OpenAI API, decoded and judged. Raises ApiError."""
    return protocol.decode(await read_body(request, largest), form)


async def read_body(request: web.Request, largest: int) -> bytes:
    """The whole body. Raises ApiError 408, 413, 415; 503 where nothing new is taken any more."""
    if request.app[POOL].is_closed:
        raise refusals.draining()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "compressed request bodies are not supported")
    content = request.content
    body = content.read_nowait() if content.is_eof() else await _arriving(content, largest)
    if len(body) > largest:
        raise ApiError(413, "too_large", f"the body is longer than {largest} bytes")
    return body


async def _arriving(content: StreamReader, largest: int) -> bytes:
    """The body that did not come with its head, or more of it than `largest`. Raises ApiError 408."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while not content.at_eof() and len(body) <= largest:
                body += await content.readany()
    except TimeoutError as error:
        raise ApiError(408, "client_timeout", "the request's body came too slowly") from error
    return bytes(body)


def terms(headers: Mapping[str, str], now: float, left: float | None = None) -> Terms:
    """How a request is wanted, by its headers or, over gRPC, its metadata. Raises ApiError 400.

    `now` is of the clock that the deadline is of, `left` the seconds that the protocol itself gives the request.
    """
    milliseconds, priority = headers.get(DEADLINE_HEADER), headers.get(PRIORITY_HEADER, "normal").upper()
    if milliseconds is not None:
        if not (milliseconds.isascii() and milliseconds.isdigit() and len(milliseconds) < 12):
            raise bad(f"{DEADLINE_HEADER} is not a number of milliseconds")
        left = min(int(milliseconds) / 1000, math.inf if left is None else left)
    if priority not in Priority.__members__:
        raise bad(f"{PRIORITY_HEADER} is not high, normal or low")
    consumer = headers.get(CONSUMER_HEADER, "")
    if any("\ud800" <= character <= "\udfff" for character in consumer):  # as aiohttp decodes bytes that are no text
        raise bad(f"{CONSUMER_HEADER} is not UTF-8")
    deadline = None if left is None else now + left
    return Terms(deadline, consumer, Priority[priority])


def find(request: web.Request, model: str, version: str | None = None) -> Served:
    """The version that a request means by its path, its body, or both. Raises ApiError 404, 503."""
    served = request[SERVED] = request.app[POOL].find(model, version, place(request))
    return served


def place(request: web.Request) -> tuple[str, str] | None:
    """The name and version that the path of a request is for, if it is for one alone."""
    match = request.match_info
    return (match["name"], match["number"]) if "name" in match else None


def is_at(request: web.Request, served: Served) -> bool:
    """Whether a version is among those that the path of a request is for."""
    return place(request) in (None, (served.entry.name, served.entry.version))


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    encoded = msgspec.json.encode(body)
    return web.Response(body=encoded, status=status, headers=headers, content_type="application/json")
