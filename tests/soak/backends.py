"""Backends that serve chats, streams and embeddings, well or badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from random import Random
from typing import Self

from tests.soak.schedule import Kind
from tests.support.fault_proxy import FaultProxy
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
LONG = "long"
"""A model whose streams are 1 MiB, for clients that read slowly."""
LONG_PIECES, LONG_PIECE = 32, "x" * 32_768
DRIP_BYTES, DRIP_RATE = 24, 4096


class SoakBackend:
    """One backend, a network in front of it, and at most one fault."""

    def __init__(self, name: str, rng: Random) -> None:
        self.name = name
        self._rng = rng
        self._kind: Kind | None = None
        self._mended = asyncio.Event()
        self._server = ScriptedBackend(self._answer)
        self._line: FaultProxy

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(self._server)
            self._line = await stack.enter_async_context(FaultProxy(server.port))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        return self._line.url

    @property
    def bugs(self) -> list[BaseException]:
        return self._server.failures

    @contextlib.asynccontextmanager
    async def broken(self, kind: Kind) -> AsyncIterator[None]:
        """It has this fault as long as this is entered."""
        if kind is Kind.CRASH:
            await self._line.refuse()
            await self._line.reset()
        elif kind is Kind.DRIP:
            self._line.to_client.slices, self._line.to_client.bandwidth = DRIP_BYTES, DRIP_RATE
        else:
            self._kind = kind
        try:
            yield
        finally:
            self._kind = None
            self._mended.set()
            self._mended = asyncio.Event()
            self._line.to_client.heal()
            if kind is Kind.CRASH:
                await self._line.listen()

    async def _answer(self, connection: BackendConnection) -> None:
        await self._fail(connection)
        asked = json.loads(connection.body)
        await asyncio.sleep(self._rng.uniform(0.002, 0.03))
        await self._fail(connection)
        if asked.get("stream"):
            await self._stream(connection, asked["model"])
        elif self._kind is Kind.CUT:
            await connection.send(
                b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": 1'
            )
            raise Hangup
        else:
            await connection.json({"id": "1", "object": "chat.completion", "choices": [], "usage": USAGE})

    async def _fail(self, connection: BackendConnection) -> None:
        """What keeps a request from being answered at all."""
        match self._kind:
            case Kind.STALL:
                await self._mended.wait()
                raise Hangup
            case Kind.RESET:
                connection.reset()
                raise Hangup
            case Kind.ERROR:
                await connection.json({"error": "out of memory"}, 500)
                raise Hangup
            case Kind.NOT_STARTED:
                await connection.json({"error": "loading"}, 503, "x-backend-not-started: 1")
                raise Hangup
            case Kind.BUSY:
                await connection.json({"error": "busy"}, 429)
                raise Hangup

    async def _stream(self, connection: BackendConnection, model: str) -> None:
        is_long = model == LONG
        pieces = [LONG_PIECE] * LONG_PIECES if is_long else ["word"] * self._rng.randint(3, 20)
        await connection.begin_events()
        for number, piece in enumerate(pieces):
            if self._kind is Kind.STALL:
                await self._mended.wait()
                raise Hangup
            if self._kind is Kind.CUT and number == 2:
                raise Hangup
            await connection.chunk(_event({"choices": [{"index": 0, "delta": {"content": piece}}]}))
            await asyncio.sleep(0.0 if is_long else self._rng.uniform(0.01, 0.1))
        await connection.chunk(_event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")


def _event(document: object) -> bytes:
    return b"data: %b\n\n" % json.dumps(document).encode()
