"""The Open Inference Protocol over HTTP: https://github.com/kserve/open-inference-protocol, specification/protocol.

With Triton's extensions for binary tensors (`Inference-Header-Content-Length`: the JSON ends there, and behind it lie
the tensors that say `binary_data_size`), model configuration and the model repository. Errors are `{"error": "..."}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from reference_backend import protocol, refusals
from reference_backend.incoming import POOL, find, json_response, read_body, terms
from reference_backend.pool import Pool
from reference_backend.refusals import bad
from reference_backend.served import Served, State
from reference_backend.stateless import Stateless, bad_tensor
from reference_backend.tensor_codec import from_json, from_raw, to_json, to_raw
from reference_backend.tensors import DATATYPES, Array, Tensors, TensorSpec, Terms

LARGEST_BODY = 64 * 1024 * 1024
HEADER_LENGTH = "inference-header-content-length"
MODEL = "/v2/models/{model}"
MODEL_VERSION = f"{MODEL}/versions/{{version}}"
SERVER = {
    "name": "weir-reference-backend",
    "version": "0.1.0",
    "extensions": ["binary_tensor_data", "model_configuration", "model_repository"],
}
# What the index of a repository calls each state.
INDEX_STATES = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.ASLEEP: "READY",
    State.FAILED: "UNAVAILABLE",
    State.DRAINING: "UNLOADING",
    State.CLOSED: "UNLOADING",
}
# Parameters that would change the answer, and that nothing here can honour.
UNSUPPORTED = ("classification", "shared_memory_region", "sequence_id")

Json = dict[str, Any]


class InputTensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: Json = {}
    data: msgspec.Raw = msgspec.Raw()


class OutputTensor(msgspec.Struct):
    name: str
    parameters: Json = {}


class InferRequest(msgspec.Struct):
    inputs: list[InputTensor]
    id: str = ""
    parameters: Json = {}
    outputs: list[OutputTensor] = []


class IndexRequest(msgspec.Struct):
    ready: bool = False


routes = web.RouteTableDef()


@routes.post(f"{MODEL}/infer")  # first, as they are tried in this order
@routes.post(f"{MODEL_VERSION}/infer")
async def _infer(request: web.Request) -> web.Response:
    served = _find(request)
    asked, binary = split(await read_body(request, LARGEST_BODY), request.headers.get(HEADER_LENGTH))
    with served.use(Stateless) as model:
        names = [each.name for each in asked.outputs]
        outputs = await infer(model, read_inputs(asked, binary), names, terms(request.headers, model.clock()))
        return answer(served, asked, outputs)


@routes.get("/v2")
async def _server(_request: web.Request) -> web.Response:
    return json_response(SERVER)


@routes.get(MODEL)
@routes.get(MODEL_VERSION)
async def _metadata(request: web.Request) -> web.Response:
    return json_response(metadata(request.app[POOL], _find(request)))


@routes.get(f"{MODEL}/ready")
@routes.get(f"{MODEL_VERSION}/ready")
async def _ready(request: web.Request) -> web.Response:
    told = ready(request.app[POOL], _find(request))
    return json_response(told, 200 if told["ready"] else 503)


@routes.get(f"{MODEL}/config")
@routes.get(f"{MODEL_VERSION}/config")
async def _config(request: web.Request) -> web.Response:
    return json_response(config(request.app[POOL], _find(request)))


@routes.post("/v2/repository/index")
async def _index(request: web.Request) -> web.Response:
    asked = protocol.decode(await read_body(request, LARGEST_BODY) or b"{}", IndexRequest)
    return json_response(index(request.app[POOL], only_ready=asked.ready))


@routes.post("/v2/repository/models/{model}/load")
async def _load(request: web.Request) -> web.Response:
    await load(request.app[POOL], request.match_info["model"])
    return json_response({})


@routes.post("/v2/repository/models/{model}/unload")
async def _unload(request: web.Request) -> web.Response:
    request.app[POOL].unload(request.match_info["model"])
    return json_response({})


def _find(request: web.Request) -> Served:
    return find(request, request.match_info["model"], request.match_info.get("version"))


def split(body: bytes, header_length: str | None) -> tuple[InferRequest, memoryview]:
    """The JSON of a request and the bytes behind it. Raises ApiError 400."""
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            raise bad(f"{HEADER_LENGTH} is not a number of bytes")
        if int(header_length) > end:
            raise bad(f"{HEADER_LENGTH} is more than the {end} bytes of the body")
        end = int(header_length)
    return protocol.decode(memoryview(body)[:end], InferRequest), memoryview(body)[end:]


def read_inputs(asked: InferRequest, binary: memoryview) -> Tensors:
    """The tensors of a request, from its JSON or the bytes behind it. Raises ApiError 400."""
    check_parameters(asked.parameters)
    inputs: dict[str, Array] = {}
    for each in asked.inputs:
        check_parameters(each.parameters)
        if each.name in inputs:
            raise bad_tensor(each.name, "is there twice")
        size = each.parameters.get("binary_data_size")
        if size is None:
            if not each.data:
                raise bad_tensor(each.name, "has neither data nor binary_data_size")
            inputs[each.name] = from_json(each.name, each.datatype, each.shape, each.data)
            continue
        if type(size) is not int or not 0 <= size <= len(binary):
            raise bad_tensor(each.name, f"has a binary_data_size that is no number up to the {len(binary)} bytes left")
        if each.data:
            raise bad_tensor(each.name, "has both data and binary_data_size")
        inputs[each.name] = from_raw(each.name, each.datatype, each.shape, binary[:size])
        binary = binary[size:]
    if binary:
        raise bad(f"{len(binary)} bytes lie behind the last tensor")
    return inputs


def check_parameters(parameters: Json) -> None:
    """Raise ApiError for what was asked for and cannot be done."""
    for name in UNSUPPORTED:
        if parameters.get(name):
            raise bad(f"parameter {name} is not supported by this server", name, "unsupported_parameter")


async def infer(model: Stateless, inputs: Tensors, names: list[str], terms: Terms) -> Tensors:
    """Run a model. Gives the outputs that a request names, or all. Raises ApiError."""
    there = [spec.name for spec in model.outputs]
    for name in names:
        if name not in there:
            message = f"output {name[: refusals.LONGEST_SHOWN]!r} is none of this model's: {', '.join(there)}"
            raise bad(message, "outputs")
    outputs = await model.infer(inputs, terms)
    return {name: outputs[name] for name in names or there}


def answer(served: Served, asked: InferRequest, outputs: Tensors) -> web.Response:
    """The answer, with the tensors that were asked for so behind its JSON."""
    binary_by_default = asked.parameters.get("binary_data_output") is True
    said = {each.name: each.parameters for each in asked.outputs}
    told, behind = [], []
    for name, array in outputs.items():
        parameters = said.get(name, {})
        check_parameters(parameters)
        tensor: Json = {"name": name, "datatype": DATATYPES[array.dtype], "shape": array.shape}
        if parameters.get("binary_data", binary_by_default) is True:
            behind.append(to_raw(array))
            tensor["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            tensor["data"] = to_json(name, array)
        told.append(tensor)
    head: Json = {"model_name": served.entry.name, "model_version": served.entry.version, "outputs": told}
    if asked.id:
        head["id"] = asked.id
    if not behind:
        return json_response(head)
    encoded = msgspec.json.encode(head)
    return web.Response(
        body=b"".join((encoded, *behind)),
        headers={HEADER_LENGTH: str(len(encoded))},
        content_type="application/octet-stream",
    )


def metadata(pool: Pool, served: Served) -> Json:
    """What a model is."""
    name = served.entry.name
    inputs, outputs = specs(served)
    return {
        "name": name,
        "versions": [each.entry.version for each in pool if each.entry.name == name and each.entry.version],
        "platform": platform(served),
        "inputs": inputs,
        "outputs": outputs,
    }


def ready(_pool: Pool, served: Served) -> Json:
    """Whether it can answer at once."""
    return {"name": served.entry.name, "ready": served.state is State.READY}


def config(_pool: Pool, served: Served) -> Json:
    """A model's configuration, in Triton's form as far as any model has it."""
    inputs, outputs = (
        [{"name": spec.name, "data_type": config_type(spec.datatype), "dims": spec.shape} for spec in each]
        for each in specs(served)
    )
    return {
        "name": served.entry.name,
        "platform": platform(served),
        "backend": "weir",
        "max_batch_size": 0,  # the shapes say it all, the first dimension too
        "input": inputs,
        "output": outputs,
    }


def specs(served: Served) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
    """What a model takes and gives: none where it is of language."""
    return (served.model.inputs, served.model.outputs) if isinstance(served.model, Stateless) else ((), ())


def platform(served: Served) -> str:
    """Who runs a model."""
    return f"weir_{served.model.card.executor}" if isinstance(served.model, Stateless) else "weir_language"


def config_type(datatype: str) -> str:
    """A configuration's name for a datatype."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def index(pool: Pool, *, only_ready: bool) -> list[Json]:
    """Every version that is served, or could be."""
    told = [
        {
            "name": served.entry.name,
            "version": served.entry.version,
            "state": INDEX_STATES[served.state],
            "reason": "asleep" if served.state is State.ASLEEP else served.reason,
        }
        for served in pool
    ]
    there = {(each["name"], each["version"]) for each in told}
    told += [
        {"name": entry.name, "version": entry.version, "state": "UNAVAILABLE", "reason": "unloaded"}
        for entry in pool.known()
        if (entry.name, entry.version) not in there
    ]
    return [each for each in told if not only_ready or each["state"] == "READY"]


async def load(pool: Pool, name: str) -> None:
    """Load a model, or load it anew. Raises ApiError: 400 where a version of it cannot be loaded."""
    failures = [served.reason for served in await pool.load(name) if served.state is State.FAILED]
    if failures:
        raise bad("; ".join(failures), code="load_failed")
