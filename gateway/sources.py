"""Where a gateway hears of its policy, of other gateways and of backends: files, lists, etcd."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import msgspec

from discovery import source as heard
from discovery.announce import Announcement
from discovery.discovery import Discovery, LiveGateways, backends_in, gateways_in
from discovery.endpoint import ModelEntry, Registration
from discovery.etcd import Credentials, EtcdClient, EtcdSettings, EtcdSource
from discovery.probe import HttpProbe, Pace, Prober
from discovery.source import Source, SourceFailure
from discovery.static import StaticBackend, StaticSource
from gateway import config
from gateway.certificates import Certificates, Pem, system_context
from gateway.children import CannotRun
from gateway.config import Config, Etcd
from gateway.last_good import LastGood
from gateway.reload import EtcdPolicy, FilePolicy, PolicySource
from gateway.upstream.fleet import Fleet
from gateway.upstream.load_stream import STALE_SECONDS, LoadStreams
from observability import events
from policies.problems import InvalidDocument

FIRST_LIST_SECONDS = 5.0
FIRST_CHECKS_SECONDS = 1.0
GRPC_PACE = Pace(per_second=50.0)  # a check over gRPC costs some 2 ms of CPU
MAX_POLICY_BYTES = 1024 * 1024


class Sources:
    """Each part is started on a stack, which ends it; `background` runs what it must do meanwhile."""

    def __init__(
        self,
        settings: Config,
        certificates: Mapping[str, Certificates],
        observe: events.Observer,
        wall: Callable[[], float],
        rng: Random,
    ) -> None:
        self._config = settings
        self._certificates = certificates  # by use
        self._observe = observe
        self._wall = wall
        self._rng = rng
        self._probers: list[Prober] = []

    async def start_policy(self, stack: contextlib.AsyncExitStack, kept: LastGood | None) -> PolicySource:
        """The policy, loaded. Raises CannotRun."""
        place, etcd = self._config.policy, self._config.discovery.etcd
        source: PolicySource
        if place.file is not None:
            source = FilePolicy(place.file, self._observe, self._wall, kept=kept)
        elif etcd is not None and place.etcd is not None:
            keys = EtcdSource(await self._client(stack, etcd), f"{etcd.prefix}/policies/", MAX_POLICY_BYTES)
            source = EtcdPolicy(
                keys, place.etcd, Path.cwd(), self._observe, self._wall, rng=self._rng,
                observe_discovery=translated(self._observe, "policies"), kept=kept,
            )  # fmt: skip
        else:
            raise CannotRun("`policy: {etcd: ...}` needs `discovery.etcd`; name a file, or say where etcd is")
        try:
            await source.start()
        except InvalidDocument as invalid:
            raise CannotRun("\nweir: ".join(invalid.lines(source.name))) from invalid
        except SourceFailure as failure:
            raise CannotRun(f"cannot read {source.name}: {failure}; is etcd running?") from failure
        return source

    async def join_gateways(
        self, stack: contextlib.AsyncExitStack, background: Callable[..., None], name: str, about: Mapping[str, object]
    ) -> Callable[[], int]:
        """Be one of the gateways under /gateways/, and know how many there are."""
        etcd = self._config.discovery.etcd
        if etcd is None:
            return lambda: 1
        client, watcher = await self._client(stack, etcd), await self._client(stack, etcd)
        source = gateways_in(watcher, etcd.prefix)
        gateways = LiveGateways(source, rng=self._rng, observe=translated(self._observe, "gateways"))
        background(gateways.run())
        key, value = f"{etcd.prefix}/gateways/{name}", msgspec.json.encode(about)
        await stack.enter_async_context(Announcement(client, key, value, rng=self._rng))
        return lambda: gateways.count

    async def start_discovery(
        self, stack: contextlib.AsyncExitStack, background: Callable[..., None], fleet: Fleet
    ) -> tuple[Discovery, LoadStreams]:
        """What keeps the fleet as it is out there. It has listed the backends, or tries to. Raises CannotRun."""
        discovery = Discovery(
            await self._backends(stack),
            probe=await stack.enter_async_context(HttpProbe(self.backend_tls())),
            allow_networks=self._config.discovery.allow_networks,
            rng=self._rng,
            observe=translated(self._observe, "backends"),
            on_load=lambda key, report: fleet.hear_header(key, report.encode("latin-1", "replace")),
        )
        load_streams = LoadStreams(
            lambda key, report: fleet.hear_load(key, report, STALE_SECONDS),
            fleet.forget_load,
            self.backend_tls(),
            self._rng,
        )
        discovery.store.subscribe(lambda snapshot: fleet.replace(snapshot.endpoints))
        discovery.store.subscribe(lambda snapshot: load_streams.update(snapshot.endpoints))
        discovery.prober.subscribe(fleet.note_health)
        self._probers.append(discovery.prober)
        if self._config.grpc is not None:
            self._probers.append(prober := self._grpc_prober(discovery, fleet))
            background(prober.run())
        background(discovery.run())
        background(load_streams.run())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LIST_SECONDS):
                await discovery.wait_listed()
        return discovery, load_streams

    async def wait_checked(self) -> None:
        """Until each backend that is known was asked for its health once: before that it would be passed over.

        Those that say nothing hold up nobody for longer than FIRST_CHECKS_SECONDS.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_CHECKS_SECONDS):
                for prober in self._probers:
                    await prober.wait_tried()

    def _grpc_prober(self, discovery: Discovery, fleet: Fleet) -> Prober:
        """What asks backends for their health over gRPC, too."""
        from gateway.rpc.health import GrpcProbe, speaking_grpc  # noqa: PLC0415  loaded by nobody else

        certificates = self._certificates.get("backends")
        probe = GrpcProbe(lambda: certificates.in_force.pem if certificates is not None else Pem())
        prober = Prober(probe, translated(self._observe, "backends"), self._rng, pace=GRPC_PACE)
        prober.subscribe(fleet.note_grpc_health)
        discovery.store.subscribe(lambda snapshot: prober.update(speaking_grpc(snapshot)))
        return prober

    def backend_tls(self) -> Callable[[], ssl.SSLContext]:
        """How https backends are spoken to, now."""
        certificates = self._certificates.get("backends")
        return certificates.context if certificates is not None else system_context

    async def _backends(self, stack: contextlib.AsyncExitStack) -> Source:
        settings = self._config.discovery
        if settings.etcd is not None:
            return backends_in(await self._client(stack, settings.etcd), settings.etcd.prefix)
        try:
            return StaticSource(map(_static, settings.static or ()))
        except ValueError as error:
            raise CannotRun(f"discovery.static: {error}") from error

    async def _client(self, stack: contextlib.AsyncExitStack, etcd: Etcd) -> EtcdClient:
        """A client of its own for each use: none waits for another's."""
        certificates = self._certificates.get("etcd")

        def credentials() -> Credentials:
            if certificates is None:
                return Credentials()
            pem = certificates.in_force.pem
            return Credentials(pem.ca, pem.cert, pem.key)

        settings = EtcdSettings(etcd.endpoints, etcd.username, etcd.password_file, credentials)
        return await stack.enter_async_context(EtcdClient(settings))


def translated(observe: events.Observer, of: str) -> heard.Observe:
    """Discovery's own events as those that metrics and logs know. `of` is what is followed: three watches run."""

    def hear(event: heard.DiscoveryEvent) -> None:
        match event:
            case heard.Rejected(key, reason):
                observe(events.DiscoveryRejected(key, reason))
            case heard.Resynced(reason, revision):
                observe(events.DiscoveryResynced(reason, revision, of))
            case heard.StateChanged(state, reason):
                observe(events.DiscoveryState(state.value, reason, of))
            case heard.HealthChanged(service, backend, healthy, reason):
                observe(events.BackendHealth(service, backend, healthy, reason))

    return hear


def _static(one: config.StaticBackend) -> StaticBackend:
    models = tuple(ModelEntry(name, one.version) for name in one.models)
    registration = Registration(one.url, models=models, weight=one.weight, grpc_port=one.grpc_port)
    return StaticBackend(one.service, registration)
