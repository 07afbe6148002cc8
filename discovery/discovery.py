"""Discovery put together: source -> watch -> vetting -> store <-> prober, for a gateway and for a look from outside.

    async with EtcdClient(settings) as client, HttpProbe() as probe:
        discovery = Discovery(backends_in(client), probe=probe, allow_networks=networks, rng=rng, observe=observe)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(discovery.run())
            await discovery.wait_listed()
            discovery.store.snapshot.services["tiny"]

Everything runs in one event loop and nothing is shared with threads, so no state here needs a lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Final, NoReturn

from discovery.endpoint import DEFAULT_PREFIX, MAX_VALUE_BYTES, Endpoint
from discovery.etcd import EtcdClient, EtcdSource
from discovery.probe import Checked, Probe, Prober
from discovery.source import DiscoveryEvent, Observe, Rejected, Source
from discovery.store import Store
from discovery.vetting import Network, Resolve, Verdict, Vetting, system_resolver
from discovery.watch import Delta, Watch

COUNT_HELD_SECONDS: Final = 15.0
CHECKS_AT_ONCE: Final = 64


def backends_in(client: EtcdClient, prefix: str = DEFAULT_PREFIX) -> EtcdSource:
    return EtcdSource(client, f"{prefix}/backends/", MAX_VALUE_BYTES)


def gateways_in(client: EtcdClient, prefix: str = DEFAULT_PREFIX) -> EtcdSource:
    return EtcdSource(client, f"{prefix}/gateways/", MAX_VALUE_BYTES)


class Discovery:
    """Who is there and how they are, kept up to date while `run` runs."""

    def __init__(
        self,
        source: Source,
        *,
        probe: Probe,
        allow_networks: Sequence[Network],
        rng: Random,
        observe: Observe,
        on_load: Callable[[str, str], None] | None = None,
        resolve: Resolve = system_resolver,
    ) -> None:
        self.prober = Prober(probe, observe, rng, on_load=on_load)
        self.prober.subscribe(lambda _key, _is_passing: self._wake.set())
        self.store = Store(self.prober.is_passing)
        self.store.subscribe(self.prober.update)
        self._wake = asyncio.Event()
        self._vetting = Vetting(self._publish, self._forget, observe, allow_networks=allow_networks, resolve=resolve)
        self.watch = Watch(source, self._vetting.apply, observe, rng)

    def __repr__(self) -> str:
        return f"<Discovery {self.watch!r} {self._vetting!r} {self.store!r} {self.prober!r}>"

    async def run(self) -> None:
        """Runs until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watch.run())
            tasks.create_task(self._vetting.run())
            tasks.create_task(self.prober.run())
            tasks.create_task(self._advance())

    async def wait_listed(self) -> None:
        """Until everybody was listed once, the names among them were looked up, and the store has told it."""
        await self.watch.wait_listed()
        await self._vetting.wait_resolved()
        if self.store.is_behind:
            told = asyncio.Event()
            forget = self.store.subscribe(lambda _snapshot: told.set())
            try:
                await told.wait()
            finally:
                forget()

    def _forget(self, key: str) -> None:
        self.watch.forget(key)

    def _publish(self, verdict: Verdict) -> None:
        self.store.apply(verdict.puts, verdict.deletes, verdict.rejected, _now())
        self._wake.set()

    async def _advance(self) -> NoReturn:
        """Lets time pass in the store: when something is due there, and when health or who is there has changed."""
        while True:
            due = self.store.next_due()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            self.store.advance(_now())


class LiveGateways:
    """How many gateways share the limits, kept up to date while `run` runs.

    A smaller number takes force only 15 s later: an etcd that comes back empty finds every gateway again within a
    lease, and until then none of them may think that it is alone. With etcd away the last number stays.
    """

    def __init__(self, source: Source, *, rng: Random, observe: Observe) -> None:
        self._watch = Watch(source, self._apply, observe, rng)
        self._ids: set[str] = set()
        self._recent: deque[tuple[float, int]] = deque()  # until when it counts, number

    def __repr__(self) -> str:
        return f"<LiveGateways {self.count}>"

    @property
    def count(self) -> int:
        """1 at least: whoever asks is one."""
        now = _now()
        while self._recent and self._recent[0][0] <= now:
            self._recent.popleft()
        return max(1, len(self._ids), *(number for _, number in self._recent))

    async def run(self) -> NoReturn:
        await self._watch.run()

    async def wait_listed(self) -> None:
        await self._watch.wait_listed()

    def _apply(self, delta: Delta) -> None:
        if delta.deletes:
            self._recent.append((_now() + COUNT_HELD_SECONDS, self.count))
        self._ids.difference_update(delta.deletes)
        self._ids.update(item.key for item in delta.puts)


@dataclass(frozen=True, slots=True)
class Seen:
    """One registration as a look from outside finds it: a backend and its check, or why it is ignored."""

    key: str
    endpoint: Endpoint | None
    checked: Checked


async def list_backends(
    source: Source, *, probe: Probe, allow_networks: Sequence[Network], resolve: Resolve = system_resolver
) -> list[Seen]:
    """Lists, vets and checks everybody once. Raises SourceFailure when the source cannot be read."""
    listing = await source.list()
    endpoints: dict[str, Endpoint] = {}
    ignored: dict[str, str] = {}

    def publish(verdict: Verdict) -> None:
        endpoints.update((endpoint.key, endpoint) for endpoint in verdict.puts)

    def observe(event: DiscoveryEvent) -> None:
        if isinstance(event, Rejected):
            ignored[event.key] = event.reason

    vetting = Vetting(publish, lambda _key: None, observe, allow_networks=allow_networks, resolve=resolve)
    vetting.apply(Delta(listing.items, ()))
    async with asyncio.TaskGroup() as tasks:
        resolving = tasks.create_task(vetting.run())
        await vetting.wait_resolved()
        resolving.cancel()
    checked = await _check_all(probe, list(endpoints.values()))
    found = [Seen(endpoint.key, endpoint, each) for endpoint, each in zip(endpoints.values(), checked, strict=True)]
    found.extend(Seen(key, None, Checked(False, reason)) for key, reason in ignored.items())
    return sorted(found, key=lambda seen: seen.key)


async def _check_all(probe: Probe, endpoints: Sequence[Endpoint]) -> list[Checked]:
    slots = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def check(endpoint: Endpoint) -> Checked:
        async with slots:
            return await probe(endpoint)

    return await asyncio.gather(*map(check, endpoints))


def _now() -> float:
    return asyncio.get_running_loop().time()
