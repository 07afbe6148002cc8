"""Accept: what the target of a request line names.

A pure function of the target, remembered up to a bound: clients choose them.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from policies import errors

_TARGET: Final = re.compile(r"/[!\"$-~]*").fullmatch  # printable, and no `#`: some cut a target there
# Forms of a path that two readers may understand differently: they are routed nowhere. Letters, digits and `-_~` are
# among them where they are encoded: whoever decodes them would see another path than the route did (RFC 3986, 6.2.2.2).
_AMBIGUOUS: Final = re.compile(
    r"//|\\|;|/\.\.?(?:/|$)|%(?:2[def]|3[0-9b]|4[1-9a-f]|5[0-9acf]|6[1-9a-f]|7[0-9ae])", re.IGNORECASE
).search
_CONTROL: Final = re.compile(r"%(?:00|0d|0a)", re.IGNORECASE).search
_OIP_MODEL: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/.*)?").fullmatch

# Paths of the OpenAI API that need a `model` in their JSON body.
_OPENAI_JSON: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/images/generations"}
)

_MOST_KNOWN: Final = 1024
_LONGEST_KNOWN: Final = 256  # bytes
_known: dict[bytes, Resource] = {}


class Resource:
    """What a target names. Not changed once it is made: requests share it."""

    __slots__ = ("encoded", "model", "needs_model", "path", "problem", "protocol", "shown", "target", "version")

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded  # as received, path and query
        self.target = target = encoded.decode("latin-1")
        self.path = path = target.partition("?")[0]
        self.protocol = protocol = _protocol_of(path)  # openai | anthropic | oip | http
        self.shown = path if protocol != "http" else "other"  # what records call it
        self.needs_model = path in _OPENAI_JSON or protocol == "anthropic"  # it takes JSON with a `model`, nothing else
        self.model: str | None = None  # where the path names one, and its version
        self.version: str | None = None
        self.problem = _problem_of(target, path)
        if protocol == "oip" and (names := _OIP_MODEL(path)):
            self.model = unquote(names[1])
            self.version = unquote(names[2]) if names[2] is not None else None

    def check(self) -> None:
        """Raises BadRequest or NoRoute for a target that nothing can be behind."""
        if self.problem is not None:
            kind, message = self.problem
            raise kind(message)


def resource_of(encoded: bytes) -> Resource:
    """The resource of a target, which may be one that `check` refuses."""
    resource = _known.get(encoded)
    if resource is None:
        resource = Resource(encoded)
        if resource.problem is None and len(encoded) < _LONGEST_KNOWN:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()  # made-up paths must not keep the usual ones out for ever
            _known[encoded] = resource
    return resource


def _problem_of(target: str, path: str) -> tuple[type[errors.Refusal], str] | None:
    if not _TARGET(target):
        return errors.BadRequest, "The request target must be a path in printable ASCII, without a fragment (`#`)."
    if "%" in target and _CONTROL(target):
        return errors.BadRequest, "The request target must not contain encoded control characters."
    if _AMBIGUOUS(path):
        return errors.NoRoute, "No route has this path."
    return None


def _protocol_of(path: str) -> str:
    if path.startswith("/v1/"):
        return "anthropic" if path == "/v1/messages" else "openai"
    return "oip" if path.startswith("/v2/") else "http"
