"""Accept: the calls that are served, each with its twin in the protocol's REST form. Pure.

Policies know paths. So a call is routed, limited and told apart as its twin would be: `ModelInfer` for the model `m` is
`POST /v2/models/m/infer`. Calls without a twin in the standard take the path that Triton gives them.
"""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import quote

from gateway.resource import Resource
from gateway.rpc.messages import names_in
from open_inference import SERVICE
from policies import errors

_MOST_KNOWN: Final = 1024


class Method(NamedTuple):
    """`path` has `{model}` where the call is about a model: its name and version then stand in these fields."""

    name: str
    twin: str  # method of HTTP
    path: str
    name_field: int = 1
    version_field: int = 2
    is_stream: bool = False

    @property
    def full_name(self) -> str:
        """As it is called on the wire."""
        return f"/{SERVICE}/{self.name}"

    @property
    def has_model(self) -> bool:
        return "{model}" in self.path


METHODS: Final = (
    Method("ServerLive", "GET", "/v2/health/live"),
    Method("ServerReady", "GET", "/v2/health/ready"),
    Method("ServerMetadata", "GET", "/v2"),
    Method("ModelReady", "GET", "/v2/models/{model}/ready"),
    Method("ModelMetadata", "GET", "/v2/models/{model}"),
    Method("ModelConfig", "GET", "/v2/models/{model}/config"),
    Method("ModelInfer", "POST", "/v2/models/{model}/infer"),
    Method("ModelStreamInfer", "POST", "/v2/models/{model}/infer", is_stream=True),
    Method("RepositoryIndex", "POST", "/v2/repository/index"),
    Method("RepositoryModelLoad", "POST", "/v2/repository/models/{model}/load", name_field=2, version_field=0),
    Method("RepositoryModelUnload", "POST", "/v2/repository/models/{model}/unload", name_field=2, version_field=0),
)

_known: dict[tuple[str, str, str], Resource] = {}


def resource_before(method: Method) -> Resource:
    """What a call names as long as its message has not been read."""
    return _resource(method, "", "")


def resource_in(method: Method, message: bytes) -> Resource:
    """What a call names. Raises BadRequest, as `names_in` does and where a model is needed and not named."""
    if not method.has_model:
        return _resource(method, "", "")
    model, version = names_in(message, method.name_field, method.version_field)
    if not model:
        raise errors.BadRequest("The message names no model.", param="model")
    return _resource(method, model, version)


def _resource(method: Method, model: str, version: str) -> Resource:
    key = (method.name, model, version)
    resource = _known.get(key)
    if resource is None:
        named = quote(model, safe="") + (f"/versions/{quote(version, safe='')}" if version else "")
        resource = Resource(method.path.replace("{model}", named).encode())
        resource.model, resource.version = model or None, version or None
        resource.problem = None  # it is no path that anybody else reads
        resource.protocol, resource.shown = "oip", method.full_name
        if len(_known) >= _MOST_KNOWN:
            _known.clear()  # made-up names must not keep the usual ones out for ever
        _known[key] = resource
    return resource
