import asyncio

import pytest

from gateway.wakeup import Wakeup
from tests.support.virtual_clock import virtual_time


class Waiting:
    """A task that waits for a wakeup, and has gone so far."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.wakeup = Wakeup(self.loop)
        self.did: list[str] = []
        self.task = self.loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.wakeup
            self.did.append("went on")
        except asyncio.CancelledError:
            self.did.append("cancelled")
            raise


@virtual_time
async def test_a_callback_of_the_loop_finds_the_task_one_step_on_when_set_returns() -> None:
    waiting, seen = Waiting(), []

    def callback() -> None:
        waiting.wakeup.set()
        seen.extend(waiting.did)

    waiting.loop.call_later(1.0, callback)
    await waiting.task
    assert seen == ["went on"]


@virtual_time
async def test_from_within_a_task_it_goes_on_soon() -> None:
    waiting = Waiting()
    await asyncio.sleep(1)
    waiting.wakeup.set()
    assert waiting.did == []
    await waiting.task
    assert waiting.did == ["went on"]


@virtual_time
async def test_what_is_set_already_is_not_waited_for() -> None:
    wakeup = Wakeup(asyncio.get_running_loop())
    wakeup.set()
    wakeup.set()
    await wakeup
    assert wakeup.is_set


@pytest.mark.parametrize("waits", [False, True])
@virtual_time
async def test_a_failure_is_raised_to_who_waits(waits) -> None:
    loop = asyncio.get_running_loop()
    wakeup = Wakeup(loop)
    if waits:
        loop.call_later(1.0, wakeup.fail, ValueError("late"))
    else:
        wakeup.fail(ValueError("late"))
    with pytest.raises(ValueError, match="late"):
        await wakeup


@pytest.mark.parametrize("then_set", [False, True])
@virtual_time
async def test_a_task_that_waits_can_be_cancelled(then_set) -> None:
    waiting = Waiting()
    await asyncio.sleep(1)
    waiting.task.cancel()
    if then_set:
        waiting.wakeup.set()  # too late
    with pytest.raises(asyncio.CancelledError):
        await waiting.task
    assert waiting.did == ["cancelled"]


@virtual_time
async def test_a_task_that_was_woken_and_is_then_cancelled_hears_of_it_at_its_next_wait() -> None:
    waiting = Waiting()
    await asyncio.sleep(1)
    waiting.wakeup.set()
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task


@virtual_time
async def test_it_can_run_out_of_time() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await Wakeup(asyncio.get_running_loop())
    assert asyncio.get_running_loop().time() == 5.0
