"""How much this process has to do: how late its event loop is, how much of its memory is in use; and what follows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from gateway.memory import Memory
from gateway.pipeline import Pipeline
from observability import events
from policies.overload import Overload

LAG_PERIOD_SECONDS = 0.5
REMEMBERED_SECONDS = 10.0


class Pressure:
    """What `watch` measures for as long as it runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.overload = Overload()
        self.memory = Memory()
        self._clock = clock
        self._lags: deque[float] = deque([0.0], maxlen=int(REMEMBERED_SECONDS / LAG_PERIOD_SECONDS))

    @property
    def lag(self) -> float:
        """By how many seconds the event loop was late, at worst, not long ago."""
        return max(self._lags)

    async def watch(self, pipeline: Pipeline, observe: events.Observer) -> NoReturn:
        """Let the pipeline take on less where it is too much."""
        overload = self.overload
        while True:
            before = self._clock()
            await asyncio.sleep(LAG_PERIOD_SECONDS)
            now = self._clock()
            lag = max(0.0, now - before - LAG_PERIOD_SECONDS)
            self._lags.append(lag)
            if overload.note(now, lag, self.memory.share()):
                pipeline.keeps_connections = overload.keeps_connections
                pipeline.takes_requests = overload.takes_requests
                observe(events.OverloadChanged(overload.state, overload.reason))
