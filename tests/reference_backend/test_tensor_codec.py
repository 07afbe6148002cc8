"""Tensors to bytes and JSON and back, for every datatype. What is refused: test_open_inference.py."""

import msgspec
import numpy as np
import pytest

from reference_backend.refusals import ApiError
from reference_backend.tensor_codec import from_json, from_list, from_raw, to_json, to_raw
from reference_backend.tensors import DATATYPES, DTYPES

VALUES = {"BOOL": [True, False, True], "BYTES": [b"", b"\xc3\xa4", b"abc"], "FP16": [0.5, -2.0, 1.0]}


def sample(datatype):
    array = np.empty(3, dtype=DTYPES[datatype])
    array[:] = VALUES.get(datatype, [1, 2, 100])
    return array


@pytest.mark.parametrize("datatype", DTYPES)
def test_there_and_back(datatype):
    array = sample(datatype)
    assert DATATYPES[array.dtype] == datatype
    for back in (
        from_raw("x", datatype, [3, 1], to_raw(array)),
        from_json("x", datatype, [3, 1], msgspec.Raw(msgspec.json.encode(to_json("x", array)))),
        from_list("x", datatype, [3, 1], array.tolist()),
    ):
        assert (back.dtype, back.shape, back.ravel().tolist()) == (array.dtype, (3, 1), array.tolist())


def test_bytes_have_their_length_before_them():
    assert to_raw(sample("BYTES")) == b"\0\0\0\0" + b"\2\0\0\0\xc3\xa4" + b"\3\0\0\0abc"


@pytest.mark.parametrize(
    ("datatype", "elements"), [("UINT8", [256]), ("INT8", [-129]), ("UINT64", [-1]), ("INT64", [2**63])]
)
def test_numbers_out_of_range_are_refused(datatype, elements):
    with pytest.raises(ApiError, match=f"elements that {datatype} cannot hold"):
        from_list("x", datatype, [1], elements)
    with pytest.raises(ApiError):
        from_json("x", datatype, [1], msgspec.Raw(msgspec.json.encode([2**70])))


def test_nested_data_is_flattened_and_ragged_data_refused():
    assert from_json("x", "INT32", [2, 2, 1], msgspec.Raw(b"[[[1],[2]],[[3],[4]]]")).ravel().tolist() == [1, 2, 3, 4]
    for data in (b"[[1],[2,3]]", b"[1,[2]]", b"[[[1]],[[2]]]"):
        with pytest.raises(ApiError):
            from_json("x", "INT32", [2, 2], msgspec.Raw(data))


def test_a_scalar_has_one_element():
    assert from_json("x", "FP32", [], msgspec.Raw(b"[1.5]")).shape == ()
