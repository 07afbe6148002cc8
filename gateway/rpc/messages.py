"""Messages: which model one asks for, found without decoding it. Pure.

The wire format of Protocol Buffers (https://protobuf.dev/programming-guides/encoding/): fields one after another, each
a tag and a value that says its own length. So all but two fields are stepped over, tensors of megabytes at once. What
the gateway itself answers is small, and made with the protocol's own classes.
"""

from __future__ import annotations

from typing import Any, Final

from open_inference import inference_pb2
from policies import errors

MOST_FIELDS: Final = 4096  # of one message: a client that sends millions of small ones must not keep the loop busy
_MOST_NAME: Final = 256  # characters, as over HTTP
_LONGEST_VARINT: Final = 10  # bytes
_HIGHEST_NUMBER: Final = 2**29 - 1  # of a field: there are readers that drop what is above it

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def names_in(message: bytes, name_field: int, version_field: int) -> tuple[str, str]:
    """The texts in two fields of a message, "" where one is left out; a `version_field` of 0 is no field.

    Raises BadRequest for what is no message, for names that two readers could understand differently, and for a message
    of more than MOST_FIELDS fields (repeated ones count each time).
    """
    found: dict[int, bytes] = {}
    at, end = 0, len(message)
    for _ in range(MOST_FIELDS):
        if at == end:
            return _text(found.get(name_field, b"")), _text(found.get(version_field, b""))
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            size, start = _varint(message, at)
            at = start + size
            if number in (name_field, version_field) and number:
                if number in found:
                    raise errors.BadRequest("The message names its model more than once.", param="model")
                found[number] = message[start:at]
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise _malformed()
        if at > end or not 0 < number <= _HIGHEST_NUMBER:
            raise _malformed()
    raise errors.BadRequest(f"The message has more than {MOST_FIELDS} fields.")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = shift = 0
    for position in range(at, min(at + _LONGEST_VARINT, len(message))):
        byte = message[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise _malformed()


def _text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise _malformed() from None
    if len(text) > _MOST_NAME:
        raise errors.BadRequest(f"The name of a model has at most {_MOST_NAME} characters.", param="model")
    return text


def _malformed() -> errors.BadRequest:
    return errors.BadRequest("The message is not one of this method.")


def encoded(name: str, document: dict[str, Any]) -> bytes:
    """An answer of the gateway's own: its form over REST has the same fields."""
    message: bytes = getattr(inference_pb2, name)(**document).SerializeToString()
    return message
