"""Follows a source for ever: list everything, then watch what changes.

    Empty => Listed      everything was listed, and how it differs from what we had was handed on
    Empty => Empty       it could not be listed: after a delay
    Listed => Watching   the watch stands
    Listed => Empty      it does not: the history was compacted meanwhile, or the member was lost
    Watching => Watching a change, a sign of life, or the minute's full listing that found nothing new
    Watching => Listed   that listing found what the watch should have told: watch anew from there
    Watching => Empty    compacted, lost, or frozen: silent, and a ping unanswered or newer than what we were told

Shape and names follow kube-rs' `watcher`. Invariants:

- What was handed on last stays in force however long the source is away: every edge back to Empty keeps it, and the
  next listing is compared with it.
- A broken watch always lists again and never resumes: a listing is linearizable and shows another cluster, and some
  etcd releases lost deletes around a compaction (etcd-io/etcd#18089). The minute's listing is for the same reason.
- News older than what is known changes nothing.
- Nothing here retries without a delay that grows with full jitter until a watch has stood for a while.

Only revisions are remembered here, not values: memory is bound by the number of keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Final, NoReturn

from discovery.source import (
    Changes,
    Compacted,
    KeyValue,
    Listing,
    Observe,
    Resynced,
    Source,
    SourceFailure,
    StateChanged,
    SyncState,
    Unavailable,
)
from policies.backoff import Backoff

PIECE_KEYS: Final = 500


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. Silence and ping together are how long a frozen connection may go unnoticed."""

    silence: float = 25.0
    ping: float = 5.0
    relist: float = 60.0  # +-10 %
    listing: float = 30.0
    backoff_base: float = 0.1
    backoff_cap: float = 10.0


@dataclass(frozen=True, slots=True)
class Delta:
    """What is different now. A key stands in one of the two at most."""

    puts: tuple[KeyValue, ...]
    deletes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Empty:
    """Everything must be listed, for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Listed:
    """All up to `revision` is known; the watch from there on does not stand yet."""

    revision: int


@dataclass(frozen=True, slots=True)
class Watching:
    stream: Stream
    since: float
    relist_at: float


State = Empty | Listed | Watching


class Frozen(SourceFailure):
    """The connection looks alive and says nothing, or not everything."""


class Watch:
    """Hands `apply` one Delta after another. `apply` must not wait and must not raise."""

    def __init__(
        self, source: Source, apply: Callable[[Delta], None], observe: Observe, rng: Random, timing: Timing = Timing()
    ) -> None:
        self._source = source
        self._apply = apply
        self._observe = observe
        self._rng = rng
        self._timing = timing
        self._backoff = Backoff(timing.backoff_base, timing.backoff_cap, rng)
        self._known: dict[str, int] = {}  # key -> revision of its last put
        self._revision = 0  # of the newest thing known
        self._cluster_id = 0
        self._last_contact: float | None = None
        self._listed = asyncio.Event()
        self.state = SyncState.COLD
        self._told: SyncState | None = None

    def __repr__(self) -> str:
        return f"<Watch {self.state.value} revision={self._revision} keys={len(self._known)}>"

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def seconds_since_contact(self) -> float | None:
        """Since the source last gave a sign of life, None before the first."""
        return None if self._last_contact is None else _now() - self._last_contact

    async def wait_listed(self) -> None:
        """Until everything was listed once."""
        await self._listed.wait()

    def forget(self, key: str) -> None:
        """The next full listing hands this key on again, though it has not changed."""
        self._known.pop(key, None)

    async def run(self) -> NoReturn:
        state: State = Empty("start")
        try:
            while True:
                state = await self._step(state)
        finally:
            if isinstance(state, Watching):
                await state.stream.aclose()

    async def _step(self, state: State) -> State:
        match state:
            case Empty():
                return await self._empty(state)
            case Listed():
                return await self._open(state)
            case Watching():
                return await self._watching(state)

    async def _empty(self, state: Empty) -> Empty | Listed:
        """Empty => (Listed or Empty): all is listed, or the source cannot now."""
        try:
            listing = await self._list()
        except SourceFailure as failure:
            return await self._fail(state.reason, failure)
        await self._take(listing, state.reason)
        return Listed(listing.revision)

    async def _open(self, state: Listed) -> Watching | Empty:
        """Listed => (Watching or Empty): the watch stands, or it was too late or broke."""
        stream = Stream(self._source.watch(state.revision + 1))
        try:
            first = await self._first(stream)
        except SourceFailure as failure:
            await stream.aclose()
            return await self._fail(_reason(failure), failure)
        except BaseException:
            await stream.aclose()
            raise
        self._change(first)
        self._set_state(SyncState.WATCHING)
        return Watching(stream, _now(), self._next_relist())

    async def _watching(self, state: Watching) -> State:
        """Watching => (Watching, Listed or Empty): news or a sign of life, a gap, or the end of the watch."""
        try:
            until_relist = state.relist_at - _now()
            if until_relist <= 0:
                return await self._relist(state)
            changes = await state.stream.next(min(self._timing.silence, until_relist))
            if changes is not None:
                self._change(changes)
            elif until_relist > self._timing.silence:
                await self._check_alive()
        except SourceFailure as failure:
            await state.stream.aclose()
            if _now() - state.since >= self._timing.backoff_cap:
                self._backoff.reset()
            return await self._fail(_reason(failure), failure)
        return state

    async def _first(self, stream: Stream) -> Changes:
        first = await stream.next(self._timing.listing)
        if first is None:
            raise Frozen(f"no watch within {self._timing.listing:g} s")
        return first

    async def _relist(self, state: Watching) -> Watching | Listed:
        listing = await self._list()
        if not await self._take(listing, "periodic"):
            return replace(state, relist_at=self._next_relist())
        await state.stream.aclose()
        return Listed(listing.revision)

    async def _list(self) -> Listing:
        try:
            async with asyncio.timeout(self._timing.listing):
                return await self._source.list()
        except TimeoutError as error:
            raise Frozen(f"no listing within {self._timing.listing:g} s") from error

    async def _check_alive(self) -> None:
        try:
            async with asyncio.timeout(self._timing.ping):
                newest = await self._source.ping()
        except (TimeoutError, SourceFailure) as error:
            raise Frozen(f"silent, and no answer to a ping: {error}") from error
        if newest > self._revision:
            raise Frozen(f"revision {newest} was never told")
        self._last_contact = _now()

    async def _fail(self, reason: str, failure: SourceFailure) -> Empty:
        """Back to Empty, after a delay."""
        self._set_state(SyncState.STALE if self._listed.is_set() else SyncState.COLD, f"{reason}: {failure}")
        await asyncio.sleep(self._backoff.next_delay())
        return Empty(reason)

    async def _take(self, listing: Listing, reason: str) -> bool:
        """Hands on how the listing differs from what is known; says whether it does."""
        self._last_contact = _now()
        if self._cluster_id not in (0, listing.cluster_id) or listing.revision < self._revision:
            reason = "cluster_changed"
            revisions: dict[str, int] = {}  # of another history: nothing in it can be told to be unchanged
        else:
            revisions = self._known
        puts = tuple(item for item in listing.items if revisions.get(item.key) != item.revision)
        listed = {item.key: item.revision for item in listing.items}
        deletes = tuple(key for key in self._known if key not in listed)
        self._known, self._revision, self._cluster_id = listed, listing.revision, listing.cluster_id
        await self._hand_on(puts, deletes)
        self._listed.set()
        self._observe(Resynced(reason, listing.revision))
        return bool(puts or deletes)

    async def _hand_on(self, puts: tuple[KeyValue, ...], deletes: tuple[str, ...]) -> None:
        """In pieces, so that thousands of keys do not stop the loop; what is new comes before all that is gone."""
        while len(puts) > PIECE_KEYS:
            self._apply(Delta(puts[:PIECE_KEYS], ()))
            puts = puts[PIECE_KEYS:]
            await asyncio.sleep(0)
        if puts or deletes:
            self._apply(Delta(puts, deletes))

    def _change(self, changes: Changes) -> None:
        self._last_contact = _now()
        had = {event.key for event in changes.events if event.key in self._known}
        latest: dict[str, KeyValue | None] = {}
        for event in changes.events:
            known = self._known.get(event.key, 0)
            if event.revision < self._revision or event.revision <= known:
                continue
            if isinstance(event, KeyValue):
                self._known[event.key] = event.revision
                latest[event.key] = event
            elif self._known.pop(event.key, None) is not None:
                latest[event.key] = None
            self._revision = event.revision
        puts = tuple(item for item in latest.values() if item is not None)
        deletes = tuple(key for key, item in latest.items() if item is None and key in had)
        if puts or deletes:
            self._apply(Delta(puts, deletes))

    def _set_state(self, state: SyncState, reason: str = "") -> None:
        self.state = state
        if state is not self._told:  # that it is cold, too, once it was tried
            self._told = state
            self._observe(StateChanged(state, reason))

    def _next_relist(self) -> float:
        return _now() + self._timing.relist * self._rng.uniform(0.9, 1.1)


class Stream:
    """An endless iterator that can be waited for with a limit, without losing what comes after the limit."""

    def __init__(self, changes: AsyncGenerator[Changes, None]) -> None:
        self._changes: Final = changes
        self._pending: asyncio.Task[Changes] | None = None

    async def next(self, seconds: float) -> Changes | None:
        """The next item, None when none came in time. Raises SourceFailure when there will be none."""
        if self._pending is None:
            self._pending = asyncio.create_task(self._read())
        done, _ = await asyncio.wait({self._pending}, timeout=seconds)
        if not done:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    async def aclose(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await self._changes.aclose()

    async def _read(self) -> Changes:
        async for changes in self._changes:
            return changes
        raise Unavailable("the watch ended")


def _reason(failure: SourceFailure) -> str:
    match failure:
        case Compacted():
            return "compacted"
        case Frozen():
            return "frozen"
        case _:
            return "lost"


def _now() -> float:
    return asyncio.get_running_loop().time()
