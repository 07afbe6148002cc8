"""Tensors of the Open Inference Protocol as arrays, and back: JSON, raw bytes, and protobuf's fields.

Raw bytes are little-endian and row-major; an element of BYTES is four bytes of its length, then itself. That is how
Triton's binary extension and `raw_input_contents` have them. Everything here judges: whatever a client made of a tensor
becomes an array of its datatype and shape, or an ApiError 400 that names it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from reference_backend.refusals import bad
from reference_backend.stateless import bad_tensor
from reference_backend.tensors import DTYPES, Array

LENGTH_BYTES = 4
MOST_DIMENSIONS = 16
_NESTED = re.compile(rb"\s*\[\s*\[")
# How protobuf's InferTensorContents holds each datatype; FP16 has no field.
CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{name: f"{name.lower()}_contents" for name in ("BOOL", "INT64", "UINT64", "FP32", "FP64", "BYTES")},
}


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise bad_tensor(name, f"has the datatype {datatype[:20]!r}, which is none of {', '.join(DTYPES)}")
    return DTYPES[datatype]


def _shaped(name: str, flat: Array, shape: Sequence[int]) -> Array:
    """Raises ApiError where the elements do not fill the shape."""
    if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape) or math.prod(shape) != flat.size:
        raise bad_tensor(name, f"has {flat.size} elements, which do not fill the shape {list(shape)[:MOST_DIMENSIONS]}")
    return flat.reshape(tuple(shape))


def from_list(name: str, datatype: str, shape: Sequence[int], elements: Sequence[Any]) -> Array:
    """A tensor of numbers, truth values or bytes that have the right type already; whether they fit is judged."""
    dtype = _dtype(name, datatype)
    if datatype == "BYTES":
        flat = np.empty(len(elements), dtype=np.object_)
        flat[:] = elements
        return _shaped(name, flat, shape)
    try:
        with np.errstate(over="ignore"):
            flat = np.array(elements, dtype=dtype)
    except (OverflowError, ValueError) as error:
        raise bad_tensor(name, f"has elements that {datatype} cannot hold") from error
    return _shaped(name, flat, shape)


def from_json(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """A tensor of `data`, which is flat or nested as the shape is."""
    dtype = _dtype(name, datatype)
    element: Any = {"b": bool, "f": float, "O": str}.get(dtype.kind, int)
    elements = _decode_list(name, data, element, min(len(shape), MOST_DIMENSIONS) if _NESTED.match(data) else 1)
    if datatype == "BYTES":
        elements = [text.encode() for text in elements]
    array = from_list(name, datatype, shape, elements)
    if dtype.kind == "f" and not np.isfinite(array).all():  # JSON has none: it was too large for the type
        raise bad_tensor(name, f"has elements that {datatype} cannot hold")
    return array


@functools.cache
def _lists_of(element: Any, depth: int) -> Any:
    """Decodes lists that are nested so deep."""
    return _lists_of(list[element], depth - 1) if depth else msgspec.json.Decoder(element).decode


def _decode_list(name: str, data: msgspec.Raw, element: Any, depth: int) -> list[Any]:
    try:
        elements: list[Any] = _lists_of(element, depth)(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_tensor(name, f"has data that cannot be read: {str(error)[:200]}") from error
    while elements and isinstance(elements[0], list):
        elements = [each for inner in elements for each in inner]
    return elements


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Array:
    """A tensor of raw bytes."""
    dtype = _dtype(name, datatype)
    if datatype == "BYTES":
        return from_list(name, datatype, shape, _split(name, memoryview(raw)))
    if len(raw) % dtype.itemsize:
        raise bad_tensor(name, f"has {len(raw)} bytes, which is no number of elements of {dtype.itemsize} bytes")
    if datatype == "BOOL" and len(raw) and np.frombuffer(raw, np.uint8).max() > 1:
        raise bad_tensor(name, "has elements of BOOL that are neither 0 nor 1")
    flat = np.frombuffer(raw, dtype=dtype.newbyteorder("<"))
    return _shaped(name, np.require(flat, dtype, "A"), shape)


def _split(name: str, raw: memoryview) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        end = at + LENGTH_BYTES + int.from_bytes(raw[at : at + LENGTH_BYTES], "little")
        if end > len(raw) or at + LENGTH_BYTES > len(raw):
            raise bad_tensor(
                name, "ends within an element: each is four bytes of its length (little-endian), then itself"
            )
        elements.append(bytes(raw[at + LENGTH_BYTES : end]))
        at = end
    return elements


def to_raw(array: Array) -> bytes:
    """Raw bytes of a tensor."""
    if array.dtype == np.object_:
        return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in array.ravel())
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_json(name: str, array: Array) -> list[Any]:
    """The elements of a tensor, flat. Raises ApiError for what JSON cannot carry."""
    ask = "ask for it with binary_data: true"
    if array.dtype == np.object_:
        try:
            return [each.decode() for each in array.ravel()]
        except UnicodeDecodeError as error:
            raise bad(f"output {name!r} is no UTF-8 text; {ask}", code="not_json") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise bad(f"output {name!r} has elements that JSON cannot hold (NaN or infinite); {ask}", code="not_json")
    elements: list[Any] = array.ravel().tolist()
    return elements
