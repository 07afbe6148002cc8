"""The Open Inference Protocol over gRPC, and gRPC's own health protocol, on a port of their own.

The same models, judged and refused as over HTTP (open_inference.py): an `ApiError` is a status here, its headers are
trailers. The deadline is the client's, a call that its client gives up is cancelled down to the model. A version alone
is meant by the metadata `x-weir-base-path`, as by a path's prefix over HTTP.

`grpc.health.v1` knows "" and the service (ready as `/v2/health/ready` is), and `model/<name>@<version>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import msgspec
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from open_inference import SERVICE
from open_inference import inference_pb2 as pb
from open_inference.orca_load_report_pb2 import OrcaLoadReport
from reference_backend import open_inference
from reference_backend.changing import InFlight
from reference_backend.incoming import terms
from reference_backend.load_report import form_asked, named_metrics, orca
from reference_backend.open_inference import LARGEST_BODY, Json, check_parameters, index, infer
from reference_backend.pool import Pool
from reference_backend.refusals import ApiError, bad
from reference_backend.served import Served
from reference_backend.stateless import Stateless, bad_tensor
from reference_backend.tensor_codec import CONTENTS, from_list, from_raw, to_raw
from reference_backend.tensors import DATATYPES, Array, Tensors

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
OPTIONS = [
    ("grpc.max_receive_message_length", LARGEST_BODY),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]
Act = Callable[[Any, ServicerContext], Awaitable[object]]
Tell = Callable[[Any, Mapping[str, str]], Json]
OF_CONNECTION = ("connection",)  # headers that say something of a connection of HTTP/1.1
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def listening(pool: Pool, in_flight: InFlight, address: str) -> AsyncIterator[int]:
    """The listener, and its port. What is still in flight at the end is cut. Raises OSError."""
    healthy = health.aio.HealthServicer()
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Servicer(pool, in_flight).handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:  # what gRPC says of a port that is taken
        raise OSError("gRPC cannot bind it") from error
    await server.start()
    telling = asyncio.ensure_future(tell_health(pool, healthy))
    try:
        yield port
    finally:
        telling.cancel()
        await server.stop(None)


async def tell_health(pool: Pool, healthy: health.aio.HealthServicer) -> None:
    """Keep gRPC's health as the pool is, for ever."""
    status = health_pb2.HealthCheckResponse
    known: set[str] = set()
    while True:
        seen = pool.changes
        states = {"": pool.state, SERVICE: pool.state} | {f"model/{served.entry}": served.state for served in pool}
        for name in known - states.keys():
            await healthy.set(name, status.SERVICE_UNKNOWN)
        for name, state in states.items():
            await healthy.set(name, status.SERVING if state.is_useful else status.NOT_SERVING)
        known |= states.keys()
        await pool.wait_change(seen)


class Servicer:
    """The service's methods, by name."""

    def __init__(self, pool: Pool, in_flight: InFlight) -> None:
        self._pool = pool
        self._in_flight = in_flight

    def handlers(self) -> grpc.GenericRpcHandler:
        """All of them."""
        told: dict[str, Tell] = {
            "ServerLive": lambda _asked, _metadata: {"live": all(each.is_alive for each in self._pool)},
            "ServerReady": lambda _asked, _metadata: {"ready": self._pool.state.is_useful},
            "ServerMetadata": lambda _asked, _metadata: open_inference.SERVER,
            "ModelReady": self._of_model(open_inference.ready),
            "ModelMetadata": self._of_model(open_inference.metadata),
            "ModelConfig": self._of_model(lambda pool, served: {"config": open_inference.config(pool, served)}),
            "RepositoryIndex": lambda asked, _metadata: {"models": index(self._pool, only_ready=asked.ready)},
        }
        unary = {name: _telling(name, tell) for name, tell in told.items()}
        unary |= {
            "ModelInfer": self._infer,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                self._unary(name, act), response_serializer=lambda message: message.SerializeToString()
            )
            for name, act in unary.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream, response_serializer=pb.ModelStreamInferResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _unary(self, name: str, act: Act) -> Callable[[bytes, ServicerContext], Awaitable[object]]:
        """Messages are decoded here, so that what cannot be is the client's fault and not ours."""

        async def answer(message: bytes, context: ServicerContext) -> object:
            try:
                with self._in_flight:
                    return await act(_decoded(name, message), context)
            except ApiError as error:
                refusal = error
            except Exception:  # a bug of ours: the client learns that, the log learns which
                log.exception("internal error")
                refusal = ApiError(500, "internal_error", "internal error")
            trailers = [(name, value) for name, value in refusal.headers.items() if name not in OF_CONNECTION]
            context.set_trailing_metadata((*(context.trailing_metadata() or ()), *trailers))
            await context.abort(CODES.get(refusal.status, grpc.StatusCode.INTERNAL), refusal.message)
            return None

        return answer

    def _of_model(self, tell: Callable[[Pool, Served], Json]) -> Tell:
        return lambda asked, metadata: tell(self._pool, self._find(asked.name, asked.version, metadata))

    async def _infer(self, asked: pb.ModelInferRequest, context: ServicerContext) -> pb.ModelInferResponse:
        metadata = metadata_of(context)
        served = self._find(asked.model_name, asked.model_version, metadata)
        try:
            with served.use(Stateless) as model:
                how = terms(metadata, model.clock(), context.time_remaining())
                outputs = await infer(model, read_inputs(asked), [each.name for each in asked.outputs], how)
                return answer(served, asked, outputs)
        finally:
            _report_load(served, metadata, context)

    async def _stream(self, messages: AsyncIterator[bytes], context: ServicerContext) -> AsyncIterator[object]:
        """One answer to each message, in their order; what goes wrong is told in the answer and ends nothing."""
        async for message in messages:
            try:
                with self._in_flight:
                    asked = _decoded("ModelInfer", message)
                    yield pb.ModelStreamInferResponse(infer_response=await self._infer(asked, context))
            except ApiError as error:
                yield pb.ModelStreamInferResponse(error_message=error.message)

    async def _load(self, asked: pb.RepositoryModelLoadRequest, _context: ServicerContext) -> object:
        await open_inference.load(self._pool, asked.model_name)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, asked: pb.RepositoryModelUnloadRequest, _context: ServicerContext) -> object:
        self._pool.unload(asked.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _find(self, name: str, version: str, metadata: Mapping[str, str]) -> Served:
        """Raises ApiError 404, 503."""
        *_, place, number = ("", *metadata.get("x-weir-base-path", "").split("/"))
        return self._pool.find(name, version or None, (place, number) if number else None)


def _decoded(name: str, message: bytes) -> Any:
    """What a call of that name asks. Raises ApiError 400."""
    try:
        return getattr(pb, f"{name}Request").FromString(message)
    except DecodeError as error:
        raise bad(f"the message is no {name}Request") from error


def _telling(name: str, tell: Tell) -> Act:
    """What HTTP tells in JSON, in the message of a call of that name."""

    async def answer(asked: Any, context: ServicerContext) -> object:
        told = msgspec.json.encode(tell(asked, metadata_of(context)))
        return json_format.Parse(told, getattr(pb, f"{name}Response")(), ignore_unknown_fields=True)

    return answer


def metadata_of(context: ServicerContext) -> Mapping[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _report_load(served: Served, metadata: Mapping[str, str], context: ServicerContext) -> None:
    """Twice: for gRPC's own balancers (ORCA, gRPC's proposal A51), and as text for whoever asks.

    gRPC hands the first form to its balancers alone; whoever calls cannot see it.
    """
    if served.model is None:
        return
    source = served.model.reporter.source
    metrics = named_metrics(source.load(), source.changes)
    told: list[tuple[str, str | bytes]] = [
        ("endpoint-load-metrics-bin", OrcaLoadReport(named_metrics=metrics).SerializeToString())
    ]
    if form := form_asked(metadata):
        told.append(("endpoint-load-metrics", orca(metrics, form)))
    context.set_trailing_metadata(tuple(told))


def read_inputs(asked: pb.ModelInferRequest) -> Tensors:
    """The tensors of a request, raw or in their fields. Raises ApiError 400."""
    check_parameters(_plain(asked.parameters))
    raw = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        raise bad(f"there are {len(asked.inputs)} inputs and raw contents of {len(raw)}")
    inputs: dict[str, Array] = {}
    for place, each in enumerate(asked.inputs):
        check_parameters(_plain(each.parameters))
        if each.name in inputs:
            raise bad_tensor(each.name, "is there twice")
        if raw and each.HasField("contents"):
            raise bad_tensor(each.name, "has contents, although there are raw contents")
        if raw:
            inputs[each.name] = from_raw(each.name, each.datatype, each.shape, raw[place])
        else:
            elements = getattr(each.contents, CONTENTS[each.datatype]) if each.datatype in CONTENTS else ()
            inputs[each.name] = from_list(each.name, each.datatype, each.shape, elements)
    return inputs


def answer(served: Served, asked: pb.ModelInferRequest, outputs: Tensors) -> pb.ModelInferResponse:
    """The answer, raw where the request was, or where a datatype has no field."""
    tensors = [
        pb.ModelInferResponse.InferOutputTensor(name=name, datatype=DATATYPES[array.dtype], shape=array.shape)
        for name, array in outputs.items()
    ]
    told = pb.ModelInferResponse(
        model_name=served.entry.name, model_version=served.entry.version, id=asked.id, outputs=tensors
    )
    if asked.raw_input_contents or any(array.dtype == np.float16 for array in outputs.values()):
        told.raw_output_contents.extend(to_raw(array) for array in outputs.values())
    else:
        for tensor, array in zip(told.outputs, outputs.values(), strict=True):
            getattr(tensor.contents, CONTENTS[tensor.datatype]).extend(array.ravel().tolist())
    return told


def _plain(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Parameters by name, as Python has them."""
    chosen_fields = {name: each.WhichOneof("parameter_choice") for name, each in parameters.items()}
    return {name: getattr(parameters[name], field) for name, field in chosen_fields.items() if field}
