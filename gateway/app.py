"""The composition root: from a Config to a running gateway. The only place that knows all parts, clocks and dice.

Start: policy, keys and store first, then discovery's first list, then the data listener; readiness follows. A gateway
whose etcd or whose identity providers are away starts all the same and says so on /readyz. Stop: not ready, then no new
connections, then the requests in flight get their time, then what is left is told that the gateway is shutting down.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import resource
import secrets
import signal
import ssl
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, cast

import aiohttp
import msgspec
import structlog
from aiohttp import web

from discovery import source as heard
from discovery.announce import Announcement
from discovery.discovery import Discovery, LiveGateways, backends_in, gateways_in
from discovery.endpoint import ModelEntry, Registration
from discovery.etcd import Credentials, EtcdClient, EtcdSettings, EtcdSource
from discovery.probe import HttpProbe
from discovery.source import Source, SourceFailure
from discovery.static import StaticBackend, StaticSource
from discovery.store import GRACE_SECONDS
from gateway import admin, config
from gateway.admission import Admission
from gateway.attempts import Forwarder
from gateway.call import Ids
from gateway.certificates import (
    Certificates,
    InvalidCertificates,
    client_context,
    named_in,
    server_context,
    system_context,
)
from gateway.children import CannotRun
from gateway.config import Config, Etcd
from gateway.config_fields import Address
from gateway.gauges import register_gauges, register_identity, register_load, register_load_streams
from gateway.handshake import TlsDoor
from gateway.identify import Identifier
from gateway.keys import KeyStore
from gateway.last_good import LastGood
from gateway.local_answers import LocalAnswers
from gateway.memory import Memory
from gateway.pipeline import InForce, Pipeline, Settings
from gateway.reload import EtcdPolicy, FilePolicy, PolicySource
from gateway.server import DataServer
from gateway.store import RedisStore
from gateway.supply import check_supply
from gateway.upstream.endpoint import Backend
from gateway.upstream.fleet import Fleet
from gateway.upstream.load_stream import STALE_SECONDS, LoadStreams
from gateway.views import views
from observability import events
from observability.access_log import AccessLog
from observability.fanout import Fanout
from observability.line_writer import LineWriter
from observability.logs import EventLog, configure
from observability.metrics import Metrics
from observability.recent import Recent
from observability.tail_sampling import TailSampler
from observability.tracing import SpanExporter, otlp_export, spans
from policies.breaker import State
from policies.overload import Overload
from policies.policy import Policy
from policies.problems import InvalidDocument
from policies.routing import plan_of

if TYPE_CHECKING:
    from gateway.rpc.listener import RpcListener

ACCEPT_SECONDS = 5.0  # how long a gateway that was told to stop still accepts, so that balancers get to know
DRAIN_SECONDS = 60.0
FIRST_LIST_SECONDS = 5.0
OTHER_WORKERS_SECONDS = 0.25  # between two looks whether they serve
LAG_PERIOD_SECONDS = 0.5
GC_ALLOCATIONS = 50_000  # a request makes no cycles: looking for them after each 700 new objects costs 5 % for nothing
MAX_POLICY_BYTES = 1024 * 1024
RESERVED_FILES = 64  # for what is not a request: listeners, etcd, Redis, keys, probes, the log
FEWEST_CONNECTIONS = 16


class Gateway:
    """A running gateway, for as long as `running` is entered."""

    def __init__(self, settings: Config, worker: int | None = None, last_good: LastGood | None = None) -> None:
        self.config = settings
        self.worker = worker
        self._last_good = last_good  # policy, of all workers
        self.id = secrets.token_hex(8)
        self.version = version_of("weir")
        self.clock = time.perf_counter
        self.wall = time.time
        self.rng = Random(secrets.randbits(128))  # noqa: S311  spreads load and names requests; nothing secret comes of it
        self._flush: Callable[[], None] = lambda: None
        self.metrics = Metrics(lambda: self._flush())  # noqa: PLW0108  what it is now is not what it will be
        self.recent = Recent(lambda: self._flush())  # noqa: PLW0108  as above
        self._lags: deque[float] = deque([0.0], maxlen=int(10 / LAG_PERIOD_SECONDS))
        self.overload = Overload()
        self.memory = Memory()
        self.data_address: Address
        self.admin_address: Address
        self.grpc_address: Address
        self.pipeline: Pipeline
        self.fleet: Fleet
        self.discovery: Discovery
        self.load_streams: LoadStreams
        self.forwarder: Forwarder
        self.policy: PolicySource
        self.keys: KeyStore
        self.is_listening = False  # on the data port
        self.grpc: RpcListener | None = None
        self.certificates: dict[str, Certificates] = {}  # by use

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Gateway]:
        """Start everything; stop it in reverse order. Raises CannotRun, InvalidDocument, SourceFailure."""
        async with contextlib.AsyncExitStack() as stack:
            observe = self._observers(stack)
            background = await stack.enter_async_context(_background())

            await self._read_certificates(background, observe)

            etcd = self.config.discovery.etcd
            self.policy = await self._start_policy(stack, observe, etcd)
            background(self.policy.run())

            session = await stack.enter_async_context(aiohttp.ClientSession())
            self.keys = keys = KeyStore(self.policy.policy.issuers, session, observe, self.rng, self.wall)
            background(keys.run())
            await keys.wait_tried()

            gateways = await self._join_gateways(stack, background, observe, etcd)
            store = None
            if self.config.redis is not None:
                store = RedisStore(self.config.redis.url, rng=self.rng, observe=observe)
                if certificates := self.certificates.get("redis"):
                    certificates.subscribe(store.renew_connection)
                background(store.run())
                await store.wait_probed()
            admission = Admission(store, gateways, self.clock)

            self.fleet = fleet = self._make_fleet(observe)
            stack.callback(fleet.close)
            self.discovery = await self._start_discovery(stack, background, observe, etcd, fleet)
            background(self._tidy())

            identifier = Identifier(keys, lambda principal: plan_of(self.policy.policy, principal))
            ids = Ids(self.rng)
            self.forwarder = Forwarder(fleet, self.clock, self.rng, ids)
            local = LocalAnswers(fleet, lambda: not self.not_ready(), self.version)
            limits = self.config.limits
            self.pipeline = Pipeline(
                Settings(limits.body, limits.body_timeout, self.config.telemetry.sample),
                identifier, admission, fleet, self.forwarder, local, observe.request_ended, self.clock, self.wall,
                self.rng, ids,
            )  # fmt: skip

            def put_in_force(policy: Policy) -> None:
                keys.update(policy.issuers)
                identifier.use(policy)
                fleet.keep_breakers(route.breaker for route in policy.routes)
                self.pipeline.in_force = InForce.of(policy)

            put_in_force(self.policy.policy)
            self.policy.subscribe(put_in_force)

            server = DataServer(
                self.pipeline.handle,
                self.pipeline.reject,
                idle=limits.idle,
                head_timeout=limits.head_timeout,
                header_bytes=limits.header,
                connections=self._most_connections(),
                name=f"weir-{self.id}".encode(),
            )
            background(self._watch_load(observe))
            register_gauges(
                self.metrics,
                self.pipeline,
                server,
                fleet,
                self.discovery,
                self.policy,
                store,
                lambda: max(self._lags),
                self.certificates.values(),
            )
            register_load(self.metrics, self.overload, self.memory)
            register_load_streams(self.metrics, self.load_streams)
            register_identity(self.metrics, keys, identifier)
            await self._listen_admin(stack)
            if self.config.grpc is not None:
                self.grpc = await self._bind_grpc(stack, self.config.grpc.listen, ids, server)
            listener = await self._bind_data(stack, server, observe)
            if self.worker is None:
                await self._open(listener)
            else:
                background(self._open_when_of_use(listener))
            gc.collect()
            gc.freeze()  # what lives as long as the process need not be looked at again
            gc.set_threshold(GC_ALLOCATIONS, 50, 50)
            yield self

    def reload(self) -> None:
        """Judge the policy and the certificates now, changed or not: what SIGHUP asks for."""
        self.policy.reload()
        for certificates in self.certificates.values():
            certificates.reload()

    def not_ready(self) -> tuple[str, ...]:
        """Why no traffic should come here; empty when it should."""
        draining = ["the gateway is draining"] if self.pipeline.draining else []
        closed = [] if self.is_listening else ["the data port is not open yet"]
        return (*draining, *self._missing(), *closed)

    def _missing(self) -> list[str]:
        """What is not known yet, without which every request would be refused."""
        reasons = []
        if not self.discovery.watch.revision and self.discovery.watch.state is heard.SyncState.COLD:
            reasons.append("discovery has not listed the backends yet")
        policy = self.policy.policy
        if not policy.anonymous and not any(self.keys.keys_of(issuer) for issuer in policy.issuers):
            reasons.append("no issuer's keys could be read yet, so nobody could be let in")
        return reasons

    def _lacks_backends(self) -> bool:
        """Whether a service that the policy names has none."""
        named = {target.service for route in self.policy.policy.routes for target in route.to}
        return not named <= {backend.endpoint.service for backend in self.fleet.backends.values()}

    # Parts

    def _observers(self, stack: contextlib.AsyncExitStack) -> Fanout:
        telemetry = self.config.telemetry
        writer = LineWriter(1)
        stack.callback(writer.close)
        configure(writer, console=telemetry.log == "console")
        of_requests: list[events.RequestObserver] = [self.metrics.request_ended, self.recent, AccessLog(writer)]
        self.metrics.counter("weir_log_dropped_total", "Log lines given up.", (), lambda: [((), float(writer.dropped))])
        if telemetry.otlp is not None:
            exporter = SpanExporter(otlp_export(telemetry.otlp, "weir", self.version))
            stack.callback(exporter.close)
            of_requests.append(TailSampler(exporter.put, spans, telemetry.slow))
            self.metrics.counter(
                "weir_otlp_export_failures_total", "Traces lost.", (), lambda: [((), float(exporter.failures))]
            )
        call_later = asyncio.get_running_loop().call_later
        fanout = Fanout(of_requests, (self.metrics, EventLog()), call_later, self.clock)
        self._flush = fanout.flush
        stack.callback(fanout.flush)
        return fanout

    async def _read_certificates(self, background: Callable[..., None], observe: events.Observer) -> None:
        """Those that weir.yaml names, for each use of TLS."""
        for use, key, files in named_in(self.config):
            make = server_context if use == "listener" else client_context
            self.certificates[use] = one = Certificates(use, files, make, observe, self.wall)
            try:
                await one.start()
            except InvalidCertificates as invalid:
                raise CannotRun(f"cannot use what `{key}` names: {invalid}") from invalid
            background(one.run())

    def _make_fleet(self, observe: events.Observer) -> Fleet:
        fleet = Fleet(self.clock, self.rng, _tell_breaker(observe), self._backend_tls())
        if certificates := self.certificates.get("backends"):
            certificates.subscribe(fleet.renew_connections)
        return fleet

    def _backend_tls(self) -> Callable[[], ssl.SSLContext]:
        certificates = self.certificates.get("backends")
        return certificates.context if certificates is not None else system_context

    async def _start_policy(
        self, stack: contextlib.AsyncExitStack, observe: events.Observer, etcd: Etcd | None
    ) -> PolicySource:
        place = self.config.policy
        source: PolicySource
        if place.file is not None:
            source = FilePolicy(place.file, observe, self.wall, kept=self._last_good)
        elif etcd is not None and place.etcd is not None:
            client = await stack.enter_async_context(EtcdClient(self._settings(etcd)))
            keys = EtcdSource(client, f"{etcd.prefix}/policies/", MAX_POLICY_BYTES)
            source = EtcdPolicy(
                keys, place.etcd, Path.cwd(), observe, self.wall, rng=self.rng, observe_discovery=_translate(observe),
                kept=self._last_good,
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

    async def _join_gateways(
        self,
        stack: contextlib.AsyncExitStack,
        background: Callable[..., None],
        observe: events.Observer,
        etcd: Etcd | None,
    ) -> Callable[[], int]:
        """Be one of the gateways under /gateways/, and know how many there are."""
        if etcd is None:
            return lambda: 1
        client = await stack.enter_async_context(EtcdClient(self._settings(etcd)))
        watcher = await stack.enter_async_context(EtcdClient(self._settings(etcd)))
        gateways = LiveGateways(gateways_in(watcher, etcd.prefix), rng=self.rng, observe=_translate(observe))
        background(gateways.run())
        about = {
            "admin": str(self._admin_listen()),
            "data": str(self.config.listen),
            "started_at": self.wall(),
            "version": self.version,
        }
        key = f"{etcd.prefix}/gateways/{self.id}"
        await stack.enter_async_context(Announcement(client, key, msgspec.json.encode(about), rng=self.rng))
        return lambda: gateways.count

    async def _start_discovery(
        self,
        stack: contextlib.AsyncExitStack,
        background: Callable[..., None],
        observe: events.Observer,
        etcd: Etcd | None,
        fleet: Fleet,
    ) -> Discovery:
        settings = self.config.discovery
        source: Source
        if etcd is not None:
            source = backends_in(await stack.enter_async_context(EtcdClient(self._settings(etcd))), etcd.prefix)
        else:
            try:
                source = StaticSource(map(_static, settings.static or ()))
            except ValueError as error:
                raise CannotRun(f"discovery.static: {error}") from error
        discovery = Discovery(
            source,
            probe=await stack.enter_async_context(HttpProbe(self._backend_tls())),
            allow_networks=settings.allow_networks,
            rng=self.rng,
            observe=_translate(observe),
            on_load=lambda key, report: fleet.hear_header(key, report.encode("latin-1", "replace")),
        )
        self.load_streams = LoadStreams(
            lambda key, report: fleet.hear_load(key, report, STALE_SECONDS),
            fleet.forget_load,
            self._backend_tls(),
            self.rng,
        )
        discovery.store.subscribe(lambda snapshot: fleet.replace(snapshot.endpoints))
        discovery.store.subscribe(lambda snapshot: self.load_streams.update(snapshot.endpoints))
        discovery.prober.subscribe(fleet.note_health)
        background(discovery.run())
        background(self.load_streams.run())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LIST_SECONDS):
                await discovery.wait_listed()
        return discovery

    def _settings(self, etcd: Etcd) -> EtcdSettings:
        certificates = self.certificates.get("etcd")

        def credentials() -> Credentials:
            if certificates is None:
                return Credentials()
            pem = certificates.in_force.pem
            return Credentials(pem.ca, pem.cert, pem.key)

        return EtcdSettings(etcd.endpoints, etcd.username, etcd.password_file, credentials)

    # Listeners

    def _admin_listen(self) -> Address:
        listen = self.config.admin.listen
        return replace(listen, port=listen.port + self.worker) if self.worker and listen.port else listen

    async def _listen_admin(self, stack: contextlib.AsyncExitStack) -> None:
        auth = self.config.admin.auth
        documents = views(self.fleet, self.discovery, self.policy, self.recent)
        token = auth.token if auth is not None else None
        app = admin.admin_app(self.metrics, self.not_ready, documents, token, self.clock)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=admin.IDLE_SECONDS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        listen = self._admin_listen()
        protocol = admin.at_most(admin.MOST_CONNECTIONS, cast("web.Server", runner.server))
        try:
            listener = await asyncio.get_running_loop().create_server(protocol, listen.host, listen.port)
        except OSError as error:
            raise _cannot_listen("admin.listen", listen, error) from error
        stack.callback(listener.close)
        self.admin_address = Address(listen.host, listener.sockets[0].getsockname()[1])

    def _most_connections(self) -> int:
        """How many clients at a time, and a word to the operator if it is fewer than were asked for."""
        wanted, files = self.config.limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if self.config.grpc is not None and files != resource.RLIM_INFINITY:
            files = files * 2 // 3  # as many clients may come over gRPC, who share the connections to the backends
        most = most_connections(wanted, files)
        if most < wanted:
            structlog.get_logger().warning(
                "fewer connections than limits.connections",
                connections=most,
                wanted=wanted,
                open_files=files,
                hint="raise the limit of open files (ulimit -n, LimitNOFILE), or lower limits.connections",
            )
        return most

    async def _bind_data(
        self, stack: contextlib.AsyncExitStack, server: DataServer, observe: events.Observer
    ) -> asyncio.Server:
        """Take the data port, without listening there yet."""
        listen = self.config.listen
        factory: object = server
        if certificates := self.certificates.get("listener"):
            factory = door = TlsDoor(server, certificates.context, server.head_timeout, observe)
            stack.callback(door.abort)
        try:
            listener = await asyncio.get_running_loop().create_server(
                cast("Callable[[], asyncio.Protocol]", factory),
                listen.host,
                listen.port,
                backlog=4096,
                reuse_port=self.worker is not None,
                start_serving=False,
            )
        except OSError as error:
            raise _cannot_listen("listen", listen, error) from error
        self.data_address = Address(listen.host, listener.sockets[0].getsockname()[1])
        stack.push_async_callback(self._drain, listener, server)
        return listener

    async def _bind_grpc(
        self, stack: contextlib.AsyncExitStack, listen: Address, ids: Ids, server: DataServer
    ) -> RpcListener:
        """Take the port for gRPC, whose half of the gateway is loaded by nobody else."""
        from gateway.rpc.listener import rpc_listener  # noqa: PLC0415  as said

        grpc = rpc_listener(
            self.pipeline,
            ids,
            self.config.limits,
            server.name,
            lambda: not self.not_ready(),
            self.certificates,
            self.clock,
            self.rng,
            connections=server.most_connections,
            shares_port=self.worker is not None,
        )
        try:
            port = await stack.enter_async_context(grpc.bound(listen))
        except OSError as error:
            raise _cannot_listen("grpc.listen", listen, error) from error
        self.grpc_address = Address(listen.host, port)
        return grpc

    async def _open(self, listener: asyncio.Server) -> None:
        await listener.start_serving()
        if self.grpc is not None:
            await self.grpc.start()
        self.is_listening = True

    async def _open_when_of_use(self, listener: asyncio.Server) -> None:
        """Listen on the shared port, but leave requests to other workers while this one would have to refuse them.

        Backends come back one by one to an etcd that was wiped. Other workers go on with those they knew for
        GRACE_SECONDS; as long a newcomer waits for one of each service.
        """
        while self._missing() and await _is_served(self.data_address):  # noqa: ASYNC110  another process: no event tells
            await asyncio.sleep(OTHER_WORKERS_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                while self._lacks_backends() and await _is_served(self.data_address):  # noqa: ASYNC110  as above
                    await asyncio.sleep(OTHER_WORKERS_SECONDS)
        if not self.pipeline.draining:
            await self._open(listener)

    # Ends

    async def _drain(self, listener: asyncio.Server, server: DataServer) -> None:
        """Let what is under way end; what will not, or may not because a second signal came, is told and cut."""
        self.pipeline.draining = True
        try:
            if server.connections or self.grpc is not None:
                await asyncio.sleep(ACCEPT_SECONDS if self.pipeline.inflight else 0)
            listener.close()
            server.close_idle()
            if self.grpc is not None:
                self.grpc.stop_accepting()
            await self._wait_idle(DRAIN_SECONDS)
        finally:
            listener.close()
            for relay in tuple(self.forwarder.relays):
                relay.drain()
            if self.grpc is not None:
                self.grpc.drain()
            await self._wait_idle(1.0)
            server.abort()
            await self._wait_idle(1.0)  # each request has its record before the log closes

    async def _wait_idle(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.pipeline.inflight:  # noqa: ASYNC110  a poll at the end costs less than an event in each request
                    await asyncio.sleep(0.05)

    # Housekeeping

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.fleet.tidy()

    async def _watch_load(self, observe: events.Observer) -> None:
        """Measure how late the loop is and how much memory is in use; take on less where it is too much."""
        overload = self.overload
        while True:
            before = self.clock()
            await asyncio.sleep(LAG_PERIOD_SECONDS)
            now = self.clock()
            lag = max(0.0, now - before - LAG_PERIOD_SECONDS)
            self._lags.append(lag)
            if overload.note(now, lag, self.memory.share()):
                self.pipeline.keeps_connections = overload.keeps_connections
                self.pipeline.takes_requests = overload.takes_requests
                observe(events.OverloadChanged(overload.state, overload.reason))


async def serve(settings: Config, *, worker: int | None = None, last_good: LastGood | None = None) -> None:
    """Run a gateway until SIGTERM or SIGINT, which drain it; a second one ends it at once. Raises CannotRun."""
    check_supply()
    _raise_file_limit()
    # Threads write logs and export spans: none may hold the loop for Python's usual 5 ms, at each callback anew.
    sys.setswitchinterval(0.00005)
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # during the start: the policy is read anew anyway
    gateway = Gateway(settings, worker, last_good)
    try:
        async with gateway.running():
            loop.add_signal_handler(signal.SIGHUP, gateway.reload)
            structlog.get_logger().info(
                "serving",
                data=str(gateway.data_address),
                admin=str(gateway.admin_address),
                **({"grpc": str(gateway.grpc_address)} if gateway.grpc is not None else {}),
                version=gateway.version,
            )
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


@contextlib.asynccontextmanager
async def _background() -> AsyncIterator[Callable[..., None]]:
    """A task group whose tasks run until the gateway stops; one that fails ends the gateway."""
    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield lambda work: tasks.append(group.create_task(work))
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as failures:
        if len(failures.exceptions) > 1:
            raise
        raise failures.exceptions[0] from None


def most_connections(wanted: int, files: int) -> int:
    """How many clients a process with so many open files may take at a time.

    Each may need a second one for its backend. Who would be one too many is closed at once, so that no request, probe
    or lease fails for want of a file.
    """
    if files == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(FEWEST_CONNECTIONS, files // 2 - RESERVED_FILES))


async def _is_served(address: Address) -> bool:
    """Whether somebody listens there."""
    try:
        async with asyncio.timeout(OTHER_WORKERS_SECONDS):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:  # somebody who is busy
        return True
    except OSError:
        return False
    writer.close()
    return True


def _tell_breaker(observe: events.Observer) -> Callable[[Backend, State], None]:
    return lambda backend, state: observe(
        events.BreakerChanged(backend.endpoint.service, backend.endpoint.id, state.value)
    )


def _translate(observe: events.Observer) -> heard.Observe:
    """Discovery's own events as those that metrics and logs know."""

    def translated(event: heard.DiscoveryEvent) -> None:
        match event:
            case heard.Rejected(key, reason):
                observe(events.DiscoveryRejected(key, reason))
            case heard.Resynced(reason, revision):
                observe(events.DiscoveryResynced(reason, revision))
            case heard.StateChanged(state):
                observe(events.DiscoveryState(state.value))
            case heard.HealthChanged(service, backend, healthy, reason):
                observe(events.BackendHealth(service, backend, healthy, reason))

    return translated


def _static(one: config.StaticBackend) -> StaticBackend:
    models = tuple(ModelEntry(name, one.version) for name in one.models)
    registration = Registration(one.url, models=models, weight=one.weight, grpc_port=one.grpc_port)
    return StaticBackend(one.service, registration)


def _cannot_listen(key: str, listen: Address, error: OSError) -> CannotRun:
    if error.errno == errno.EADDRINUSE:
        return CannotRun(f"{listen} is in use; stop what listens there, or set another `{key}`")
    return CannotRun(f"cannot listen on {listen}: {error.strerror or error}; set another `{key}`")


def _raise_file_limit() -> None:
    """As many open files as the system lets us have: each request in flight is two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
