import asyncio

from reference_backend.changing import Changing


async def test_a_change_can_be_waited_for():
    changing = Changing()
    waiting = asyncio.ensure_future(changing.wait_change(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    changing.change()
    await asyncio.wait_for(waiting, 5)
    await changing.wait_change(0)
