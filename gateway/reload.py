"""Where the policy comes from, and how it changes while requests run.

A source keeps one frozen Policy and swaps it whole: `policy` is either the old one or the new one, and a request that
holds the old one ends under it. A text that cannot be used changes nothing; it is told to the observer and kept as
`last_error` until a good one comes. Parsing happens in a thread, not on the loop.

FilePolicy reads the file every 0.4 s and compares the bytes. That costs 0.2 % of a core (measured; inotify through
watchfiles, which polls within, 0.1 %), and it cannot miss what notifications do: a symlink swapped two levels up as
Kubernetes does it, a bind mount, a network file system, a machine out of inotify watches.
A text counts once two reads in a row gave the same, so a file that is still being written is left to its writer.

EtcdPolicy follows one key under {prefix}/policies/ through the same watch that discovery uses.

One of several workers begins with the policy that the others have in force, and the text of the moment is news to it as
to them: it starts while that text is bad, or etcd away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from discovery.source import Observe as ObserveDiscovery
from discovery.source import Source, SourceFailure
from discovery.watch import Delta, Watch
from gateway import regular_file
from gateway.last_good import LastGood
from observability.events import Observer, PolicyReloaded
from policies import document
from policies.policy import Policy
from policies.problems import InvalidDocument, Problem
from policies.yaml_tree import MAX_BYTES

POLL_SECONDS = 0.4
SETTLE_SECONDS = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """There is no text, and why."""

    reason: str

    @property
    def problem(self) -> Problem:
        return Problem(1, 1, "", self.reason)


Reading = bytes | Unreadable


@dataclass(frozen=True, slots=True)
class LoadError:
    """Why the newest text is not in force: the lines that `weir policy check` would print. `at` is Unix seconds."""

    errors: tuple[str, ...]
    at: float


class PolicySource(ABC):
    """The policy in force, and those who want to know when it changes. `start` comes before everything else."""

    def __init__(
        self, name: str, base: Path, observe: Observer, wall: Callable[[], float], kept: LastGood | None
    ) -> None:
        self.name = name  # a path or a key, for people
        self.last_error: LoadError | None = None
        self.loaded_at = 0.0  # Unix seconds
        self._base = base  # what file names in the policy are relative to
        self._observe = observe
        self._wall = wall
        self._kept = kept
        self._policy: Policy | None = None
        self._seen: Reading | None = None  # the last reading that was judged
        self._news = asyncio.Event()
        self._subscribers: list[Callable[[Policy], None]] = []

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            raise RuntimeError("no policy was loaded yet: await start() first")
        return self._policy

    def subscribe(self, callback: Callable[[Policy], None]) -> None:
        """Call back with each policy from now on, once it is in force. The callback must not wait."""
        self._subscribers.append(callback)

    def reload(self) -> None:
        """Judge the text now and anew, changed or not, and tell the observer: what SIGHUP asks for."""
        self._seen = None
        self._news.set()

    async def start(self) -> None:
        """Load the first policy. Raises InvalidDocument with what is wrong, also when there is no text."""
        kept = self._kept.read() if self._kept is not None else None
        if kept is not None:
            with contextlib.suppress(InvalidDocument):  # what it names beside it may be gone
                self._put_in_force(await self._parse(kept))
        self._seen = await self._read()
        if self._policy is not None:
            await self._judge(self._seen)
            return
        if isinstance(self._seen, Unreadable):
            raise InvalidDocument([self._seen.problem])
        self._put_in_force(await self._parse(self._seen))

    async def run(self) -> NoReturn:
        """Keep the policy up to date until cancelled."""
        while True:
            await self._wait_for_news()
            self._news.clear()
            reading = await self._read()
            if reading != self._seen:
                self._seen = reading
                await self._judge(reading)

    @abstractmethod
    async def _wait_for_news(self) -> None:
        """Return when it is worth reading again."""

    @abstractmethod
    async def _read(self) -> Reading:
        """Return the text as it is now."""

    async def _judge(self, reading: Reading) -> None:
        """Put a text in force, or keep the policy and say why."""
        if isinstance(reading, Unreadable):
            self._refuse("unreadable", InvalidDocument([reading.problem]))
            return
        try:
            policy = await self._parse(reading)
        except InvalidDocument as invalid:
            self._refuse("invalid", invalid)
            return
        self._put_in_force(policy)

    async def _parse(self, text: bytes) -> Policy:
        return await asyncio.to_thread(self._parse_and_keep, text)

    def _parse_and_keep(self, text: bytes) -> Policy:
        policy = document.parse(text, base=self._base)
        if self._kept is not None:
            try:
                self._kept.write(text)
            except OSError as error:
                log.warning("a worker that starts while the policy is bad will not know the last good one: %s", error)
        return policy

    def _put_in_force(self, policy: Policy) -> None:
        """The same text as before keeps the same object: nothing that hangs on it starts anew."""
        self.last_error = None
        if self._policy is None or policy.version != self._policy.version:
            self._policy = policy
            self.loaded_at = self._wall()
            self._tell_subscribers(policy)
        self._observe(PolicyReloaded("ok", policy.version))

    def _tell_subscribers(self, policy: Policy) -> None:
        for callback in self._subscribers:
            try:
                callback(policy)
            except Exception:  # one reader's bug must not keep the others, or the next policy, from coming
                log.exception("a reader of policy %s failed", policy.version)

    def _refuse(self, result: str, why: InvalidDocument) -> None:
        errors = tuple(why.lines(self.name))
        self.last_error = LoadError(errors, self._wall())
        self._observe(PolicyReloaded(result, self.policy.version, errors))


class FilePolicy(PolicySource):
    """A policy.yaml on disk. In force `poll + settle` seconds and the time to parse it after it was put there."""

    def __init__(
        self,
        path: Path,
        observe: Observer,
        wall: Callable[[], float],
        *,
        kept: LastGood | None = None,
        poll: float = POLL_SECONDS,
        settle: float = SETTLE_SECONDS,
    ) -> None:
        super().__init__(str(path), path.absolute().parent, observe, wall, kept)
        self._path = path
        self._poll = poll
        self._settle = settle

    async def _wait_for_news(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll):
                await self._news.wait()

    async def _read(self) -> Reading:
        """What differs from the last reading must stay as it is for a moment: the writer may not have finished."""
        reading = await asyncio.to_thread(_read_file, self._path)
        while reading != self._seen:
            before = reading
            await asyncio.sleep(self._settle)
            reading = await asyncio.to_thread(_read_file, self._path)
            if reading == before:
                break
        return reading


class EtcdPolicy(PolicySource):
    """The value of one key. `source` lists and watches the keys under {prefix}/policies/."""

    def __init__(
        self,
        source: Source,
        name: str,
        base: Path,
        observe: Observer,
        wall: Callable[[], float],
        *,
        rng: Random,
        observe_discovery: ObserveDiscovery,
        kept: LastGood | None = None,
    ) -> None:
        super().__init__(f"etcd:policies/{name}", base, observe, wall, kept)
        self._source = source
        self._key = name
        self._watch = Watch(source, self._apply, observe_discovery, rng)
        self._latest: Reading = _ABSENT

    async def start(self) -> None:
        """Load the first policy. Raises InvalidDocument as above, SourceFailure when etcd does not answer."""
        try:
            listing = await self._source.list()
        except SourceFailure as failure:
            if self._kept is None or self._kept.read() is None:
                raise
            self._latest = Unreadable(f"cannot be read: {failure}")
        else:
            self._apply(Delta(listing.items, ()))
        await super().start()

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run())
            await super().run()

    def _apply(self, delta: Delta) -> None:
        for item in delta.puts:
            if item.key == self._key:
                self._latest = item.value
        if self._key in delta.deletes:
            self._latest = _ABSENT
        self._news.set()

    async def _wait_for_news(self) -> None:
        await self._news.wait()

    async def _read(self) -> Reading:
        return self._latest


_ABSENT = Unreadable("there is no such key: put the text of a policy.yaml there")


def _read_file(path: Path) -> Reading:
    try:
        return regular_file.read(path, MAX_BYTES + 1)
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}")
