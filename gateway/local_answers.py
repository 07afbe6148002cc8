"""What the data listener answers itself: health, and the list of models. Everything else goes to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.headers import STATUS_LINES
from policies import access, errors

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.pipeline import InForce
    from gateway.trail import Trail
    from gateway.upstream.fleet import Fleet
    from policies.policy import Principal

_FOR_ANYBODY: Final = frozenset({"/healthz", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready"})
_MODELS: Final = "/v1/models"


class LocalAnswers:
    """Answers of the gateway's own. `is_ready`: the gateway has listed its backends and is not draining."""

    def __init__(self, fleet: Fleet, is_ready: Callable[[], bool], version: str) -> None:
        self._fleet = fleet
        self._is_ready = is_ready
        self._version = version

    def answers_anybody(self, call: Call) -> bool:
        return call.method in ("GET", "HEAD") and call.resource.path in _FOR_ANYBODY

    def answers_caller(self, call: Call) -> bool:
        return call.method == "GET" and (call.resource.path == _MODELS or call.resource.path.startswith("/v1/models/"))

    def answer(self, call: Call, trail: Trail) -> None:
        """Health, for anybody: no token, no limit."""
        trail.route, trail.path = "gateway", call.resource.path
        if call.resource.path in ("/v2", "/v2/"):
            _tell(call, trail, 200, {"name": "weir", "version": self._version, "extensions": []})
        elif call.resource.path == "/v2/health/ready":
            ready = self._is_ready()
            _tell(call, trail, 200 if ready else 503, {"ready": ready})
        else:
            _tell(call, trail, 200, {"live": True})

    def answer_caller(self, call: Call, trail: Trail, in_force: InForce, principal: Principal) -> None:
        """The models that this caller may use, from discovery. Raises ModelNotFound for one that is not among them."""
        trail.route, trail.path = "gateway", _MODELS
        names = access.visible_models(in_force.policy.routes, principal, self._fleet.offered())
        if call.resource.path == _MODELS:
            _tell(call, trail, 200, {"object": "list", "data": [_model(name) for name in names]})
            return
        name = call.resource.path.removeprefix(_MODELS + "/")
        if name not in names:
            raise errors.ModelNotFound("There is no such model, or it is not for this caller.", param="model")
        _tell(call, trail, 200, _model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "weir"}


def _tell(call: Call, trail: Trail, status: int, document: dict[str, Any]) -> None:
    trail.status, trail.end_reason = status, "ok"
    trail.bytes_out = call.connection.answer(call, trail, status, document)


def answer_bytes(call: Call, trail: Trail, status: int, document: dict[str, Any]) -> bytes:
    """An answer of ours over HTTP."""
    body = msgspec.json.encode(document)
    head = b"%bcontent-type: application/json\r\ncontent-length: %d\r\n%b%b%b%b%b" % (
        STATUS_LINES[status],
        len(body),
        call.id_line,
        trail.policy_line,
        trail.limit_lines,
        trail.server_timing(),
        b"\r\n" if call.keep_alive else b"connection: close\r\n\r\n",
    )
    return head if call.method == "HEAD" else head + body
