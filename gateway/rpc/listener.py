"""Accept, over gRPC: the listener, and the health of the gateway as gRPC's own clients ask for it.

gRPC speaks HTTP/2 and holds what a hostile client must not get around: bounds of connections, of calls at a time, of
metadata and messages, the deadline of a handshake, pings. A message is read when the pipeline wants it, not before:
until then a client can send no more than HTTP/2's own window.

What gRPC's server in Python does not hold is a path that is not UTF-8: reading it ends the whole server, with every
call under way (docs/decisions/0008-strangers-of-grpc.md). So it is only ever given calls of the methods named here.
Those of any other path are taken by `refuse_strangers`, which does not read the path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc
from grpc_health.v1 import health, health_pb2

from gateway.call import GRPC, Call
from gateway.certificates import Certificates, Pem
from gateway.rpc.attempt import Carrier
from gateway.rpc.client import RpcClient
from gateway.rpc.metadata import lines_of
from gateway.rpc.methods import METHODS, Method, resource_before
from gateway.rpc.statuses import Code
from open_inference import SERVICE

if TYPE_CHECKING:
    from random import Random

    from gateway.call import Ids
    from gateway.config import Limits
    from gateway.config_fields import Address
    from gateway.pipeline import Pipeline

SPARE_BYTES: Final = 1024 * 1024
"""Messages so much over the limit are read, so that their sender can be told; larger ones end by gRPC's own word."""

MOST_CALLS: Final = 256  # at a time on one connection
STATUS_SECONDS: Final = 0.5  # at the end: for statuses that are on their way
HEALTH_SECONDS: Final = 0.25  # between two looks whether the gateway is ready
MOST_WATCHES: Final = 256  # of its health
QUESTIONS_AT_ONCE: Final = 8
QUESTION_SECONDS: Final = 0.5
_PING_MS: Final = 10_000  # how often a client may ask whether we are there
_KEEPALIVE_MS: Final = 30_000
_WINDOW_BYTES: Final = 64 * 1024
_HEALTH: Final = "grpc.health.v1.Health"
_AS_LONG_AS_IT_TAKES: Final = 86_400.0  # seconds; the end of the drain comes before
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def rpc_listener(
    pipeline: Pipeline,
    ids: Ids,
    limits: Limits,
    name: bytes,
    is_ready: Callable[[], bool],
    certificates: Mapping[str, Certificates],
    clock: Callable[[], float],
    rng: Random,
    *,
    connections: int,
    shares_port: bool,
) -> RpcListener:
    """A listener with all that it needs. `certificates` are by use, as weir.yaml names them."""
    backends = certificates.get("backends")
    carrier = Carrier(rng, ids, limits.body, lambda: backends.in_force.pem if backends is not None else Pem())
    return RpcListener(
        pipeline, carrier, limits, name, is_ready, certificates.get("listener"), clock,
        connections=connections, shares_port=shares_port,
    )  # fmt: skip


class RpcListener:
    """Serves calls by the pipeline. `name` is the gateway's own, `is_ready` what its health says."""

    def __init__(
        self,
        pipeline: Pipeline,
        carrier: Carrier,
        limits: Limits,
        name: bytes,
        is_ready: Callable[[], bool],
        certificates: Certificates | None,
        clock: Callable[[], float],
        *,
        connections: int,
        shares_port: bool,
    ) -> None:
        self._pipeline = pipeline
        self._carrier = carrier
        self._name = name
        self._is_ready = is_ready
        self._certificates = certificates
        self._clock = clock
        self._shares_port = shares_port
        self._scheme = b"http" if certificates is None else b"https"
        self._health = health.aio.HealthServicer()
        self._server = _Server(
            asyncio.get_running_loop(), None, (), None, _options(limits, connections, shares_port), connections
        )
        self._server.add_registered_method_handlers(self._handlers())
        self._background: set[asyncio.Task[Any]] = set()
        self._questions = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        self._watching = 0

    @contextlib.asynccontextmanager
    async def bound(self, address: Address) -> AsyncIterator[int]:
        """Take the port, and give its number; calls are served after `start`. Raises OSError."""
        # gRPC tells hostile clients' mistakes, with what they sent; what goes wrong with us the pipeline tells
        logging.getLogger("grpc").setLevel(logging.CRITICAL)
        self._address = address
        try:
            yield address.port if self._shares_port else self._bind()
        finally:
            for task in self._background:
                task.cancel()
            await self._server.shutdown(STATUS_SECONDS)
            await asyncio.gather(*self._background, return_exceptions=True)

    def _bind(self) -> int:
        place = str(self._address).encode()
        if self._certificates is None:
            port: int = self._server.add_insecure_port(place)
        else:
            port = self._server.add_secure_port(place, _credentials(self._certificates))
        if not port:  # gRPC does not say why
            raise OSError("it is in use, or not an address of this machine")
        return port

    async def start(self) -> None:
        """Serve calls. A port that is shared is taken only now: before, it would take clients away from others."""
        if self._shares_port:
            self._bind()
        await self._server.start()
        self._spawn(self._server.refuse_strangers())
        self._spawn(self._tell_health())

    def stop_accepting(self) -> None:
        """Take no new calls, and tell clients so (GOAWAY); those under way go on."""
        self._spawn(self._server.shutdown(_AS_LONG_AS_IT_TAKES))

    def drain(self) -> None:
        """End the calls under way, and tell their clients why."""
        self._carrier.drain()

    def _spawn(self, work: Any) -> None:
        self._background.add(asyncio.get_running_loop().create_task(work))

    def _handlers(self) -> dict[str, Any]:
        served = {
            method.full_name: grpc.stream_stream_rpc_method_handler(partial(self._serve, method)) for method in METHODS
        }
        to_bytes = health_pb2.HealthCheckResponse.SerializeToString
        return served | {
            f"/{_HEALTH}/Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=to_bytes),
            f"/{_HEALTH}/Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=to_bytes),
        }

    async def _serve(self, method: Method, _: Any, context: Any) -> None:
        """One call. All have the form of streams: a message is read when wanted, and written while a place is held."""
        pipeline = self._pipeline
        client = RpcClient(context, method, self._carrier.carry, self._name, self._scheme, self._clock())
        call = Call(client, method.twin, b"/v2", GRPC, lines_of(client.metadata), b"")
        call.resource = resource_before(method)
        await pipeline.handle(call)
        if client.code is not Code.OK:
            await context.abort(_CODES[client.code], client.message, client.trailers)
        if client.response is not None:
            await context.write(client.response)
        context.set_trailing_metadata(client.trailers)

    # Health: for anybody, so what it may cost is bounded here

    async def _check(self, _: Any, context: Any) -> Any:
        return await self._health.Check(await self._question(context), context)

    async def _watch(self, _: Any, context: Any) -> None:
        if self._watching >= MOST_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"At most {MOST_WATCHES} may watch.")
        self._watching += 1
        try:
            await self._health.Watch(await self._question(context), context)
        finally:
            self._watching -= 1

    async def _question(self, context: Any) -> Any:
        """What is asked. gRPC takes any message whole before it gives it to us: so only a few at a time, and soon."""
        message = None
        async with self._questions:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUESTION_SECONDS):
                    message = await context.read()
        try:
            return health_pb2.HealthCheckRequest.FromString(message)
        except (DecodeError, TypeError):  # TypeError: none came
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "There came no message of this method.")

    async def _tell_health(self) -> None:
        while True:
            ready = self._is_ready()
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", SERVICE):
                await self._health.set(service, status)
            await asyncio.sleep(HEALTH_SECONDS)


class _Server(cygrpc.AioServer):  # type: ignore[misc]  # gRPC carries no types
    """gRPC's server, which asks for calls by their method and leaves all others to `refuse_strangers`."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """What the server waits for: the next call of a method, and None: of whatever else, which it must never see."""
        if method is None:
            return asyncio.get_running_loop().create_future()
        future: asyncio.Future[Any] = super()._make_request_call_future(method)
        return future

    async def refuse_strangers(self) -> None:
        """Tell whoever calls another method that there is none, until the server ends."""
        loop = asyncio.get_running_loop()
        refusals: set[asyncio.Task[None]] = set()
        while True:
            try:
                call = await self._request_call()
            except Exception:
                if self.is_running():
                    raise
                return
            refusal = loop.create_task(self._refuse(call))
            refusals.add(refusal)
            refusal.add_done_callback(refusals.discard)

    async def _refuse(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.BaseError):  # who has left already need not be told
            await cygrpc._handle_rpc("", _Nobody, (), call, asyncio.get_running_loop(), False)  # noqa: SLF001  see above


class _Nobody:
    """Knows no method."""

    @staticmethod
    def resolve_handler(_: object) -> None:
        return None


def _options(limits: Limits, connections: int, shares_port: bool) -> tuple[tuple[str, int], ...]:
    def ms(seconds: float) -> int:
        return int(seconds * 1000)

    return (
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", MOST_CALLS),
        ("grpc.max_metadata_size", limits.header),
        ("grpc.max_receive_message_length", limits.body + SPARE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.server_handshake_timeout_ms", ms(limits.head_timeout)),
        ("grpc.max_connection_idle_ms", ms(limits.idle)),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity: a small message could be packed gigabytes
        # What a client may send before it is read. For a message that is read the window grows to its size.
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
    )


def _credentials(certificates: Certificates) -> Any:
    """The listener's certificate, looked at anew for each handshake."""
    shown: Pem | None = None

    def fetch() -> Any:
        """From a thread of gRPC's; None: as before."""
        nonlocal shown
        pem = certificates.in_force.pem
        if pem is shown:
            return None
        shown = pem
        return _configuration(pem)

    pem = certificates.in_force.pem
    return grpc.dynamic_ssl_server_credentials(
        _configuration(pem), fetch, require_client_authentication=pem.ca is not None
    )


def _configuration(pem: Pem) -> Any:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)
