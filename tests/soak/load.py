"""Clients: of several consumers, some of whom read slowly or leave, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Protocol, Self

from gateway.config_fields import Address
from tests.soak.backends import LONG
from tests.soak.judgement import INTRUDER, LIMITED, NOMAD, Ending, Outcome
from tests.support.raw_client import Answer, RawClient, chat_request

PAUSE_SECONDS = 0.15  # of a client between two requests, on average
PATIENCE_SECONDS = 40.0  # more than the routes allow
RECONNECT_SECONDS = 0.2
READING_SECONDS = 0.03  # a slow reader's time over a chunk of 32 to 64 KiB, so that the gateway has to wait for it
CLIENTS = {"a": 10, "b": 5}

CONSUMERS = {"gold": 8, "silver": 8, LIMITED: 2, NOMAD: 2, INTRUDER: 1}
"""Who asks, and how often beside the others."""


class Errand(Enum):
    """What a client wants, and how it behaves."""

    EMBED = "embed"
    CHAT = "chat"
    STREAM = "stream"
    READ_SLOWLY = "read_slowly"
    LEAVE = "leave"


ERRANDS = {Errand.EMBED: 10, Errand.CHAT: 8, Errand.STREAM: 6, Errand.READ_SLOWLY: 1, Errand.LEAVE: 3}


class Door(Protocol):
    """Where a gateway is, and when it may be called."""

    address: Address
    ready: asyncio.Event


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it goes out."""

    request_id: str
    errand: Errand
    consumer: str
    data: bytes

    @property
    def service(self) -> str:
        return "embed" if self.errand is Errand.EMBED else "chat"


class Load:
    """Clients that ask for as long as this is entered. Leaving it lets the requests under way end."""

    def __init__(self, doors: dict[str, Door], token: Callable[[str], str], seed: str) -> None:
        self.outcomes: list[Outcome] = []
        self._doors = doors
        self._token = token
        self._seed = seed
        self._numbers = itertools.count(1)
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._ending = False
        self._tasks = [
            asyncio.create_task(self._client(name, Random(f"{self._seed}/{name}/{number}")))
            for name, count in CLIENTS.items()
            for number in range(count)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def _client(self, name: str, rng: Random) -> None:
        """Connects, asks until the connection ends, and so on."""
        door = self._doors[name]
        while not self._ending:
            if not door.ready.is_set():
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                async with RawClient(door.address) as client:
                    while not self._ending and await self._ask(client, name, rng):
                        await asyncio.sleep(rng.expovariate(1 / PAUSE_SECONDS))
            except OSError:  # nobody listens there now; no request was sent
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _ask(self, client: RawClient, name: str, rng: Random) -> bool:
        """One request; says whether the connection may carry another."""
        request = self._request(rng)
        sent_at = time.perf_counter()
        client.send(request.data)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if request.errand is Errand.LEAVE:
                    answer, ending = await _leave(client, rng)
                else:
                    client.pause = READING_SECONDS if request.errand is Errand.READ_SLOWLY else 0.0
                    answer = await client.answer()
                    ending = _ending_of(request, answer)
        except TimeoutError:
            ending = Ending.HUNG
        except (OSError, EOFError):
            ending = Ending.UNANSWERED
        self.outcomes.append(_outcome(request, name, sent_at, answer, ending))
        return answer is not None and ending in (Ending.WHOLE, Ending.REFUSED) and "connection" not in answer.headers

    def _request(self, rng: Random) -> Request:
        [errand] = rng.choices(list(ERRANDS), list(ERRANDS.values()))
        [consumer] = rng.choices(list(CONSUMERS), list(CONSUMERS.values()))
        request_id = f"soak-{next(self._numbers)}"
        document = {"model": LONG if errand is Errand.READ_SLOWLY else "tiny", "messages": []}
        path = "/v1/chat/completions"
        if errand is Errand.EMBED:
            document, path = {"model": "tiny", "input": "hello"}, "/v1/embeddings"
        elif errand is not Errand.CHAT:
            document["stream"] = True
        lines = (f"authorization: Bearer {self._token(consumer)}", f"x-request-id: {request_id}")
        return Request(request_id, errand, consumer, chat_request(document, *lines, path=path))


def _ending_of(request: Request, answer: Answer) -> Ending:
    if not answer.whole:
        return Ending.CUT
    if answer.status >= 400:
        return Ending.REFUSED
    is_stream = request.errand in (Errand.STREAM, Errand.READ_SLOWLY)
    return Ending.WHOLE if not is_stream or b"data: [DONE]" in answer.body[-64:] else Ending.CUT


def _outcome(request: Request, name: str, sent_at: float, answer: Answer | None, ending: Ending) -> Outcome:
    headers = answer.headers if answer is not None else {}
    return Outcome(
        request_id=request.request_id,
        gateway=name,
        service=request.service,
        consumer=request.consumer,
        sent_at=sent_at,
        ended_at=time.perf_counter(),
        ending=ending,
        status=answer.status if answer is not None else 0,
        code=answer.json["error"]["code"] if answer is not None and ending is Ending.REFUSED else "",
        backend=headers.get("x-weir-backend", ""),
        is_told=answer is None or headers.get("content-type") != "text/event-stream" or b'"error"' in answer.body,
    )


async def _leave(client: RawClient, rng: Random) -> tuple[Answer | None, Ending]:
    """Goes away at some moment, politely or not; the answer is what had come of it by then."""
    head = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0.0, 0.6)):
            head = await client.reader.readuntil(b"\r\n\r\n")
            await asyncio.Event().wait()
    if rng.random() < 0.5:
        client.writer.transport.abort()
    return (Answer(int(head.split()[1]), {}, b"", whole=False) if head else None), Ending.LEFT
