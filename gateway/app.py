"""The composition root: from a Config to a running gateway. The only place that knows all parts, clocks and dice.

Start: policy, keys and store first, then discovery's first list and the first check of each backend's health, then the
data listener; readiness follows. A gateway whose etcd or whose identity providers are away starts all the same and says
so on /readyz. Stop: the reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from importlib.metadata import version as version_of
from random import Random
from typing import TYPE_CHECKING

import aiohttp

from discovery.discovery import Discovery
from discovery.source import SyncState
from discovery.store import GRACE_SECONDS
from gateway import admin
from gateway.admission import Admission
from gateway.attempts import Forwarder
from gateway.call import Ids
from gateway.certificates import Certificates, InvalidCertificates, client_context, named_in, server_context
from gateway.children import CannotRun
from gateway.config import Config
from gateway.config_fields import Address
from gateway.drain import drain
from gateway.gauges import register_gauges, register_identity, register_load, register_load_streams
from gateway.identify import Identifier
from gateway.keys import KeyStore
from gateway.last_good import LastGood
from gateway.listeners import address_of, allowed_connections, bind_data, cannot_listen, listen_admin, wait_useful
from gateway.local_answers import LocalAnswers
from gateway.pipeline import InForce, Pipeline, Settings
from gateway.pressure import Pressure
from gateway.reload import PolicySource
from gateway.server import DataServer
from gateway.sources import Sources
from gateway.upstream.endpoint import Backend
from gateway.upstream.fleet import Fleet
from gateway.upstream.load_stream import LoadStreams
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
from policies.policy import Policy
from policies.routing import plan_of

if TYPE_CHECKING:
    from gateway.rpc.listener import RpcListener

GC_ALLOCATIONS = 50_000  # a request makes no cycles: looking for them after each 700 new objects costs 5 % for nothing


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
        self.pressure = Pressure(self.clock)
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

            sources = Sources(self.config, self.certificates, observe, self.wall, self.rng)
            self.policy = await sources.start_policy(stack, self._last_good)
            background(self.policy.run())

            session = await stack.enter_async_context(aiohttp.ClientSession())
            self.keys = keys = KeyStore(self.policy.policy.issuers, session, observe, self.rng, self.wall)
            background(keys.run())
            await keys.wait_tried()

            gateways = await sources.join_gateways(stack, background, self.id, self._about())
            store = None
            if self.config.redis is not None:
                from gateway.store import RedisStore  # noqa: PLC0415  a fifth of a start's CPU, for those who use it

                store = RedisStore(self.config.redis.url, rng=self.rng, observe=observe)
                if certificates := self.certificates.get("redis"):
                    certificates.subscribe(store.renew_connection)
                background(store.run())
                await store.wait_probed()
            admission = Admission(store, gateways, self.clock)

            self.fleet = fleet = Fleet(self.clock, self.rng, _tell_breaker(observe), sources.backend_tls())
            stack.callback(fleet.close)
            if certificates := self.certificates.get("backends"):
                certificates.subscribe(fleet.renew_connections)
            self.discovery, self.load_streams = await sources.start_discovery(stack, background, fleet)
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
                connections=allowed_connections(self.config),
                name=f"weir-{self.id}".encode(),
            )
            background(self.pressure.watch(self.pipeline, observe))
            register_gauges(
                self.metrics,
                self.pipeline,
                server,
                fleet,
                self.discovery,
                self.policy,
                store,
                lambda: self.pressure.lag,
                self.certificates.values(),
            )
            register_load(self.metrics, self.pressure.overload, self.pressure.memory)
            register_load_streams(self.metrics, self.load_streams)
            register_identity(self.metrics, keys, identifier)
            await self._listen_admin(stack)
            if self.config.grpc is not None:
                self.grpc = await self._bind_grpc(stack, self.config.grpc.listen, ids, server)
            listen, certificates = self.config.listen, self.certificates.get("listener")
            shares_port = self.worker is not None
            listener = await bind_data(stack, server, listen, certificates, observe, shares_port=shares_port)
            self.data_address = address_of(listener, listen)
            stack.push_async_callback(drain, self.pipeline, self.forwarder, listener, server, self.grpc)
            if self.worker is None:
                await sources.wait_checked()
                await self._open(listener)
            else:
                background(self._open_when_of_use(listener, sources.wait_checked))
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
        if not self.discovery.watch.revision and self.discovery.watch.state is SyncState.COLD:
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

    def _about(self) -> dict[str, object]:
        """What other gateways and operators find in etcd."""
        return {
            "admin": str(self._admin_listen()),
            "data": str(self.config.listen),
            "started_at": self.wall(),
            "version": self.version,
        }

    # Listeners

    def _admin_listen(self) -> Address:
        listen = self.config.admin.listen
        return replace(listen, port=listen.port + self.worker) if self.worker and listen.port else listen

    async def _listen_admin(self, stack: contextlib.AsyncExitStack) -> None:
        auth = self.config.admin.auth
        documents = views(self.fleet, self.discovery, self.policy, self.recent)
        token = auth.token if auth is not None else None
        app = admin.admin_app(self.metrics, self.not_ready, documents, token, self.clock)
        self.admin_address = await listen_admin(stack, app, self._admin_listen())

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
            raise cannot_listen("grpc.listen", listen, error) from error
        self.grpc_address = Address(listen.host, port)
        return grpc

    async def _open(self, listener: asyncio.Server) -> None:
        await listener.start_serving()
        if self.grpc is not None:
            await self.grpc.start()
        self.is_listening = True

    async def _open_when_of_use(
        self, listener: asyncio.Server, wait_checked: Callable[[], Coroutine[None, None, None]]
    ) -> None:
        """Listen on the shared port, but leave requests to other workers while this one would have to refuse them.

        Backends come back one by one to an etcd that was wiped. Other workers go on with those they knew for
        GRACE_SECONDS; as long a newcomer waits for one of each service.
        """
        await wait_useful(self.data_address, lambda: not self._missing())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await wait_useful(self.data_address, lambda: not self._lacks_backends())
        await wait_checked()
        if not self.pipeline.draining:
            await self._open(listener)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.fleet.tidy()


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


def _tell_breaker(observe: events.Observer) -> Callable[[Backend, State], None]:
    return lambda backend, state: observe(
        events.BreakerChanged(backend.endpoint.service, backend.endpoint.id, state.value)
    )
