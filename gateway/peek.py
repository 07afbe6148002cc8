"""Route, its first half: what a request's body asks for. Only the fields that the policy needs are decoded."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from policies import errors
from policies.quota import NOTHING, Estimate, estimate

if TYPE_CHECKING:
    from gateway.call import Call

_MOST_MODEL_NAME: Final = 256  # registrations have at most 200; what is asked for is remembered here and there
_FORM_MENTIONS: Final = re.compile(
    rb"content-disposition:[^\r\n]*\bname\*?\s*=\s*[^\r\n]{0,20}model", re.IGNORECASE
).findall
_FORM_MODEL: Final = re.compile(
    rb'content-disposition: *form-data; *name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n', re.IGNORECASE
).findall
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[67]").search
_ANSWERING: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_READING: Final = frozenset({"/v1/embeddings"})  # a prompt, and no answer in tokens


class Peek(msgspec.Struct, gc=False):
    """The only fields of a body that the policy needs."""

    model: str | None = None
    stream: bool | None = None


class Lengths(msgspec.Struct, gc=False):
    """How much of an answer a body asks for. Whatever else stands there is the backend's to refuse."""

    max_tokens: msgspec.Raw = msgspec.Raw(b"")
    max_completion_tokens: msgspec.Raw = msgspec.Raw(b"")  # OpenAI's newer name
    max_output_tokens: msgspec.Raw = msgspec.Raw(b"")  # of /v1/responses
    n: msgspec.Raw = msgspec.Raw(b"")  # answers


_peek = msgspec.json.Decoder(Peek).decode
_lengths = msgspec.json.Decoder(Lengths).decode


def peek(call: Call) -> Peek:
    """Model and stream flag of a request body. Raises BadRequest.

    One decode, and a second, careful one only for a body in which another reader could find another `model`.
    """
    body, resource = call.body, call.resource
    if resource.protocol in ("oip", "http") or not body:
        if resource.needs_model:
            raise errors.BadRequest("A JSON body with a `model` is needed.", param="model")
        return Peek(resource.model)
    if not resource.needs_model and call.head.content_type[:19].lower() == b"multipart/form-data":
        return Peek(_form_model(body))
    try:
        asked = _peek(body)
        if not body.isascii():
            body.decode()  # what is skipped, too: a backend answers 500 to what it cannot read
        if body.count(b'"model"') != 1 or body.count(b'"stream"') > 1 or _has_escaped_letter(body):
            _refuse_duplicates(body)
    except msgspec.ValidationError as problem:
        raise errors.BadRequest(f"The body is not what this path takes: {_safe(problem)}.") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise errors.BadRequest("The body is not valid JSON.") from None
    model = asked.model
    if not model:
        if resource.needs_model:
            raise errors.BadRequest("The body names no `model`.", param="model")
    elif len(model) > _MOST_MODEL_NAME:
        raise errors.BadRequest(f"The name of a model has at most {_MOST_MODEL_NAME} characters.", param="model")
    return asked


def expected_tokens(call: Call, capacity: int) -> Estimate:
    """What a request that has been peeked at may come to, in tokens, under a limit of so many. Never raises."""
    path = call.resource.path
    if path in _READING:
        return estimate(call.body, 0, 1, capacity)
    if path not in _ANSWERING:
        return NOTHING
    asked = _lengths(call.body)
    longest = (_whole(most) for most in (asked.max_completion_tokens, asked.max_output_tokens, asked.max_tokens))
    return estimate(
        call.body, next((most for most in longest if most is not None), None), _whole(asked.n) or 1, capacity
    )


def _whole(number: msgspec.Raw) -> int | None:
    """A whole number; of one without end its first digits, which are more than any limit."""
    digits = bytes(number)
    return int(digits[:15]) if digits.isdigit() else None


def _has_escaped_letter(body: bytes) -> bool:
    """Whether a key may be written otherwise than `model` or `stream` and mean the same."""
    return body.find(b"\\u00") >= 0 and _ESCAPED_LETTER(body) is not None


def _safe(problem: Exception) -> str:
    return str(problem).rstrip(".")[:200]


def _refuse_duplicates(body: bytes) -> None:
    """Raise BadRequest for a top-level object with two `model` or `stream` keys. May raise ValueError."""

    def keys_once(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        for name in ("model", "stream"):
            if names.count(name) > 1:
                raise errors.BadRequest(f"The body has `{name}` more than once.", param=name)

    json.loads(body, object_pairs_hook=keys_once)


def _form_model(body: bytes) -> str | None:
    found: list[bytes] = _FORM_MODEL(body)
    if len(found) > 1:
        raise errors.BadRequest("The form has `model` more than once.", param="model")
    if len(_FORM_MENTIONS(body)) != len(found):  # another reader might find one where we see none
        raise errors.BadRequest(
            'The form must name its model as `form-data; name="model"`, in one line.', param="model"
        )
    return found[0].decode("utf-8", "replace") if found else None
