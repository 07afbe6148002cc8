import asyncio

from reference_backend.changing import Changing, InFlight


async def test_a_change_can_be_waited_for():
    changing = Changing()
    waiting = asyncio.ensure_future(changing.wait_change(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    changing.change()
    await asyncio.wait_for(waiting, 5)
    await changing.wait_change(0)


async def test_in_flight_waits_for_the_last():
    in_flight = InFlight()
    await in_flight.wait_idle()
    with in_flight, in_flight:
        assert in_flight.count == 2
        idle = asyncio.ensure_future(in_flight.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await asyncio.wait_for(idle, 1)
