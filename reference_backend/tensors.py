"""Models that take tensors and give tensors: what they are to the rest of the server.

A `TensorModel` is made by an executor, a module that model.toml names. The server runs it in a process of its own
(`isolation = "process"`) or beside itself (`"thread"`: no hop, for models that need microseconds); either way it talks
to this interface, and what it hands over has been checked: every input that is not optional is there, nothing else is,
each has the datatype and a shape that its spec allows, is contiguous and in the machine's byte order.

Three kinds of model have fixed names for what they take and give, so that the OpenAI paths can use them:

    embedding  takes `text` BYTES [-1], or `ids` INT64 [-1] and `lengths` INT64 [-1]: the tokens of all texts behind
               each other, and how many each has; gives `embedding` FP32 [-1, d] and `tokens` INT64 [-1], the count for
               each text
    image      takes `prompt` BYTES [-1], `seed` INT64 [-1]; gives `image` UINT8 [-1, height, width, 3]
    tensor     whatever its specs say

BYTES is an array of Python `bytes` objects (numpy dtype object); text in it is UTF-8.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from reference_backend.engine.config import ModelError
from reference_backend.engine.request import Priority

if TYPE_CHECKING:
    from reference_backend.repository import Card

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]

# Datatypes of the Open Inference Protocol: numbers are named as in numpy, but for FP. BF16 is left out, numpy has none.
_NUMBERS = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64"
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name.lower().replace("fp", "float")) for name in _NUMBERS.split()}
DTYPES["BYTES"] = np.dtype(np.object_)
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


class BadTensor(ValueError):  # noqa: N818  a verdict on the client's input
    """The input is not one that this model takes. The message names the tensor and says what is expected."""


class Lost(Exception):  # noqa: N818  an answer, not a fault
    """The process that had the request is gone, and what it had computed with it."""


class Failed(Exception):  # noqa: N818  an answer, not a fault of ours
    """The model raised something; the log of its process has it."""


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor that a model takes or gives. -1 in `shape`: any size. With batches the first dimension is -1.

    An `optional` one may be left out of a request; the model says what may stand for what.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        if self.datatype not in DTYPES:
            raise ValueError(f"datatype {self.datatype!r} is not one of {', '.join(DTYPES)}")
        if any(size < -1 for size in self.shape):
            raise ValueError(f"shape {list(self.shape)}: sizes are 0 or more, or -1 for any")

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is one."""
        return len(shape) == len(self.shape) and all(
            there >= 0 and wanted in (-1, there) for wanted, there in zip(self.shape, shape, strict=True)
        )


class Terms(msgspec.Struct, array_like=True, frozen=True):
    """How a request is wanted: by when, in seconds of `time.monotonic()`, for whom, and how urgently."""

    deadline: float | None = None
    tenant: str = ""  # who shares fairly with others
    priority: Priority = Priority.NORMAL


ANYHOW = Terms()


class TensorModel(Protocol):
    """A model that is loaded and has run once."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """Run it: many calls may be under way at once. Gives every output of `outputs`.

        A cancelled call is one whose client left or whose deadline passed: it must take no place in a batch that has
        not begun. What computes leaves the event loop free (a thread): a process whose loop gives no sign is given up.
        Raises BadTensor; anything else is a fault of the model.
        """
        ...


# The function `opened` of an executor's module: the model of a version's directory, warm from when it is entered.
# Raises ModelError on entering.
Opened = Callable[[Path, "Card"], AbstractAsyncContextManager[TensorModel]]


def executor(name: str) -> Opened:
    """The `opened` of an executor: one of ours by its name, or that of any module by its full name (with dots).

    Raises ModelError when there is no such module, or a library that it needs is not installed.
    """
    module = name if "." in name else f"{__package__}.executors.{name}"
    try:
        found: Opened = importlib.import_module(module).opened
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"executor {name!r} cannot be used: {error}") from error
    return found
