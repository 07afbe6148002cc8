"""Makes batches of what waits, and never waits itself: where nothing runs, whatever is there goes at once.

A request has parts, each of which runs once and by itself: the rows of a tensor are one part, each of several texts is
one. While a batch runs, requests gather. When it ends, the next one is made of the parts of those whose turn it is
(admission.py), as many as fit, all with one `key` (what can lie in one batch: equal shapes). Nobody passes another of
its tenant and class: a batch takes no more of a tenant from the first part on that does not fit.

Two batches may be under way. When as much waits as fills one, it is made and handed over while the one before it still
runs, so that the runner finds it ready; less than that stays, because more may join it. This is the rule of Triton's
dynamic batcher at its default of no delay; `Limits.delay` is its `max_queue_delay_microseconds`.

How many requests may be there is not decided here: stateless.py does, for what every executor takes.

Invariants, which tests hold: nothing waits while nothing runs (with no delay); every part is answered once; what is
cancelled before its batch is made takes no place in it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from reference_backend.admission import FairQueue
from reference_backend.tensors import ANYHOW, Lost, Terms

UNDER_WAY = 2  # batches: one that runs, one that is ready
AGE_SECONDS = 10.0  # of waiting that make up for one class


@dataclass(frozen=True, slots=True)
class Limits:
    """`size` of a batch is the sum of its parts' sizes: rows, or tokens. A larger part goes alone."""

    size: int
    delay: float = 0.0  # seconds that a request waits for others although nothing runs


@dataclass(slots=True, eq=False)
class Part:
    """What runs at once. `number` is its place in its request."""

    request: Request
    number: int
    payload: Any
    size: int


class Request:
    """What somebody waits for. In the batches of its parts is what has the same `key`."""

    __slots__ = (
        "answers", "arrival", "arrived_at", "key", "priority", "size", "tenant", "unanswered", "waiting",
    )  # fmt: skip

    def __init__(self, parts: Sequence[tuple[Any, int]], key: Hashable = None, terms: Terms = ANYHOW) -> None:
        self.key = key
        self.tenant, self.priority = terms.tenant, terms.priority
        self.arrival, self.arrived_at = 0, 0.0
        self.waiting = deque([Part(self, number, payload, size) for number, (payload, size) in enumerate(parts)])
        self.size = sum([size for _, size in parts])  # of what waits
        self.answers: list[Any] = [None] * len(parts)
        self.unanswered = len(parts)


class Batches:
    """Decides what runs next. Does nothing, and is told the time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.under_way = 0
        self._size = 0  # of what waits
        self._arrivals = 0
        self._queue: FairQueue[Request] = FairQueue(AGE_SECONDS)

    def __repr__(self) -> str:
        return f"<Batches {self.under_way} under way, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """The requests of which something waits."""
        return len(self._queue)

    def add(self, request: Request, now: float) -> None:
        """Let one wait, which has parts."""
        self._arrivals += 1
        request.arrival, request.arrived_at = self._arrivals, now
        self._queue.push(request)
        self._size += request.size

    def withdraw(self, request: Request) -> None:
        """Take out what is not wanted any more. Harmless for what is out already."""
        if request.waiting:
            self._queue.remove(request)
            self._size -= request.size
            request.waiting.clear()

    def next(self, now: float) -> list[Part]:
        """The batch that is to run now, which is under way from here to `over`; nothing when it is not time for one."""
        if not self.waiting or self.under_way >= UNDER_WAY:
            return []
        if self._size < self.limits.size and (self.under_way or now < self.due()):
            return []
        batch: list[Part] = []
        room = self.limits.size

        def may_join(request: Request) -> bool:
            return not batch or (request.key == batch[0].request.key and request.waiting[0].size <= room)

        while (request := self._queue.head(now, may_join)) is not None:
            batch.append(self._take(request))
            room -= batch[-1].size
        self.under_way += 1
        return batch

    def over(self) -> None:
        """A batch has ended."""
        self.under_way -= 1

    def due(self) -> float:
        """When the first of what waits has waited long enough for company."""
        return min((request.arrived_at for request in self._queue), default=0.0) + self.limits.delay

    def _take(self, request: Request) -> Part:
        """The next part of one."""
        part = request.waiting.popleft()
        if not request.waiting:
            self._queue.remove(request)
        self._queue.charge(request.tenant, read=part.size)
        request.size -= part.size
        self._size -= part.size
        return part


Run = Callable[[list[Any]], Awaitable[Sequence[Any]]]


class Batcher:
    """A `with` around `ask`. `run` gets the payloads of a batch and gives as many answers, in their order.

    A batch that fails is run again, one by one: only the part that is at fault fails, and its request.
    """

    def __init__(self, run: Run, limits: Limits, clock: Callable[[], float]) -> None:
        self.batches = Batches(limits)
        self._run, self._clock = run, clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered: dict[Request, asyncio.Future[list[Any]]] = {}  # those for which somebody waits
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Whoever still waits for an answer is told Lost."""
        for request in self._answered:
            self._fail(request, Lost())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    async def ask(self, parts: Sequence[tuple[Any, int]], key: Hashable = None, terms: Terms = ANYHOW) -> list[Any]:
        """The answers to payloads, each given with its size. Raises Lost, and whatever `run` raised.

        They may run in several batches. A cancelled call takes no place in one that is not made yet.
        """
        if not parts:
            return []
        request = Request(parts, key, terms)
        answered = self._answered[request] = asyncio.get_running_loop().create_future()
        self.batches.add(request, self._clock())
        self._go()
        try:
            return await answered
        finally:
            self.batches.withdraw(request)
            del self._answered[request]
            if answered.done() and not answered.cancelled():
                answered.exception()  # it may be that nobody has asked

    def _go(self) -> None:
        """Set what can run running."""
        while batch := self.batches.next(self._clock()):
            task = asyncio.create_task(self._carry_out(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.batches.under_way and self.batches.waiting:  # only a delay makes that so
            left = max(self.batches.due() - self._clock(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(left, self._go)

    async def _carry_out(self, batch: list[Part]) -> None:
        try:
            await self._answer(batch)
        finally:
            self.batches.over()
            self._go()

    async def _answer(self, batch: list[Part]) -> None:
        wanted = [part for part in batch if not self._is_over(part.request)]
        if not wanted:
            return
        try:
            results = await self._run([part.payload for part in wanted])
        except Exception as error:  # noqa: BLE001  it is handed on to who asked
            if len(wanted) == 1:
                self._fail(wanted[0].request, error)
            else:
                for part in wanted:
                    await self._answer([part])
            return
        for part, result in zip(wanted, results, strict=True):
            self._deliver(part, result)

    def _deliver(self, part: Part, result: object) -> None:
        request = part.request
        request.answers[part.number] = result
        request.unanswered -= 1
        if not request.unanswered and not self._is_over(request):
            self._answered[request].set_result(request.answers)

    def _fail(self, request: Request, error: Exception) -> None:
        """Nothing more of it is run."""
        self.batches.withdraw(request)
        if not self._is_over(request):
            self._answered[request].set_exception(error)

    def _is_over(self, request: Request) -> bool:
        """Whether nobody waits for it any more."""
        answered = self._answered.get(request)
        return answered is None or answered.done()
