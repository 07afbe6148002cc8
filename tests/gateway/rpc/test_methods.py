import re

import pytest

from gateway.rpc.methods import METHODS, resource_before, resource_in
from open_inference import inference_pb2 as pb
from policies import errors
from tests.support.grpc_backend import infer

BY_NAME = {method.name: method for method in METHODS}


def test_every_method_of_the_service_is_served() -> None:
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [(method.name, method.client_streaming) for method in service.methods] == [
        (name, BY_NAME[name].is_stream) for name in [one.name for one in service.methods]
    ]
    assert len(METHODS) == len(service.methods)


@pytest.mark.parametrize(
    ("name", "message", "twin", "path", "model", "version"),
    [
        ("ServerLive", b"", "GET", "/v2/health/live", None, None),
        ("ServerReady", b"", "GET", "/v2/health/ready", None, None),
        ("ServerMetadata", b"", "GET", "/v2", None, None),
        ("ModelReady", infer("m"), "GET", "/v2/models/m/ready", "m", None),
        ("ModelMetadata", infer("m", "1"), "GET", "/v2/models/m/versions/1", "m", "1"),
        ("ModelConfig", infer("m"), "GET", "/v2/models/m/config", "m", None),
        ("ModelInfer", infer("m", "1"), "POST", "/v2/models/m/versions/1/infer", "m", "1"),
        ("ModelInfer", infer("org/a b%"), "POST", "/v2/models/org%2Fa%20b%25/infer", "org/a b%", None),
        ("ModelInfer", infer(".."), "POST", "/v2/models/../infer", "..", None),
        ("ModelStreamInfer", infer("m"), "POST", "/v2/models/m/infer", "m", None),
        ("RepositoryIndex", b"\x0a\x01x", "POST", "/v2/repository/index", None, None),
        ("RepositoryModelLoad", b"\x12\x01m", "POST", "/v2/repository/models/m/load", "m", None),
        ("RepositoryModelUnload", b"\x12\x01m", "POST", "/v2/repository/models/m/unload", "m", None),
    ],
)
def test_a_call_has_a_twin_over_rest(name, message, twin, path, model, version) -> None:
    method = BY_NAME[name]
    resource = resource_in(method, message)
    assert (method.twin, resource.path, resource.model, resource.version) == (twin, path, model, version)
    assert (resource.protocol, resource.problem, resource.needs_model) == ("oip", None, False)
    assert resource.shown == method.full_name == f"/inference.GRPCInferenceService/{name}"
    assert resource_in(method, message) is resource


@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "ModelStreamInfer", "RepositoryModelLoad"])
def test_a_model_must_be_named(name) -> None:
    with pytest.raises(errors.BadRequest, match="names no model"):
        resource_in(BY_NAME[name], b"")
    assert resource_before(BY_NAME[name]).model is None


def test_what_is_remembered_has_a_bound() -> None:
    for number in range(3000):
        resource_in(BY_NAME["ModelInfer"], infer(f"m{number}"))
    assert len(resource_in.__globals__["_known"]) <= 1024


def test_paths_of_health_are_those_that_the_gateway_answers() -> None:
    assert all(re.fullmatch(r"/v2(/health/(live|ready))?", m.path) for m in METHODS if m.name.startswith("Server"))
