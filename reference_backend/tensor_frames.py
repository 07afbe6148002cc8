"""What the server and the process of a tensor model say to each other, in the frames of engine/frames.py.

The server begins with `Open`; `Opened` or `Refused` comes back. Then `Infer` and `Cancel` go one way, and one `Answer`
to each `Infer` that was not cancelled comes the other way, in any order. A `Ping` comes back.
"""

from __future__ import annotations

import msgspec
import numpy as np

from reference_backend.engine.frames import Ping, Refused
from reference_backend.repository import Card
from reference_backend.tensors import DATATYPES, DTYPES, BadTensor, Failed, Tensors, TensorSpec, Terms


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


class Infer(msgspec.Struct, tag=True, array_like=True, frozen=True):
    ticket: int
    inputs: dict[str, Packed]
    terms: Terms


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    ticket: int


class Answer(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The outputs, or the name of what is raised instead, one of ERRORS, with its message."""

    ticket: int
    outputs: dict[str, Packed]
    error: str = ""
    message: str = ""


ERRORS = {error.__name__: error for error in (BadTensor, Failed)}
decode_for_model = msgspec.msgpack.Decoder(Open | Infer | Cancel | Ping).decode
decode_for_server = msgspec.msgpack.Decoder(Opened | Refused | Answer | Ping).decode


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
