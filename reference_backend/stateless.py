"""A model of tensors in service: in a process of its own, or beside the server.

What is handed to it is judged here, and what becomes of it is told as an `ApiError`: 400 for what the model does not
take, 429 when as many are in flight as may be (admission.py), 503 when its process is gone, 504 at the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import ClassVar

from reference_backend import refusals
from reference_backend.admission import has_room
from reference_backend.engine.config import ModelError
from reference_backend.engine.request import Load
from reference_backend.link import BEAT_SECONDS, Apart, Link, linked, spawned
from reference_backend.load_report import Reporter
from reference_backend.refusals import ApiError, bad
from reference_backend.repository import Card, Entry, Kind
from reference_backend.tensor_frames import (
    ERRORS,
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
    BadTensor,
    Failed,
    Lost,
    TensorModel,
    Tensors,
    TensorSpec,
    Terms,
    executor,
)

WEDGED_AFTER = 60.0  # seconds without an answer while there is something to do: then its process is given up


class Remote(Link[Opened]):
    """A model at the other end of a socket."""

    def __init__(self) -> None:
        super().__init__(decode_for_server)
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._answers: dict[int, asyncio.Future[Tensors]] = {}
        self._tickets = 0
        self._stuck_seconds = 0.0  # since it has answered, while there is something to do

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """As TensorModel says; raises Lost and Failed, too."""
        if self.lost.is_set():
            raise Lost
        self._tickets += 1
        ticket = self._tickets
        self.send(Infer(ticket, pack(inputs), terms))
        answer = self._answers[ticket] = self.loop.create_future()
        try:
            return await answer
        finally:
            if self._answers.pop(ticket, None) is not None:
                self.send(Cancel(ticket))

    def beat(self) -> None:
        """A model may hang in a thread while its process gives signs."""
        if self._stuck_seconds > WEDGED_AFTER:
            self.cut()
        self._stuck_seconds = self._stuck_seconds + BEAT_SECONDS if self._answers else 0.0
        super().beat()

    def take(self, message: object) -> None:
        if isinstance(message, Answer):
            self._deliver(message)
        elif isinstance(message, Opened):
            self.inputs, self.outputs = message.inputs, message.outputs
            self.opened.set_result(message)
        else:
            super().take(message)

    def _deliver(self, message: Answer) -> None:
        self._stuck_seconds = 0.0
        answer = self._answers.pop(message.ticket, None)
        if answer is None or answer.done():
            return  # given up while this was on its way
        if message.error:
            answer.set_exception(ERRORS[message.error](message.message))
        else:
            answer.set_result(unpack(message.outputs))

    def end(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Lost())
        self._answers.clear()


class Stateless(Apart[Remote]):
    """What the server asks for tensors. It stays the same while processes come and go."""

    # What a kind has beside its own: inputs and outputs by name, with datatype and number of dimensions.
    fixed_inputs: ClassVar[Mapping[str, tuple[str, int]]] = {}
    fixed_outputs: ClassVar[Mapping[str, tuple[str, int]]] = {}

    def __init__(self, entry: Entry, card: Card, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__()
        self.kind: Kind = card.kind
        self.card = card
        self.bound = card.max_batch + card.max_waiting  # requests, whatever each holds
        self.inputs: Sequence[TensorSpec] = ()  # known from the first life on
        self.outputs: Sequence[TensorSpec] = ()
        self.reporter = Reporter(self, wall)
        self._entry = entry
        self.clock = clock
        self.rejects = 0  # requests that there was no room for
        self._in_flight: dict[object, str] = {}  # whose each is
        self._model: TensorModel | None = None
        self._life = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        state = "away" if self._model is None else "ready"
        return f"<{type(self).__name__} {self._entry} {state}, {len(self._in_flight)} of {self.bound} in flight>"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """One life of it. Raises ModelError on entering."""
        async with self._life:
            try:
                await self.wake()
                yield
            finally:
                self._model = self.link = None

    async def sleep(self) -> None:
        """End its process: such a model is read again in no time."""
        self._model = self.link = None
        await self._life.aclose()

    async def wake(self) -> None:
        """Open it, in a process of its own or beside the server. Raises ModelError."""
        directory, card, enter = self._entry.directory, self.card, self._life.enter_async_context
        if card.isolation == "thread":
            model = await enter(executor(card.executor)(directory, card))
        else:
            connection = await enter(spawned("reference_backend.tensor_service"))
            model = self.link = await enter(linked(Remote, connection, Open(str(directory), card)))
        self._check_kind(model)
        self._model, self.inputs, self.outputs = model, model.inputs, model.outputs

    def _check_kind(self, model: TensorModel) -> None:
        for specs, fixed in ((model.inputs, self.fixed_inputs), (model.outputs, self.fixed_outputs)):
            there = {spec.name: (spec.datatype, len(spec.shape)) for spec in specs}
            for name, wanted in fixed.items():
                if there.get(name) != wanted:
                    raise ModelError(
                        f"{self._entry}: a model of the kind {self.kind!r} has {name!r} of {wanted[0]} in "
                        f"{wanted[1]} dimensions, but its executor gives {there.get(name, 'none')}"
                    )

    def load(self) -> Load:
        running = min(len(self._in_flight), self.card.max_batch)
        return Load(running, len(self._in_flight) - running, 0.0, slots=self.card.max_batch)

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW, param: str = "inputs") -> Tensors:
        """Run the model. Raises ApiError, which says that `param` is at fault where the model takes no such input."""
        check(inputs, self.inputs)
        if self._model is None:
            raise refusals.loading()
        if not has_room(terms.tenant, self._in_flight.values(), self.bound):
            self.rejects += 1
            raise refusals.queue_full()
        began, request = self.clock(), object()
        self._in_flight[request] = terms.tenant
        self.change()
        try:
            async with asyncio.timeout(None if terms.deadline is None else terms.deadline - began) as limit:
                outputs = await self._model.infer(inputs, terms)
        except BadTensor as error:
            raise bad(str(error), param) from error
        except TimeoutError as error:
            if not limit.expired():
                raise  # the model's own
            raise ApiError(504, "deadline", "the deadline passed before there was an answer") from error
        except Lost as error:
            raise refusals.worker_lost() from error
        except Failed as error:
            raise refusals.engine_failed() from error
        finally:
            del self._in_flight[request]
            self.change()
        self.reporter.answered(self.clock() - began, self.clock() - began, 1)
        return outputs


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
        spec = wanted[name]
        if array.dtype != DTYPES[spec.datatype]:
            raise bad_tensor(name, f"must be of {spec.datatype}")
        if not spec.takes(array.shape):
            raise bad_tensor(name, f"has the shape {list(array.shape)}, which is not {list(spec.shape)} (-1: any)")


def bad_tensor(name: str, what: str) -> ApiError:
    return bad(f"input {name[: refusals.LONGEST_SHOWN]!r} {what}", "inputs")
