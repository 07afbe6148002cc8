"""Runs an ONNX file with ONNX Runtime: on TensorRT or CUDA where this build of it has them, else on the CPU.

Threads do not spin while they wait: on a machine that others use too, spinning takes what they would compute with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from reference_backend.engine.config import ModelError
from reference_backend.executors import stacked
from reference_backend.executors.stacked import Program, first_line, spec_of
from reference_backend.tensors import DTYPES, Array, BadTensor, TensorSpec

DATATYPES = {f"tensor({dtype.name})": name for name, dtype in DTYPES.items()}
DATATYPES |= {"tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(string)": "BYTES"}
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")  # fastest first
FATAL_ONLY = 4  # what it would log is in the exceptions


def load(path: Path, threads: int) -> Program:
    """What an ONNX file gives. Raises ModelError."""
    session = load_session(path, threads)
    inputs, outputs = (
        [spec_of(each.name, DATATYPES.get(each.type), each.shape, path) for each in tensors]
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    names = [spec.name for spec in outputs]

    def compute(arrays: Sequence[Array]) -> list[Array]:
        feeds = {spec.name: _to_text(array, spec) for spec, array in zip(inputs, arrays, strict=True)}
        return [_to_bytes(array, spec) for spec, array in zip(outputs, session.run(names, feeds), strict=True)]

    return Program(inputs, outputs, compute)


opened = functools.partial(stacked.opened, load)


def load_session(path: Path, threads: int) -> Any:
    """A session on a file. Raises ModelError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = FATAL_ONLY
    there = onnxruntime.get_available_providers()
    try:
        return onnxruntime.InferenceSession(path, options, providers=[name for name in PROVIDERS if name in there])
    except Exception as error:  # its errors have no common class
        raise ModelError(f"{path}: cannot be read as an ONNX model: {first_line(error)}") from error


def _to_text(array: Any, spec: TensorSpec) -> Any:
    """BYTES as the texts that ONNX Runtime wants; all else as it is."""
    if spec.datatype != "BYTES":
        return array
    try:
        texts = [each.decode() for each in array.ravel()]
    except UnicodeDecodeError as error:
        raise BadTensor(f"{spec.name} has bytes that are no UTF-8 text") from error
    return np.array(texts, dtype=np.object_).reshape(array.shape)


def _to_bytes(array: Any, spec: TensorSpec) -> Any:
    if spec.datatype != "BYTES":
        return array
    return np.array([each.encode() for each in array.ravel()], dtype=np.object_).reshape(array.shape)
