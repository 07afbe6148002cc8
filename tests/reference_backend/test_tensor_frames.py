"""Tensors as they travel between two of our processes."""

import numpy as np
import pytest

from reference_backend.engine.frames import LENGTH_BYTES, framed
from reference_backend.engine.request import Priority
from reference_backend.tensor_frames import Infer, decode_for_model, pack, unpack
from reference_backend.tensors import DTYPES, Terms

TERMS = Terms(1.5, "ci", Priority.LOW)


@pytest.mark.parametrize("datatype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_they_arrive_as_they_were(datatype, shape):
    count = int(np.prod(shape))
    content = [b"a" * n for n in range(count)] if datatype == "BYTES" else [n % 2 for n in range(count)]
    array = np.empty(count, dtype=DTYPES[datatype])
    array[:] = content
    sent = framed(Infer(7, pack({"x": array.reshape(shape)}), TERMS))
    arrived = decode_for_model(sent[LENGTH_BYTES:])
    there = unpack(arrived.inputs)["x"]
    assert (arrived.ticket, arrived.terms) == (7, TERMS)
    assert (there.dtype, there.shape) == (DTYPES[datatype], shape)
    assert there.ravel().tolist() == array.tolist()
    assert there.flags.writeable


def test_one_that_lies_in_memory_in_another_order_arrives_too():
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert unpack(pack({"x": array}))["x"].tolist() == array.tolist()
