"""The signing keys of the policy's issuers: read from a file or a URL, kept fresh, never lost to a bad answer.

Each issuer has one task, and only that task reads its keys: single flight by construction. It reads at once, then

    read well   -> waits the refresh interval (less up to a fifth, so that replicas do not ask together)
    read badly  -> keeps the last good set, waits a growing time; the set is dropped only when it is a day old
    asked       -> a token names an unknown key: reads now, but at most once in ten seconds, whoever asks how often

A set changes whole: a document that cannot be read, or holds no usable key, changes nothing. `generation` grows with
every change of any set, so whoever remembers a decision made with these keys knows when to forget it. Nobody waits for
keys but a request whose own token needs them, and that one no longer than two fetches may take.

Tokens are judged by the wall clock, and this is where somebody else's is heard: the `Date` of each answer tells how far
ours is off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp

from gateway import regular_file
from observability.events import KeysRefreshed, Observer
from policies.backoff import Backoff
from policies.identity import MAX_DOCUMENT_BYTES, InvalidKeys, KeySet, parse_jwks
from policies.policy import Issuer

_HEADERS = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are what Weir promises; tests shorten them."""

    url_refresh: float = 300.0
    file_refresh: float = 1.0
    fetch: float = 1.0
    refetch: float = 10.0
    retry: float = 1.0
    retry_at_most: float = 30.0
    stale_at_most: float = 86_400.0


@dataclass(frozen=True, slots=True)
class KeysStatus:
    """What an operator may ask about one issuer. `age` is seconds since its keys were last read well.

    `skew` is how many seconds our clock is ahead of the issuer's, to within a second and the time of a fetch; None
    where it has not told its own.
    """

    issuer: str
    keys: int
    rejected: tuple[str, ...]
    result: str  # ok | failed | rejected | unread
    reason: str
    age: float | None
    skew: float | None


class KeyStore:
    """Holds the key set of each issuer. `run` keeps them fresh; without it nothing is read."""

    def __init__(
        self,
        issuers: Iterable[Issuer],
        session: aiohttp.ClientSession,
        observe: Observer,
        rng: Random,
        wall: Callable[[], float],
        timing: Timing = Timing(),
    ) -> None:
        self.generation = 0
        self._session = session
        self._observe = observe
        self._rng = rng
        self._wall = wall
        self._timing = timing
        self._group: asyncio.TaskGroup | None = None
        self._sources: dict[tuple[str, ...], _Source] = {}
        self.update(issuers)

    def keys_of(self, issuer: Issuer) -> KeySet | None:
        """Return the set in force; None while none was ever read, or the last good one is too old."""
        source = self._sources.get(_identity(issuer))
        return None if source is None else source.held.keys

    def is_failing(self, issuer: Issuer) -> bool:
        """Whether the last read went wrong: then a key that is not in the set may exist all the same."""
        source = self._sources.get(_identity(issuer))
        return source is None or source.held.result != "ok"

    def update(self, issuers: Iterable[Issuer]) -> None:
        """Follow a new policy: unchanged issuers keep their keys, new ones are read at once, others are forgotten."""
        wanted = {_identity(issuer): issuer for issuer in issuers}
        for identity in self._sources.keys() - wanted.keys():
            self._sources.pop(identity).close()
        for identity in wanted.keys() - self._sources.keys():
            source = self._sources[identity] = _Source(wanted[identity], self._timing, self._rng)
            if self._group is not None:
                source.task = self._group.create_task(self._keep(source))
        self.generation += 1

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for source in self._sources.values():
                    source.task = group.create_task(self._keep(source))
                await asyncio.Event().wait()
        finally:
            self._group = None

    async def wait_tried(self) -> None:
        """Wait until each issuer's keys were asked for once, two fetches long at most. Does not fail."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * self._timing.fetch):
                for source in tuple(self._sources.values()):
                    await source.tried.wait()

    async def refetch(self, issuer: Issuer) -> None:
        """Wait for keys that may be newer than those in force; returns at once when it is too early to ask again.

        Joins a fetch that is under way. Waits two fetches long at most, and tells nothing: look at `keys_of` again.
        """
        source = self._sources.get(_identity(issuer))
        if source is None or not source.ask(_now()):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * self._timing.fetch):
                await source.landed.wait()

    def statistics(self) -> list[KeysStatus]:
        return [source.status(_now()) for source in self._sources.values()]

    async def _keep(self, source: _Source) -> None:
        while True:
            before = source.held
            source.land(await self._read(source), _now())
            if source.held.keys != before.keys:
                self.generation += 1
            if source.held != before or source.is_remote:  # a file is looked at each second: only news of it is told
                self._observe(KeysRefreshed(source.issuer.issuer, source.held.result, source.held.reason))
            await source.wait_due()

    async def _read(self, source: _Source) -> _Reading:
        """Read the keys once. Never raises, whatever the other side does."""
        issuer = source.issuer
        try:
            document, date = await self._document(issuer.jwks)
            if date is not None:
                source.skew = self._wall() - date
            keys = parse_jwks(document, issuer.algorithms)
        except InvalidKeys as why:
            return _Reading(None, "rejected", str(why))
        except TimeoutError:
            return _Reading(None, "failed", f"no answer within {self._timing.fetch:g} s")
        except _Unreadable as why:
            return _Reading(None, "failed", str(why))
        except aiohttp.ClientError as error:  # its text has addresses, its name says enough
            return _Reading(None, "failed", f"cannot be fetched: {type(error).__name__}")
        except OSError as error:
            return _Reading(None, "failed", f"cannot be read: {error.strerror or type(error).__name__}")
        return _Reading(keys, "ok", "; ".join(keys.rejected))

    async def _document(self, location: str) -> tuple[bytes, float | None]:
        """The document, and the wall time of whoever sent it."""
        if _is_url(location):
            return await _fetch(self._session, location, self._timing.fetch)
        async with asyncio.timeout(self._timing.fetch):
            text = await asyncio.to_thread(_read_file, Path(location))  # a thread, because the disk may be a network
        return text, None


class _Unreadable(Exception):  # noqa: N818  what the answer is, not an error of ours
    """There is an answer, but not a document."""


class _Reading(NamedTuple):
    """What a read brought; as held by a source: the keys in force, and how the last read went."""

    keys: KeySet | None
    result: str  # as in KeysStatus
    reason: str


class _Source:
    """The keys of one issuer, and when to read them again."""

    def __init__(self, issuer: Issuer, timing: Timing, rng: Random) -> None:
        self.issuer = issuer
        self.is_remote = _is_url(issuer.jwks)
        self.held = _Reading(None, "unread", "")
        self.skew: float | None = None
        self.tried = asyncio.Event()
        self.landed = asyncio.Event()  # of the read under way, or of the next
        self.task: asyncio.Task[None] | None = None
        self._timing = timing
        self._rng = rng
        self._backoff = Backoff(timing.retry, timing.retry_at_most, rng)
        self._is_reading = True
        self._due = asyncio.Event()
        self._read_at: float | None = None
        self._asked_at = float("-inf")

    def __repr__(self) -> str:
        return f"<_Source {self.issuer.issuer!r} {self.held.result}, {_count(self.held.keys)} keys>"

    def ask(self, now: float) -> bool:
        """Ask for a read now. False: one was asked for lately, there is nothing to wait for."""
        if self._is_reading:
            return True
        if now < self._asked_at + self._timing.refetch:
            return False
        self._asked_at = now
        self._is_reading = True
        self._due.set()
        return True

    def land(self, reading: _Reading, now: float) -> None:
        """Take what a read brought: good keys replace the set, anything else leaves it, until it is too old."""
        keys, result, reason = reading
        if keys is not None:
            self._read_at = now
            self._backoff.reset()
        elif self._read_at is not None and now < self._read_at + self._timing.stale_at_most:
            keys = self.held.keys
        self.held = _Reading(keys, result, reason)
        self._is_reading = False
        self.tried.set()
        self.landed.set()
        self.landed = asyncio.Event()

    async def wait_due(self) -> None:
        """Wait until it is time for the next read, or until somebody asks for one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._delay()):
                await self._due.wait()
        self._due.clear()
        self._is_reading = True

    def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
        self.landed.set()
        self.tried.set()

    def status(self, now: float) -> KeysStatus:
        keys, result, reason = self.held
        age = None if self._read_at is None else now - self._read_at
        rejected = () if keys is None else keys.rejected
        return KeysStatus(self.issuer.issuer, _count(keys), rejected, result, reason, age, self.skew)

    def _delay(self) -> float:
        refresh = self._timing.url_refresh if self.is_remote else self._timing.file_refresh
        if self.held.result == "ok":
            return refresh * self._rng.uniform(0.8, 1.0)
        return min(refresh, self._backoff.next_delay())


def _identity(issuer: Issuer) -> tuple[str, ...]:
    """What makes the keys of two policies' issuers the same keys."""
    return (issuer.issuer, issuer.jwks, *issuer.algorithms)


def _count(keys: KeySet | None) -> int:
    return 0 if keys is None else len(keys)


def _is_url(location: str) -> bool:
    return "://" in location


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _fetch(session: aiohttp.ClientSession, url: str, seconds: float) -> tuple[bytes, float | None]:
    """Read a document. A redirect, a compressed or an endless body is no document."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with session.get(
        url, headers=_HEADERS, timeout=timeout, allow_redirects=False, auto_decompress=False
    ) as answer:
        if answer.status != 200:
            raise _Unreadable(f"answered {answer.status}")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise _Unreadable("answered compressed, unasked")
        document = bytearray()
        async for chunk in answer.content.iter_any():
            document += chunk
            if len(document) > MAX_DOCUMENT_BYTES:
                break  # parse_jwks says what is wrong with it
        return bytes(document), _unix_seconds(answer.headers.get("date", ""))


def _unix_seconds(date: str) -> float | None:
    """The moment that a Date header tells (RFC 9110, 6.6.1); None for anything else."""
    try:
        parts = parsedate_tz(date)
        return None if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, TypeError):  # no day of any calendar
        return None


def _read_file(path: Path) -> bytes:
    return regular_file.read(path, MAX_DOCUMENT_BYTES + 1)
