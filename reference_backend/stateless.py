"""A model of tensors in service: in a process of its own, or beside the server.

What is handed to it is judged here, and what becomes of it is told as an `ApiError`: 400 for what the model does not
take, 429 when it has no room, 503 when its process is gone, 504 at the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import ClassVar

from reference_backend import protocol
from reference_backend.changing import Changing
from reference_backend.engine.config import ModelError
from reference_backend.engine.request import Load
from reference_backend.link import Link, linked, spawned
from reference_backend.load_report import Reporter
from reference_backend.protocol import ApiError, bad
from reference_backend.repository import Card, Entry, Kind
from reference_backend.tensor_frames import (
    Answer,
    Cancel,
    Infer,
    Open,
    Opened,
    decode_for_server,
    pack,
    unpack,
)
from reference_backend.tensors import (
    ANYHOW,
    DTYPES,
    Array,
    BadTensor,
    Full,
    Late,
    Lost,
    TensorModel,
    Tensors,
    TensorSpec,
    Terms,
    executor,
)

WEDGED_AFTER = 60.0  # seconds without an answer while there is something to do
log = logging.getLogger(__name__)


class Failed(Exception):  # noqa: N818  an answer, not a fault of ours
    """The model raised something; the log of its process has it."""


class Remote(Link[Opened]):
    """A model at the other end of a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._answers: dict[int, asyncio.Future[Tensors]] = {}
        self._tickets = 0
        self._watch: asyncio.TimerHandle | None = None

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """As TensorModel says; raises Lost and Failed, too."""
        if self.lost.is_set():
            raise Lost
        self._tickets += 1
        ticket = self._tickets
        self.send(Infer(ticket, pack(inputs), terms))
        answer = self._answers[ticket] = self.loop.create_future()
        if self._watch is None:
            self._watch = self.loop.call_later(WEDGED_AFTER, self.cut)
        try:
            return await answer
        finally:
            if self._answers.pop(ticket, None) is not None:
                self.send(Cancel(ticket))

    def take(self, body: bytes) -> None:
        message = decode_for_server(body)
        if isinstance(message, Answer):
            self._deliver(message)
        elif isinstance(message, Opened):
            self.inputs, self.outputs = message.inputs, message.outputs
            self.opened.set_result(message)
        else:
            self.opened.set_exception(ModelError(message.reason))
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self.loop.call_later(WEDGED_AFTER, self.cut) if self._answers else None

    def _deliver(self, message: Answer) -> None:
        answer = self._answers.pop(message.ticket, None)
        if answer is None or answer.done():
            return  # given up while this was on its way
        if not message.error:
            answer.set_result(unpack(message.outputs))
        elif message.error == "bad":
            answer.set_exception(BadTensor(message.message))
        else:
            answer.set_exception({"full": Full, "late": Late, "failed": Failed}[message.error]())

    def end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Lost())
        self._answers.clear()


class Stateless(Changing):
    """What the server asks for tensors. It stays the same while processes come and go."""

    # What a kind has beside its own: inputs and outputs by name, with datatype and number of dimensions.
    fixed_inputs: ClassVar[Mapping[str, tuple[str, int]]] = {}
    fixed_outputs: ClassVar[Mapping[str, tuple[str, int]]] = {}
    is_alive = True  # its process has no heartbeat: a run may take as long as WEDGED_AFTER

    def __init__(self, entry: Entry, card: Card, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__()
        self.kind: Kind = card.kind
        self.card = card
        self.bound = 2 * card.max_batch + card.max_waiting
        self.inputs: Sequence[TensorSpec] = ()  # known from the first life on
        self.outputs: Sequence[TensorSpec] = ()
        self.reporter = Reporter(self, wall)
        self._entry = entry
        self.clock = clock
        self._in_flight = 0
        self._model: TensorModel | None = None
        self._lost = asyncio.Event()
        self._life = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        state = "away" if self._model is None else "ready"
        return f"<{type(self).__name__} {self._entry} {state}, {self._in_flight} of {self.bound} in flight>"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """One life of it. Raises ModelError on entering."""
        async with contextlib.AsyncExitStack() as self._life:
            await self.wake()
            yield

    async def sleep(self) -> None:
        """End its process: such a model is read again in no time."""
        await self._life.aclose()
        self._lost = asyncio.Event()

    async def wake(self) -> None:
        await self._life.enter_async_context(self._awake())

    @contextlib.asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        life = self._beside() if self.card.isolation == "thread" else self._apart()
        async with life as model:
            self._check_kind(model)
            self._model, self.inputs, self.outputs = model, model.inputs, model.outputs
            try:
                yield
            finally:
                self._model = None

    @contextlib.asynccontextmanager
    async def _beside(self) -> AsyncIterator[TensorModel]:
        self._lost = asyncio.Event()
        async with executor(self.card.executor)(self._entry.directory, self.card) as model:
            yield model

    @contextlib.asynccontextmanager
    async def _apart(self) -> AsyncIterator[TensorModel]:
        async with spawned("reference_backend.tensor_service") as connection, self.linked(connection) as model:
            yield model

    @contextlib.asynccontextmanager
    async def linked(self, connection: socket.socket) -> AsyncIterator[TensorModel]:
        """The model at the other end of a socket. Raises ModelError."""
        async with linked(Remote, connection) as remote:
            self._lost = remote.lost
            remote.send(Open(str(self._entry.directory), self.card))
            await remote.opened
            yield remote

    def _check_kind(self, model: TensorModel) -> None:
        for specs, fixed in ((model.inputs, self.fixed_inputs), (model.outputs, self.fixed_outputs)):
            there = {spec.name: (spec.datatype, len(spec.shape)) for spec in specs}
            for name, wanted in fixed.items():
                if there.get(name) != wanted:
                    raise ModelError(
                        f"{self._entry}: a model of the kind {self.kind!r} has {name!r} of {wanted[0]} in "
                        f"{wanted[1]} dimensions, but its executor gives {there.get(name, 'none')}"
                    )

    async def wait_lost(self) -> None:
        await self._lost.wait()

    def load(self) -> Load:
        running = min(self._in_flight, self.card.max_batch)
        return Load(running, self._in_flight - running, 0.0, slots=self.card.max_batch)

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW, param: str = "inputs") -> Tensors:
        """Run the model. Raises ApiError, which says that `param` is at fault where the model takes no such input."""
        check(inputs, self.inputs)
        if self._model is None:
            raise protocol.loading()
        if self._in_flight >= self.bound:
            raise self._full()
        began = self.clock()
        self._change(1)
        try:
            async with asyncio.timeout(None if terms.deadline is None else terms.deadline - began):
                outputs = await self._model.infer(inputs, terms)
        except BadTensor as error:
            raise bad(str(error), param) from error
        except Full as error:
            raise self._full() from error
        except (Late, TimeoutError) as error:
            raise ApiError(504, "deadline", "the deadline passed before there was an answer") from error
        except Lost as error:
            raise protocol.worker_lost() from error
        except Failed as error:
            raise protocol.engine_failed() from error
        finally:
            self._change(-1)
        self.reporter.answered(self.clock() - began, self.clock() - began, 1)
        return outputs

    def _full(self) -> ApiError:
        self.reporter.rejects += 1
        return protocol.queue_full()

    def _change(self, requests: int) -> None:
        self._in_flight += requests
        self.changes += 1
        self._news.set()


class Embedding(Stateless):
    fixed_inputs: ClassVar = {"text": ("BYTES", 1), "ids": ("INT64", 1), "lengths": ("INT64", 1)}
    fixed_outputs: ClassVar = {"embedding": ("FP32", 2), "tokens": ("INT64", 1)}


class Painter(Stateless):
    fixed_inputs: ClassVar = {"prompt": ("BYTES", 1), "seed": ("INT64", 1)}
    fixed_outputs: ClassVar = {"image": ("UINT8", 4)}


KINDS: Mapping[Kind, type[Stateless]] = {"tensor": Stateless, "embedding": Embedding, "image": Painter}


def check(inputs: Tensors, specs: Sequence[TensorSpec]) -> None:
    """Raise ApiError 400 for inputs that do not fit the specs, naming the tensor and what was expected."""
    wanted = {spec.name: spec for spec in specs}
    for name, spec in wanted.items():
        if name not in inputs and not spec.optional:
            raise bad_tensor(name, "is missing")
    for name, array in inputs.items():
        if name not in wanted:
            raise bad_tensor(name, f"is none of this model's: {', '.join(wanted)}")
        _check_one(array, wanted[name])


def _check_one(array: Array, spec: TensorSpec) -> None:
    if array.dtype != DTYPES[spec.datatype]:
        raise bad_tensor(spec.name, f"must be of {spec.datatype}")
    if not spec.takes(array.shape):
        raise bad_tensor(spec.name, f"has the shape {list(array.shape)}, which is not {list(spec.shape)} (-1: any)")


def bad_tensor(name: str, what: str) -> ApiError:
    return bad(f"input {name[: protocol.LONGEST_SHOWN]!r} {what}", "inputs")
