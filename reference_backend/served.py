"""One version of a model in service: its state, from loading to gone.

    LOADING => READY      it is loaded or woken, has run once, and is registered
    LOADING => FAILED     it cannot be loaded; `failure` says why. The first time that is its end, as a bug is any time
    READY => LOADING      its process is gone: what was in flight has been told so, the registration is withdrawn, and
                          another process is started, at once and then after delays that double until one has
                          lived for a while: what crashes each of them must not keep a machine busy
    READY => ASLEEP       nobody asked for so long, or others need room, which it makes; its registration stays
    ASLEEP => LOADING     somebody asked
    READY => DRAINING     told to end: the registration says so, new requests are still taken while that gets around
    DRAINING => CLOSED    new requests are refused, old ones end, the rest is aborted
    LOADING, ASLEEP => CLOSED   told to end while it takes nothing: at once

Whoever uses it counts as in flight by a `with`, to the last byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeVar

from discovery.announce import Announcement
from discovery.endpoint import InvalidRegistration
from reference_backend import refusals
from reference_backend.changing import InFlight
from reference_backend.engine.config import ModelError
from reference_backend.load_report import Reporter
from reference_backend.refusals import ApiError
from reference_backend.repository import Entry, Kind

ACCEPT_WHILE_DRAINING = 0.5  # seconds: about twice what a watcher needs to hear of it
FINISH_WITHIN = 60.0  # seconds for what is in flight
FIRST_RESTART, LAST_RESTART = 0.1, 10.0  # seconds before a lost process is replaced; doubled each time in between
LIVED_WELL = 60.0  # seconds: what comes after is another trouble
log = logging.getLogger(__name__)


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    ASLEEP = "asleep"
    FAILED = "failed"
    DRAINING = "draining"
    CLOSED = "closed"

    @property
    def is_useful(self) -> bool:
        """Whether requests should be sent: to one that sleeps, too, or it would never wake."""
        return self in (State.READY, State.ASLEEP)


class Model(Protocol):
    """A model of any kind, as far as loading and ending it goes."""

    kind: Kind
    bound: int  # requests that it takes at a time
    reporter: Reporter

    @property
    def is_alive(self) -> bool:
        """Whether its process, if it has one, has given a sign of late."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """One life of it, from when it has run once. Raises ModelError on entering. May be entered again."""
        ...

    async def sleep(self) -> None:
        """Make room for others. Raises ModelError when this life is over."""
        ...

    async def wake(self) -> None:
        """Be as before `sleep`, and have run once. Raises ModelError when that cannot be."""
        ...

    async def wait_lost(self) -> None:
        """Until this life is over by itself."""
        ...


M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Service:
    """What is the same for all versions that a process serves."""

    make: Callable[[Entry], Model]  # reads what of it the server needs itself, which takes a while. Raises ModelError
    announce: Callable[[Entry, str, Model], AbstractAsyncContextManager[Announcement | None]]
    """Registers it under an id. Raises InvalidRegistration on entering."""
    sleep_after: float | None = None  # seconds
    most_awake: int | None = None  # versions; of more, the one used least recently sleeps
    grace: float = ACCEPT_WHILE_DRAINING
    finish_within: float = FINISH_WITHIN
    uses: Iterator[int] = field(default_factory=itertools.count)  # numbers uses, so that the least recent one is known


class Served:
    """See above. `run` is its life."""

    def __init__(self, entry: Entry, service: Service, changed: Callable[[], None] = lambda: None) -> None:
        self.entry = entry
        self._state = State.LOADING
        self._changed = changed  # called after each change of the state
        self.failure: ModelError | InvalidRegistration | None = None
        self.in_flight = InFlight()
        self.model: Model | None = None
        self.used = 0  # the number of its last use
        self._left_at = 0.0  # when the last one ended, on the loop's clock
        self._service = service
        self._id = secrets.token_hex(6)
        self._ending = asyncio.Event()
        self._wanted = asyncio.Event()
        self._surplus = asyncio.Event()
        self._settled = asyncio.Event()
        self._life: asyncio.Task[object] | None = None

    def __repr__(self) -> str:
        return f"<Served {self.entry} {self.state.value}, {self.in_flight.count} in flight>"

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self._changed()

    @property
    def is_alive(self) -> bool:
        return self.model is None or self.model.is_alive

    @property
    def reason(self) -> str:
        """Why it is not ready, where something went wrong."""
        return str(self.failure) if self.failure is not None else ""

    @contextlib.contextmanager
    def use(self, kind: type[M]) -> Iterator[M]:
        """Have it for one request. Raises ApiError: 503 where it is not ready, 400 where it is of another kind."""
        if self.state is State.CLOSED:
            raise refusals.draining()
        if self.state is State.FAILED:
            message = f"model {self.entry} could not be loaded; the index of the repository says why"
            raise refusals.not_started(503, "unavailable", message)
        if self.state not in (State.READY, State.DRAINING) or self.model is None:
            self._wanted.set()
            raise refusals.loading()
        if not isinstance(self.model, kind):
            message = f"model {self.entry} is of the kind {self.model.kind!r}, which this path is not for"
            raise ApiError(400, "wrong_kind", message, param="model")
        self.used = next(self._service.uses)
        self._surplus.clear()
        try:
            with self.in_flight:
                yield self.model
        finally:
            self._left_at = asyncio.get_running_loop().time()

    async def wait_settled(self) -> None:
        """Until it is known whether it can be served."""
        await self._settled.wait()

    def rest(self) -> None:
        """Have it sleep, if nobody uses it just now."""
        if not self.in_flight.count:
            self._surplus.set()

    def end(self) -> None:
        """Have it drain and go; `run` ends then."""
        self._ending.set()
        if self.state is State.LOADING and self._life is not None:
            self._life.cancel()

    async def run(self) -> None:
        """From loading to gone."""
        self._life = asyncio.current_task()
        try:
            if not self._ending.is_set():
                self.model = await asyncio.to_thread(self._service.make, self.entry)
                await self._live(self.model)
            self.state = State.CLOSED
        except (ModelError, InvalidRegistration) as error:
            self.state, self.failure = State.FAILED, error
        except Exception as error:  # a bug, ours or an executor's: it costs this version, not the others
            log.exception("%s failed", self.entry)
            self.state, self.failure = State.FAILED, ModelError(f"{self.entry}: internal error: {error!r}")
        except asyncio.CancelledError:
            if not self._ending.is_set():
                raise
            self.state = State.CLOSED
        finally:
            self._settled.set()

    async def _live(self, model: Model) -> None:
        """One life after another, until told to end. Raises ModelError, InvalidRegistration in the first."""
        delay, clock = 0.0, asyncio.get_running_loop().time
        while not self._ending.is_set():
            began = clock()
            try:
                async with model.running():
                    await self._serve(model)
            except ModelError as error:
                if not self._settled.is_set():
                    raise
                self.state, self.failure = State.LOADING, error
                log.error("%s cannot be started: %s", self.entry, error)  # noqa: TRY400  the message says it all
            if self.state is State.LOADING:
                delay = min(2 * delay if clock() - began < LIVED_WELL else 0.0, LAST_RESTART) or FIRST_RESTART
                log.error("the process of %s is gone; another one is started in %.1f s", self.entry, delay)
                await first_of(self._ending.wait(), asyncio.sleep(delay))

    async def _serve(self, model: Model) -> None:
        """READY => LOADING, or until told to end, and then DRAINING; it may sleep in between.

        Raises ModelError, InvalidRegistration.
        """
        self._be_ready()  # before anybody hears of it
        async with self._service.announce(self.entry, self._id, model) as announcement:
            self._settled.set()
            while True:
                await first_of(self._ending.wait(), model.wait_lost(), self._fall_asleep())
                if self.state is not State.ASLEEP:
                    break
                await model.sleep()
                await first_of(self._ending.wait(), model.wait_lost(), self._wanted.wait())
                if self._ending.is_set():
                    return
                self.state = State.LOADING
                await model.wake()
                self._be_ready()
            if self._ending.is_set():
                await self._drain(model, announcement)
            else:
                self.state = State.LOADING

    def _be_ready(self) -> None:
        self.used = next(self._service.uses)
        self.state, self.failure = State.READY, None
        log.info("%s is ready", self.entry)

    async def _fall_asleep(self) -> None:
        """READY => ASLEEP. In one step with seeing that nobody is there, so that nobody comes in between.

        It looks when it is told to rest or the time is up, and not at each request: most take less than that would.
        """
        clock, seconds = asyncio.get_running_loop().time, self._service.sleep_after
        self._left_at = clock()
        while True:
            await self.in_flight.wait_idle()
            unused = clock() - self._left_at
            is_time = self._surplus.is_set() or (seconds is not None and unused >= seconds)
            if is_time and not self.in_flight.count:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if seconds is None else seconds - unused):
                    await self._surplus.wait()
        self._surplus.clear()
        self._wanted.clear()
        self.state = State.ASLEEP

    async def _drain(self, model: Model, announcement: Announcement | None) -> None:
        """READY => DRAINING => CLOSED. What is not over by then is aborted by whoever ends the model's life."""
        if announcement is not None:
            await announcement.drain()  # first: who watches etcd learns it before whoever asks for its health
        self.state, model.reporter.draining = State.DRAINING, True
        await asyncio.sleep(self._service.grace)
        self.state = State.CLOSED
        await first_of(self.in_flight.wait_idle(), asyncio.sleep(self._service.finish_within))


async def first_of(*acts: Coroutine[object, object, object]) -> None:
    """Wait for one of them; the others are cancelled. Raises what it raises."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
