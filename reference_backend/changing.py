"""News without what is new: who wants to know looks again."""

from __future__ import annotations

import asyncio


class Changing:
    """What can be waited for to change, by as many as want to."""

    def __init__(self) -> None:
        self.changes = 0  # since the start
        self._news = asyncio.Event()

    def change(self) -> None:
        self.changes += 1
        self._news.set()

    async def wait_change(self, seen: int) -> None:
        """Wait until `changes` is another number than `seen`."""
        while self.changes == seen:
            self._news.clear()
            await self._news.wait()


class InFlight(Changing):
    """How many requests are being answered: `with` it, one more. Only that none is left is a change."""

    count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_error: object) -> None:
        self.count -= 1
        if not self.count:
            self.change()

    async def wait_idle(self) -> None:
        while self.count:
            await self.wait_change(self.changes)
