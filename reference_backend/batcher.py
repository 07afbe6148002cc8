"""Makes batches of what waits, and never waits itself: where nothing runs, whatever is there goes at once.

While a batch runs, items gather. When it ends, the next one is made of those whose turn it is (admission.py), as many
as fit, all with one `key` (what can lie in one batch: equal shapes). Nobody passes another of its tenant and class: a
batch takes no more of a tenant from the first item on that does not fit.

Two batches may be under way. When as much waits as fills one, it is made and handed over while the one before it still
runs, so that the runner finds it ready; less than that stays, because more may join it. This is the rule of Triton's
dynamic batcher at its default of no delay; `Limits.delay` is its `max_queue_delay_microseconds`.

Invariants, which tests hold: nothing waits while nothing runs (with no delay); every item is answered once; what is
cancelled before its batch is made takes no place in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from reference_backend.admission import FairQueue
from reference_backend.tensors import ANYHOW, Full, Lost, Terms

UNDER_WAY = 2  # batches: one that runs, one that is ready
AGE_SECONDS = 10.0  # of waiting that make up for one class


@dataclass(frozen=True, slots=True)
class Limits:
    """`size` of a batch is the sum of its items' sizes: rows, or tokens. A larger item goes alone."""

    size: int
    waiting: int  # items; a request with more of them is only taken when nothing waits
    delay: float = 0.0  # seconds that an item waits for others although nothing runs


@dataclass(slots=True, eq=False)
class Item:
    """Something to be run, in whose batch is what has the same `key`."""

    payload: Any
    size: int
    key: Hashable = None
    tenant: str = ""
    priority: int = 1
    arrival: int = 0
    arrived_at: float = 0.0
    is_waiting: bool = False


class Batches:
    """Decides what runs next. Does nothing, and is told the time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.under_way = 0
        self.waiting = 0
        self._size = 0  # of what waits
        self._arrivals = 0
        self._queue: FairQueue[Item] = FairQueue(AGE_SECONDS)

    def __repr__(self) -> str:
        return f"<Batches {self.under_way} under way, {self.waiting} of {self.limits.waiting} waiting>"

    def add(self, items: Sequence[Item], now: float) -> None:
        """Let items wait, all or none of them. Raises Full."""
        if self.waiting and self.waiting + len(items) > self.limits.waiting:
            raise Full
        for item in items:
            self._arrivals += 1
            item.arrival, item.arrived_at, item.is_waiting = self._arrivals, now, True
            self._queue.push(item)
            self.waiting += 1
            self._size += item.size

    def withdraw(self, item: Item) -> None:
        """Take out what goes on, or is not wanted any more. Harmless for what is out already."""
        if item.is_waiting:
            item.is_waiting = False
            self._queue.remove(item)
            self.waiting -= 1
            self._size -= item.size

    def next(self, now: float) -> list[Item]:
        """The batch that is to run now, which is under way from here to `over`; nothing when it is not time for one."""
        if not self.waiting or self.under_way >= UNDER_WAY:
            return []
        if self._size < self.limits.size and (self.under_way or now < self.due()):
            return []
        batch: list[Item] = []
        room = self.limits.size

        def may_join(item: Item) -> bool:
            return not batch or (item.key == batch[0].key and item.size <= room)

        while (item := self._queue.head(now, may_join)) is not None:
            self.withdraw(item)
            self._queue.charge(item.tenant, read=item.size)
            batch.append(item)
            room -= item.size
        self.under_way += bool(batch)
        return batch

    def over(self) -> None:
        """A batch has ended."""
        self.under_way -= 1

    def due(self) -> float:
        """When the first of what waits has waited long enough for company."""
        return min((item.arrived_at for item in self._queue), default=0.0) + self.limits.delay


Run = Callable[[list[Any]], Awaitable[Sequence[Any]]]


class Batcher:
    """A `with` around `ask`. `run` gets the payloads of a batch and gives as many answers, in their order.

    A batch that fails is run again, one by one: only the item that is at fault fails.
    """

    def __init__(self, run: Run, limits: Limits, clock: Callable[[], float]) -> None:
        self.batches = Batches(limits)
        self._run, self._clock = run, clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[Item, asyncio.Future[Any]] = {}  # of items for which somebody waits
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Whoever still waits for an answer is told Lost."""
        for item, answer in self._answers.items():
            self.batches.withdraw(item)
            if not answer.done():
                answer.set_exception(Lost())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    async def ask(self, parts: Sequence[tuple[Any, int]], key: Hashable = None, terms: Terms = ANYHOW) -> list[Any]:
        """The answers to payloads, each given with its size. Raises Full, Lost, and whatever `run` raised.

        They may run in several batches. A cancelled call takes no place in one that is not made yet.
        """
        items = [Item(payload, size, key, terms.tenant, terms.priority) for payload, size in parts]
        self.batches.add(items, self._clock())
        loop = asyncio.get_running_loop()
        answers: dict[Item, asyncio.Future[Any]] = {item: loop.create_future() for item in items}
        self._answers |= answers
        self._go()
        try:
            return [await answer for answer in answers.values()]
        finally:
            for item, answer in answers.items():
                del self._answers[item]
                self.batches.withdraw(item)
                if not (answer.cancel() or answer.cancelled()):
                    answer.exception()  # it may be that nobody has asked

    def _go(self) -> None:
        """Set what can run running."""
        while batch := self.batches.next(self._clock()):
            task = asyncio.create_task(self._carry_out(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.batches.waiting and not self.batches.under_way:  # only a delay makes that so
            left = max(self.batches.due() - self._clock(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(left, self._go)

    async def _carry_out(self, batch: list[Item]) -> None:
        try:
            await self._answer(batch)
        finally:
            self.batches.over()
            self._go()

    async def _answer(self, batch: list[Item]) -> None:
        wanted = [item for item in batch if item in self._answers]
        if not wanted:
            return
        results: Sequence[Any]
        try:
            results = await self._run([item.payload for item in wanted])
        except Exception as error:  # noqa: BLE001  it is handed on to who asked
            if len(wanted) > 1:
                for item in wanted:
                    await self._answer([item])
                return
            results = [error]
        for item, result in zip(wanted, results, strict=True):
            answer = self._answers.get(item)
            if answer is None or answer.done():
                continue  # nobody waits any more
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)
