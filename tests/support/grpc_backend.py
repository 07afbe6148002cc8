"""A backend that speaks gRPC as a test says, and answers health checks over HTTP; and the two ends of a call by hand."""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from open_inference import SERVICE, inference_pb2
from tests.support.running_gateway import running_gateway
from tests.support.scripted_backend import ScriptedBackend

SERVING, NOT_SERVING = (health_pb2.HealthCheckResponse(status=status).SerializeToString() for status in (1, 2))
Script = Callable[[bytes, Any], Awaitable[bytes | None]]


def infer(model: str = "tiny", version: str = "", **fields) -> bytes:
    return inference_pb2.ModelInferRequest(model_name=model, model_version=version, **fields).SerializeToString()


def inferred(model: str = "tiny", **fields) -> bytes:
    return inference_pb2.ModelInferResponse(model_name=model, **fields).SerializeToString()


async def answer_ok(message: bytes, context) -> bytes:
    return inferred()


class GrpcBackend:
    """`script(message, context)` serves each message of each call; what it returns is sent."""

    def __init__(self, script: Script = answer_ok, credentials=None) -> None:
        self.script = script
        self.messages: list[bytes] = []
        self.metadata: list[dict[str, Any]] = []
        self.methods: list[str] = []
        self.open = 0
        self.cancelled = 0
        self.health: bytes | grpc.StatusCode = SERVING  # what is answered to a question for it
        self.health_asked: list[bytes] = []
        self._credentials = credentials

    async def __aenter__(self) -> Self:
        self.http = ScriptedBackend()
        await self.http.__aenter__()
        self.url = self.http.url
        await self.listen()
        return self

    async def listen(self, port: int = 0) -> None:
        self._server = grpc.aio.server(handlers=[_Handler(self)])
        place = f"127.0.0.1:{port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(place)
        else:
            self.port = self._server.add_secure_port(place, self._credentials)
        await self._server.start()

    async def stop(self) -> None:
        """Refuse connections from now on; the health check over HTTP still passes."""
        await self._server.stop(None)

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self.http.__aexit__()

    async def tell_health(self, context) -> None:
        self.health_asked.append(await context.read())
        if isinstance(self.health, grpc.StatusCode):
            await context.abort(self.health, "")
        await context.write(self.health)

    async def serve(self, method: str, context) -> None:
        self.open += 1
        self.methods.append(method)
        self.metadata.append(dict(context.invocation_metadata()) | {"left": context.time_remaining()})
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self.messages.append(message)
                answer = await self.script(message, context)
                if answer is not None:
                    await context.write(answer)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, backend: GrpcBackend) -> None:
        self.backend = backend

    def service(self, details):
        method = details.method

        async def serve(_, context):
            if method == "/grpc.health.v1.Health/Check":
                await self.backend.tell_health(context)
            else:
                await self.backend.serve(method, context)

        return grpc.stream_stream_rpc_method_handler(serve)


class Caller:
    """A client of the gateway. `ask` returns the answer; `refused` the status that a call ended with."""

    def __init__(self, address, credentials=None) -> None:
        self.channel = (
            grpc.aio.insecure_channel(str(address))
            if credentials is None
            else grpc.aio.secure_channel(str(address), credentials, [("grpc.ssl_target_name_override", "localhost")])
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def call(self, message: bytes | None = None, method: str = "ModelInfer", timeout: float | None = 10, **metadata):
        entries = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(
            infer() if message is None else message, timeout=timeout, metadata=entries
        )

    async def ask(self, *args, **options) -> bytes:
        return await self.call(*args, **options)

    async def refused(self, *args, **options) -> "Refused":
        try:
            answer = await self.call(*args, **options)
        except grpc.aio.AioRpcError as error:
            return Refused(error)
        raise AssertionError(f"answered: {answer!r}")

    def stream(self, timeout: float | None = 10, method: str = "ModelStreamInfer", **metadata):
        return self.channel.stream_stream(f"/{SERVICE}/{method}")(timeout=timeout, metadata=tuple(metadata.items()))


class Refused:
    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code().name
        self.details = error.details()
        self.trailers = dict(error.trailing_metadata())

    def __repr__(self) -> str:
        return f"{self.code}: {self.details} {self.trailers}"


@contextlib.asynccontextmanager
async def grpc_gateway(home, *backends: GrpcBackend, config: str = "", grpc_ports=None, credentials=None, **options):
    """A gateway that speaks gRPC, before these backends, whose gRPC has been probed; and a client of it."""
    async with running_gateway(
        home,
        *[backend.url for backend in backends],
        config="grpc: {listen: 127.0.0.1:0}\n" + config,
        grpc_ports=[backend.port for backend in backends] if grpc_ports is None else grpc_ports,
        **options,
    ) as gateway:
        async with asyncio.timeout(60):
            while grpc_ports is None and any(each.grpc_healthy is None for each in gateway.fleet.backends.values()):
                await asyncio.sleep(0.01)
        async with Caller(gateway.grpc_address, credentials) as caller:
            yield gateway, caller


# By hand: what no client of gRPC would send


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def headers(stream: int, path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A HEADERS frame, its fields literal and not indexed (RFC 7541, 6.2.2)."""
    fields = (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"gateway"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more,
    )  # fmt: skip
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return frame(1, 4, stream, block)


def data(stream: int, message: bytes, *, ends: bool = True) -> bytes:
    return frame(0, int(ends), stream, b"\0" + struct.pack("!I", len(message)) + message)


def reset(stream: int) -> bytes:
    return frame(3, 0, stream, struct.pack("!I", 8))
