"""A source in memory that keeps its history and breaks when it is told to, for tests of what follows a source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from discovery.source import Changes, Compacted, Deleted, KeyValue, Listing, SourceFailure, Unavailable


class ScriptedSource:
    """Behaves as etcd does. `lists`, `watches` and `pings` count the calls; `open_watches` those that stand."""

    def __init__(self) -> None:
        self.revision = 1
        self.cluster_id = 7
        self.lists = self.watches = self.pings = self.open_watches = 0
        self.is_away = False  # every call fails at once
        self.is_frozen = False  # no call answers, no watch speaks
        self.is_deaf = False  # only the watches are silent
        self._data: dict[str, KeyValue] = {}
        self._history: list[KeyValue | Deleted] = []
        self._compacted = 0
        self._broken: SourceFailure | None = None
        self._news = asyncio.Condition()

    @property
    def keys(self) -> dict[str, bytes]:
        return {item.key: item.value for item in self._data.values()}

    async def put(self, key: str, value: bytes = b"v") -> None:
        self.revision += 1
        self._data[key] = KeyValue(key, value, self.revision)
        await self.tell(self._data[key])

    async def delete(self, key: str) -> None:
        if self._data.pop(key, None) is not None:
            self.revision += 1
            await self.tell(Deleted(key, self.revision))

    async def tell(self, *events: KeyValue | Deleted) -> None:
        """Lets the watches say this, whether or not it is true."""
        async with self._news:
            self._history.extend(events)
            self._news.notify_all()

    async def break_watches(self, failure: SourceFailure | None = None) -> None:
        async with self._news:
            self._broken = failure or Unavailable("broken")
            self._news.notify_all()
        await asyncio.sleep(0)
        self._broken = None

    async def compact(self) -> None:
        self._compacted = self.revision

    async def wipe(self) -> None:
        """Another cluster, empty, at its first revision."""
        self.cluster_id += 1
        self.revision, self._compacted = 1, 0
        self._data.clear()
        self._history.clear()
        await self.break_watches()

    async def list(self) -> Listing:
        self.lists += 1
        await self._answer()
        return Listing(self.revision, self.cluster_id, tuple(self._data.values()))

    async def ping(self) -> int:
        self.pings += 1
        await self._answer()
        return max((item.revision for item in self._data.values()), default=0)

    async def watch(self, revision: int) -> AsyncGenerator[Changes, None]:
        self.watches += 1
        await self._answer()
        if revision <= self._compacted:
            raise Compacted(f"history before {self._compacted + 1} is gone")
        told = next((i for i, each in enumerate(self._history) if each.revision >= revision), len(self._history))
        self.open_watches += 1
        try:
            yield Changes()
            while True:
                async with self._news:
                    await self._news.wait_for(lambda told=told: self._broken or self._speaks(told))
                if self._broken:
                    raise self._broken
                events, told = tuple(self._history[told:]), len(self._history)
                yield Changes(events)
        finally:
            self.open_watches -= 1

    def _speaks(self, told: int) -> bool:
        return len(self._history) > told and not (self.is_frozen or self.is_deaf)

    async def _answer(self) -> None:
        if self.is_away:
            raise Unavailable("away")
        if self.is_frozen:
            await asyncio.Event().wait()
