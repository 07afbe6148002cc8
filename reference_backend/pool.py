"""All versions that a process serves: which they are, which one a request means, loading and unloading them.

Loading a model starts its wanted versions anew beside those in service; each takes the place of the old one when it is
ready, and only then is the old one told to drain. What cannot be loaded leaves what is there alone. Loads of one model
at the same time are one load.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

from reference_backend import refusals
from reference_backend.changing import Changing
from reference_backend.refusals import LONGEST_SHOWN, ApiError
from reference_backend.repository import Entry, split_id
from reference_backend.served import Served, Service, State

# Which of several versions a bare name means: one that can answer, and of those the newest.
_PREFERENCE = (State.FAILED, State.CLOSED, State.DRAINING, State.LOADING, State.ASLEEP, State.READY)


class Pool(Changing):
    """`running` is its life; at its end all drain. `find_wanted` gives what to serve of a model, `known` all."""

    def __init__(
        self, service: Service, find_wanted: Callable[[str], Sequence[Entry]], known: Callable[[], Sequence[Entry]]
    ) -> None:
        super().__init__()
        self.is_started = self.is_ending = False
        self.known = known
        self._service = service
        self._find_wanted = find_wanted
        self._served: dict[Entry, Served] = {}
        self._loads: dict[str, asyncio.Task[list[Served]]] = {}
        self._tasks: asyncio.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Pool {list(self._served.values())}>"

    def __iter__(self) -> Iterator[Served]:
        """Every version, by name and number."""
        return iter(sorted(self._served.values(), key=lambda each: (each.entry.name, int(each.entry.version or 0))))

    @property
    def is_closed(self) -> bool:
        """Whether all that it takes still is what it has taken."""
        return self.is_ending and all(served.state is State.CLOSED for served in self)

    @property
    def state(self) -> State:
        """READY when every version is (one that sleeps is woken by whoever asks), else the state of one that is not.

        LOADING until all that is wanted from the start has been: nothing is no version that is not ready.
        """
        if self.is_closed:
            return State.CLOSED
        if not (self.is_started or self.is_ending):
            return State.LOADING
        states = [served.state for served in self if not served.state.is_useful]
        return states[0] if states else State.READY

    def find(self, model: str, version: str | None = None, place: tuple[str, str] | None = None) -> Served:
        """The version that `name` or `name@version` means; `version` says it beside. Raises ApiError 404, 503.

        `place` is the name and the version that alone can be meant where the request was sent to.
        """
        name, own = split_id(model)
        version = version or own or (place and place[1])
        found = [
            served
            for served in self._served.values()
            if served.entry.name == name and version in (None, served.entry.version) and own in (None, version)
        ]
        if not found and self.is_ending:
            raise refusals.draining()
        if not found:
            known = ", ".join(repr(str(served.entry)) for served in self) or "none"
            asked = model if own is not None or version is None else f"{model}@{version}"
            message = f"model {asked[:LONGEST_SHOWN]!r} is not served here; {known} is"
            raise ApiError(404, "model_not_found", message, param="model")
        meant = max(found, key=lambda served: (_PREFERENCE.index(served.state), int(served.entry.version or 0)))
        if place not in (None, (meant.entry.name, meant.entry.version)):
            message = f"model {str(meant.entry)!r} is not served at this path"
            raise ApiError(404, "model_not_found", message, param="model")
        return meant

    def _change(self) -> None:
        self.change()
        if self._service.most_awake is not None and not self.is_ending:
            for served in surplus(self._served.values(), self._service.most_awake):
                served.rest()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Between entering and leaving, models can be loaded. Leaving waits until all are gone."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                yield
            finally:
                self.is_ending = True
                self._change()
                for served in self:
                    served.end()

    async def start(self, names: Iterable[str]) -> list[Served]:
        """Load what is to be served from the start, one model after another. Raises ApiError as `load` does."""
        served = [each for name in names for each in await self.load(name)]
        self.is_started = True
        self._change()
        return served

    async def load(self, name: str) -> list[Served]:
        """Load a model's wanted versions, or load them anew. Gives those that are served then, or cannot be.

        Whoever stops waiting does not stop it. Raises ApiError: 404 when there is no such model, 503 at the end.
        """
        if self.is_ending or self._tasks is None:
            raise refusals.draining()
        if name not in self._loads:
            entries = self._find_wanted(name)
            if not entries:
                message = f"there is no model {name[:LONGEST_SHOWN]!r} in a wanted version in the repository"
                raise ApiError(404, "model_not_found", message, param="model")
            task = self._loads[name] = self._tasks.create_task(self._load(name, entries))
            task.add_done_callback(lambda _: self._loads.pop(name))
        return await asyncio.shield(self._loads[name])

    async def _load(self, name: str, entries: Sequence[Entry]) -> list[Served]:
        fresh = [Served(entry, self._service, self._change) for entry in entries]
        for served in fresh:
            self._served.setdefault(served.entry, served)
            self._change()
            if self._tasks is not None:
                self._tasks.create_task(self._run(served))
        for served in fresh:
            await served.wait_settled()
            old = self._served.get(served.entry)
            if served.state is State.READY and old is not served:
                self._served[served.entry] = served
                self._change()
                if old is not None:
                    old.end()
        for served in list(self):
            if served.entry.name == name and served.entry not in entries:
                served.end()
        if self.is_ending:  # the end came while they were loaded
            for served in fresh:
                served.end()
        return fresh

    def unload(self, name: str) -> None:
        """Have all versions of a model drain and go. Raises ApiError 404 when there is none."""
        found = [served for served in self if served.entry.name == name]
        if not found:
            raise ApiError(404, "model_not_found", f"model {name[:LONGEST_SHOWN]!r} is not loaded", param="model")
        for served in found:
            served.end()

    async def _run(self, served: Served) -> None:
        await served.run()
        if served.state is State.CLOSED and self._served.get(served.entry) is served:
            del self._served[served.entry]
            self._change()


def surplus(served: Iterable[Served], most_awake: int) -> list[Served]:
    """Which are to sleep so that others have room: of those that nobody uses now, those used least recently."""
    awake = [each for each in served if each.state in (State.LOADING, State.READY, State.DRAINING)]
    idle = [each for each in awake if each.state is State.READY and not each.in_flight.count]
    return sorted(idle, key=lambda each: each.used)[: max(0, len(awake) - most_awake)]
