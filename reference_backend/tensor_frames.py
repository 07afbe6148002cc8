"""What the server and the process of a tensor model say to each other, in the frames of engine/frames.py.

The server begins with `Open`; `Opened` or `Refusal` comes back. Then `Infer` and `Cancel` go one way, and one `Answer`
to each `Infer` that was not cancelled comes the other way, in any order.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from reference_backend.repository import Card
from reference_backend.tensors import DATATYPES, DTYPES, Tensors, TensorSpec, Terms


class Packed(msgspec.Struct, array_like=True, frozen=True):
    """A tensor: its bytes, or where it is of BYTES its elements."""

    datatype: str
    shape: tuple[int, ...]
    data: bytearray | list[bytes]


class Open(msgspec.Struct, tag=True, array_like=True, frozen=True):
    directory: str
    card: Card


class Opened(msgspec.Struct, tag=True, array_like=True, frozen=True):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Refusal(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model cannot be served, and why, in one line."""

    reason: str


class Infer(msgspec.Struct, tag=True, array_like=True, frozen=True):
    ticket: int
    inputs: dict[str, Packed]
    terms: Terms


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    ticket: int


class Answer(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The outputs, or what became of the request, with a message where it was the input's fault."""

    ticket: int
    outputs: dict[str, Packed]
    error: Literal["", "bad", "full", "late", "failed"] = ""
    message: str = ""


decode_for_model = msgspec.msgpack.Decoder(Open | Infer | Cancel).decode
decode_for_server = msgspec.msgpack.Decoder(Opened | Refusal | Answer).decode


def pack(tensors: Tensors) -> dict[str, Packed]:
    """Arrays as they travel."""
    packed = {}
    for name, array in tensors.items():
        data = array.ravel().tolist() if array.dtype == np.object_ else bytearray(array.data)
        packed[name] = Packed(DATATYPES[array.dtype], array.shape, data)
    return packed


def unpack(packed: dict[str, Packed]) -> Tensors:
    """Arrays again; they may be written to."""
    tensors = {}
    for name, each in packed.items():
        if isinstance(each.data, list):
            flat = np.empty(len(each.data), dtype=np.object_)
            flat[:] = each.data
        else:
            flat = np.frombuffer(each.data, dtype=DTYPES[each.datatype])
        tensors[name] = flat.reshape(each.shape)
    return tensors
