"""An identity provider's key endpoint on loopback that answers as a test says, well or badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class JwksServer:
    """Serves `document` with `status` and `headers`, unless `answer` is set. `asked` counts the
    requests, `finished` those whose answer was sent to its end."""

    def __init__(self, document: bytes = b"") -> None:
        self.document = document
        self.status = 200
        self.headers: dict[str, str] = {}
        self.answer: Answer | None = None
        self.asked = 0
        self.finished = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.answer is None:
            return web.Response(status=self.status, headers=self.headers, body=self.document)
        response = await self.answer(request)
        self.finished += 1
        return response


@asynccontextmanager
async def jwks_server(document: bytes = b"") -> AsyncIterator[JwksServer]:
    server = JwksServer(document)
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
        yield server
    finally:
        await runner.cleanup()


async def silence(_: web.Request) -> web.StreamResponse:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError


def slow(document: bytes, seconds: float) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.Response(body=document)

    return answer


async def drip(request: web.Request) -> web.StreamResponse:
    """One byte each 0.4 s, without end."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.4)


async def flood(request: web.Request) -> web.StreamResponse:
    """Ten MiB, as fast as they are read."""
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(160):
        await response.write(b" " * 65_536)
    return response


def cut(document: bytes) -> Answer:
    """Half of what Content-Length says, then the end of the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": str(2 * len(document))})
        await response.prepare(request)
        await response.write(document)
        request.transport.close()
        return response

    return answer
