"""Clients that send one request after another while a test does something to the world around them.

async with Traffic(gateway.data_address, clients=4) as traffic:
    etcd.kill()
    await traffic.more(100)
assert traffic.failed == []
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Self

from tests.support.raw_client import Answer, RawClient


@dataclass(frozen=True)
class Asked:
    """One request and its answer. Times are those of `time.perf_counter`."""

    sent_at: float
    answered_at: float
    answer: Answer

    @property
    def status(self) -> int:
        return self.answer.status

    @property
    def policy(self) -> str:
        return self.answer.headers["x-weir-policy"]

    @property
    def backend(self) -> str | None:
        return self.answer.headers.get("x-weir-backend")


class Traffic:
    """`clients` connections, each with one request in flight and `pause` seconds between two."""

    def __init__(self, *addresses, clients: int = 4, pause: float = 0.004, lines: tuple[str, ...] = ()) -> None:
        self._addresses = addresses
        self._clients = clients
        self._pause = pause
        self._lines = lines
        self._ending = False
        self.asked: list[Asked] = []
        self.broken: list[BaseException] = []

    @property
    def failed(self) -> list[object]:
        """What a client would have seen as a failure: any status but 200, a cut answer, a broken connection."""
        return [*self.broken, *(each for each in self.asked if each.status != 200 or not each.answer.whole)]

    def since(self, moment: float) -> list[Asked]:
        """What was sent from `moment` on."""
        return [each for each in self.asked if each.sent_at >= moment]

    async def more(self, count: int, seconds: float = 15.0) -> list[Asked]:
        """Wait until `count` requests that are sent from now on were answered, and return them."""
        now = time.perf_counter()
        async with asyncio.timeout(seconds):
            while len(self.since(now)) < count and not self.broken:
                await asyncio.sleep(0.01)
        return self.since(now)

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._client(self._addresses[number % len(self._addresses)]))
            for number in range(self._clients)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets the requests in flight end."""
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def _client(self, address) -> None:
        try:
            while not self._ending:
                async with RawClient(address) as client:
                    await self._ask_until_closed(client)
        except (OSError, EOFError, TimeoutError) as broken:
            self.broken.append(broken)

    async def _ask_until_closed(self, client: RawClient) -> None:
        while not self._ending:
            sent_at = time.perf_counter()
            answer = await asyncio.wait_for(client.ask(None, *self._lines), 15)
            self.asked.append(Asked(sent_at, time.perf_counter(), answer))
            if answer.headers.get("connection") == "close":
                return
            await asyncio.sleep(self._pause)
