"""Lateness and memory in virtual time: what is measured, and what the pipeline hears of it."""

import asyncio
import contextlib
from types import SimpleNamespace

from gateway.pressure import Pressure
from observability.events import OverloadChanged
from tests.support.virtual_clock import virtual_time


class Watched:
    """A loop that is late by `late` each time it is looked at, and has `share` of its memory in use."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.late = self.share = self.lost = 0.0
        self.told: list[OverloadChanged] = []
        self.pipeline = SimpleNamespace(keeps_connections=True, takes_requests=True)
        self.pressure = Pressure(self.clock)
        self.pressure.memory = SimpleNamespace(share=lambda: self.share)

    def clock(self) -> float:
        self.lost += self.late
        return self.loop.time() + self.lost

    @contextlib.asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.pressure.watch(self.pipeline, self.told.append))
        yield self
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@virtual_time
async def test_a_loop_that_is_in_time_changes_nothing() -> None:
    async with Watched().running() as watched:
        await asyncio.sleep(60)
        assert watched.pressure.lag < 0.001
        assert (watched.pipeline.keeps_connections, watched.pipeline.takes_requests, watched.told) == (True, True, [])


@virtual_time
async def test_a_loop_that_is_late_for_long_takes_nothing_on_until_it_is_in_time_again() -> None:
    async with Watched().running() as watched:
        watched.late = 0.4
        await asyncio.sleep(2)
        assert 0.35 < watched.pressure.lag < 0.45
        assert watched.pipeline.takes_requests
        await asyncio.sleep(10)
        assert not watched.pipeline.takes_requests
        watched.late = 0.0
        await asyncio.sleep(60)
        assert watched.pipeline.takes_requests
        assert watched.pressure.lag < 0.001  # what was long ago is forgotten
    assert watched.told[-1].state == "normal"
    assert "shedding" in {event.state for event in watched.told}


@virtual_time
async def test_memory_that_is_nearly_full_counts_as_well() -> None:
    async with Watched().running() as watched:
        watched.share = 0.99
        await asyncio.sleep(10)
        assert not watched.pipeline.takes_requests
        assert watched.told[-1].reason == "memory"
