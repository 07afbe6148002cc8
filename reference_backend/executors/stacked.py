"""Requests laid on each other: what an executor needs to be a `TensorModel`, when all that it has is a function.

Requests whose tensors have equal shapes, but for the first dimension, run as one (batcher.py); each gets its rows of
what comes out. A model with `max_batch = 1` runs each request by itself, whatever its first dimension is.

Numbers that are none (NaN, infinities) are refused on the way in and are the model's fault on the way out: few clients
can read them. A model for which they mean something says `finite = false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from reference_backend.batcher import Batcher, Limits
from reference_backend.engine.config import ModelError
from reference_backend.repository import Card
from reference_backend.tensors import ANYHOW, DTYPES, Array, BadTensor, Tensors, TensorSpec, Terms

ANY_SIZE = 8  # what stands for a dimension of any size in the first run

Form = TypeVar("Form")


@dataclass(frozen=True, slots=True)
class Program:
    """What a file has: the tensors that `compute` takes and gives, in this order."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    compute: Callable[[Sequence[Array]], Sequence[Array]]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[settings]` that every executor here takes."""

    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1  # of arithmetic; more than one pays for large models only
    delay_us: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0  # an idle model waits so long for company
    finite: bool = True


@contextlib.asynccontextmanager
async def opened(load: Callable[[Path, int], Program], directory: Path, card: Card) -> AsyncIterator[Stacked]:
    """The model in the card's file, which `load` reads, to run on so many threads. Raises ModelError.

    The card may give its tensors other names, in the same order.
    """
    settings = read_settings(directory, card, Settings)
    path = file_of(directory, card)
    program = load(path, settings.threads)
    inputs = checked_specs(card.inputs, program.inputs, "inputs", path)
    outputs = checked_specs(card.outputs, program.outputs, "outputs", path)
    async with Stacked(Program(inputs, outputs, program.compute), card, settings).running() as model:
        yield model


def read_settings(directory: Path, card: Card, form: type[Form]) -> Form:
    """The card's settings in the form that an executor takes. Raises ModelError."""
    try:
        return msgspec.convert(card.settings, form)
    except msgspec.ValidationError as error:
        raise ModelError(f"{directory / 'model.toml'}: settings: {error}") from error


def file_of(directory: Path, card: Card) -> Path:
    """The file that the card names. Raises ModelError when it names none, or it is not there."""
    if not card.file:
        raise ModelError(
            f"{directory / 'model.toml'}: `file` is missing: it names what executor {card.executor!r} reads"
        )
    path = directory / card.file
    if not path.is_file():
        raise ModelError(f"{path}: no such file, but model.toml names it")
    return path


class Stacked:
    """A TensorModel. The program runs in a thread of its own, one batch after another."""

    def __init__(self, program: Program, card: Card, settings: Settings) -> None:
        self.inputs, self.outputs = tuple(program.inputs), tuple(program.outputs)
        self._program, self._finite = program, settings.finite
        self._rows = card.max_batch if card.max_batch > 1 else None
        fixed = [spec.name for spec in (*self.inputs, *self.outputs) if spec.shape[:1] != (-1,)]
        if self._rows is not None and fixed:
            raise ModelError(
                f"max_batch = {self._rows} needs a first dimension of -1, which {', '.join(fixed)} has not"
            )
        self._thread = ThreadPoolExecutor(1, "model")
        limits = Limits(self._rows or 1, settings.delay_us / 1e6)
        self._batcher = Batcher(self._run, limits, time.monotonic)  # noqa: TID251  the interface's clock

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stacked]:
        """In service, after a run of one row and one of as many as may be. Raises ModelError when that fails."""
        loop = asyncio.get_running_loop()
        with self._thread:  # that computes, and no other does: see encoder.py
            try:
                for rows in sorted({1, self._rows or 1}):
                    examples = {spec.name: _example(spec, rows) for spec in self.inputs}
                    self._check_outputs(await loop.run_in_executor(self._thread, self._compute, examples), rows)
            except Exception as error:
                raise ModelError(f"a first run of {rows} row(s) fails: {first_line(error)}") from error
            async with self._batcher:
                yield self

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """As the interface has it."""
        if self._finite:
            for name, array in inputs.items():
                if not _is_finite(array):
                    raise BadTensor(
                        f"{name} has values that are no numbers (NaN or infinity), which this model does not take"
                    )
        rows = 1 if self._rows is None else self._count(inputs)
        key = tuple(inputs[spec.name].shape[1:] for spec in self.inputs)
        [outputs] = await self._batcher.ask([(inputs, rows)], key, terms)
        if self._finite and not all(map(_is_finite, outputs.values())):
            raise ArithmeticError("the model's answer has values that are no numbers (NaN or infinity)")
        return outputs

    def _count(self, inputs: Tensors) -> int:
        """The rows of a request. Raises BadTensor."""
        counts = {spec.name: len(inputs[spec.name]) for spec in self.inputs}
        rows = next(iter(counts.values()))
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise BadTensor(f"the inputs differ in their first dimension, the rows: {told}")
        if not 1 <= rows <= (self._rows or rows):
            raise BadTensor(f"{next(iter(counts))} has {rows} rows; a request may have 1 to {self._rows}")
        return rows

    async def _run(self, requests: list[Tensors]) -> list[Tensors]:
        """One batch. What is stacked here is stacked while the batch before it runs."""
        first, *others = requests
        stacked = first
        if others:
            stacked = {name: np.concatenate([request[name] for request in requests]) for name in first}
        outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, stacked)
        if self._rows is None:
            self._check_outputs(outputs, None)
            return [outputs]
        counts = [len(next(iter(request.values()))) for request in requests]
        self._check_outputs(outputs, sum(counts))
        ends = np.cumsum(counts)
        return [
            {name: array[end - count : end] for name, array in outputs.items()}
            for count, end in zip(counts, ends, strict=True)
        ]

    def _compute(self, tensors: Tensors) -> dict[str, Array]:
        found = self._program.compute([tensors[spec.name] for spec in self.inputs])
        return {spec.name: array for spec, array in zip(self.outputs, found, strict=True)}

    def _check_outputs(self, outputs: Mapping[str, Array], rows: int | None) -> None:
        """Raises ValueError for what is not as the specs say: they are read from files that may lie."""
        for spec in self.outputs:
            array = outputs[spec.name]
            is_of_rows = self._rows is None or rows is None or array.shape[:1] == (rows,)
            if array.dtype != DTYPES[spec.datatype] or not spec.takes(array.shape) or not is_of_rows:
                raise ValueError(
                    f"output {spec.name} is {array.dtype} {list(array.shape)}, "
                    f"said to be {spec.datatype} {list(spec.shape)}" + ("" if is_of_rows else f" for {rows} rows")
                )


def _example(spec: TensorSpec, rows: int) -> Array:
    sizes = [ANY_SIZE if size == -1 else size for size in spec.shape]
    if spec.shape[:1] == (-1,):
        sizes[0] = rows
    return np.full(sizes, b"a") if spec.datatype == "BYTES" else np.zeros(sizes, DTYPES[spec.datatype])


def _is_finite(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def first_line(error: BaseException) -> str:
    """What a library says of its trouble, without the pages behind it."""
    text = str(error).strip()
    return text.partition("\n")[0][:300] if text else type(error).__name__


def checked_specs(said: Sequence[TensorSpec], found: Sequence[TensorSpec], what: str, path: Path) -> list[TensorSpec]:
    """The specs of a file, under the names and with the shapes of model.toml where that has any. Raises ModelError."""
    if not said:
        return list(found)
    fits = len(said) == len(found) and all(
        ours.datatype == theirs.datatype
        and len(ours.shape) == len(theirs.shape)
        and all(size in (-1, wanted) or wanted == -1 for size, wanted in zip(theirs.shape, ours.shape, strict=True))
        for ours, theirs in zip(said, found, strict=True)
    )
    if not fits:
        shown = "; ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in found)
        raise ModelError(f"{path}: model.toml says other {what} than the file has: {shown}")
    return list(said)


def spec_of(name: str, datatype: str | None, shape: Sequence[Any], path: Path) -> TensorSpec:
    """A tensor as a file describes it; a size that is no number is any. Raises ModelError."""
    if datatype is None:
        raise ModelError(f"{path}: tensor {name} is of a type that the Open Inference Protocol has no name for here")
    return TensorSpec(name, datatype, tuple(size if isinstance(size, int) and size >= 0 else -1 for size in shape))
