"""In what order a gateway ends, in virtual time, before parts that only remember."""

import asyncio
from types import SimpleNamespace

import pytest

from gateway import drain as module
from gateway.drain import drain, wait_idle
from tests.support.virtual_clock import virtual_time


class Parts:
    """What is drained. One request is in flight, for so long."""

    def __init__(self, seconds: float, *, grpc: bool = False) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: list[tuple[str, float]] = []
        self.pipeline = SimpleNamespace(draining=False, inflight=1 if seconds else 0)
        self.listener = SimpleNamespace(close=self.note("listener.close"))
        close_idle, abort = self.note("server.close_idle"), self.note("server.abort")
        self.server = SimpleNamespace(connections={1}, close_idle=close_idle, abort=abort)
        self.forwarder = SimpleNamespace(relays=[SimpleNamespace(drain=self.note("relay.drain"))] if seconds else [])
        stop, end = self.note("grpc.stop_accepting"), self.note("grpc.drain")
        self.grpc = SimpleNamespace(stop_accepting=stop, drain=end) if grpc else None
        if seconds:
            self.loop.call_later(seconds, self.end)

    def note(self, what: str):
        return lambda: self.done.append((what, round(self.loop.time(), 2)))

    def end(self) -> None:
        self.pipeline.inflight = 0
        self.forwarder.relays = []

    async def drain(self) -> None:
        await drain(self.pipeline, self.forwarder, self.listener, self.server, self.grpc)


@virtual_time
async def test_what_has_nothing_to_do_ends_at_once() -> None:
    parts = Parts(0)
    await parts.drain()
    assert parts.pipeline.draining
    assert parts.done == [
        ("listener.close", 0), ("server.close_idle", 0), ("listener.close", 0), ("server.abort", 0),
    ]  # fmt: skip


@virtual_time
async def test_a_request_has_its_time_and_balancers_theirs() -> None:
    parts = Parts(20.0, grpc=True)
    await parts.drain()
    assert parts.done == [
        ("listener.close", 5), ("server.close_idle", 5), ("grpc.stop_accepting", 5),
        ("listener.close", 20), ("grpc.drain", 20), ("server.abort", 20),
    ]  # fmt: skip


@virtual_time
async def test_a_request_that_takes_too_long_is_told_and_then_cut() -> None:
    parts = Parts(1000.0)
    await parts.drain()
    late = module.ACCEPT_SECONDS + module.DRAIN_SECONDS
    assert parts.done[2:] == [("listener.close", late), ("relay.drain", late), ("server.abort", late + 1)]
    assert parts.loop.time() == pytest.approx(late + 2)


@virtual_time
async def test_a_second_signal_takes_the_time_away() -> None:
    parts = Parts(1000.0)
    draining = asyncio.create_task(parts.drain())
    await asyncio.sleep(2)
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    assert parts.done == [("listener.close", 2), ("relay.drain", 2), ("server.abort", 3)]


@pytest.mark.parametrize(("ends", "most", "took"), [(0.0, 5.0, 0.0), (1.0, 5.0, 1.0), (9.0, 5.0, 5.0)])
@virtual_time
async def test_nobody_is_waited_for_longer_than_it_was_said(ends, most, took) -> None:
    parts = Parts(ends)
    await wait_idle(parts.pipeline, most)
    assert parts.loop.time() == pytest.approx(took, abs=0.05)
