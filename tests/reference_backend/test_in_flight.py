"""A count that can be waited for."""

import asyncio

from reference_backend.in_flight import InFlight


async def test_in_flight_waits_for_the_last():
    in_flight = InFlight()
    await in_flight.wait_idle()
    with in_flight, in_flight:
        assert in_flight.count == 2
        idle = asyncio.ensure_future(in_flight.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await asyncio.wait_for(idle, 1)
