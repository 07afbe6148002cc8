"""Load streams over real sockets, from backends that push what each story has them push."""

import asyncio
import contextlib
import json
import ssl
from random import Random

import pytest

from gateway.upstream import load_stream as module
from gateway.upstream.load_stream import MAX_EVENT_BYTES, LoadStreams
from tests.support.running_gateway import until
from tests.support.scripted_backend import Hangup, ScriptedBackend
from tests.support.upstream import endpoint


def event(running: int, **fields) -> bytes:
    return b"data: %b\n\n" % json.dumps({"running": running, "waiting": 0, **fields}).encode()


@contextlib.asynccontextmanager
async def listening(*backends: ScriptedBackend):
    """Streams of these backends, what was heard (key, requests), and who was told to be silent."""
    heard, silent = [], []

    def hear(key, report) -> bool:
        heard.append((key, report.requests))
        return report.seq != 1

    streams = LoadStreams(hear, silent.append, ssl.create_default_context, Random(1))
    shown = {
        f"tiny/{number}": endpoint(f"tiny/{number}", port=backend.port, load_path="/load")
        for number, backend in enumerate(backends)
    }
    streams.update(shown)
    task = asyncio.create_task(streams.run())
    try:
        yield streams, heard, silent, shown
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_reports_are_heard_as_they_come() -> None:
    go = asyncio.Event()

    async def push(connection) -> None:
        await connection.begin_events()
        await connection.chunk(event(1))
        await go.wait()
        await connection.chunk(b": nothing\n\n" + event(2)[:9])
        await connection.chunk(event(2)[9:])
        await connection.wait_closed()

    async with ScriptedBackend(push) as backend, listening(backend) as (streams, heard, _, _):
        await until(lambda: heard == [("tiny/0", 1.0)])
        assert streams.connected == 1
        go.set()
        await until(lambda: heard[-1] == ("tiny/0", 2.0))
        assert (streams.counts["taken"], streams.counts["nonsense"]) == (2, 0)
        assert backend.heads[0].startswith(b"GET /load HTTP/1.1\r\n")
        assert b"host: 127.0.0.1:%d\r\n" % backend.port in backend.heads[0].lower()
    assert not backend.failures


@pytest.mark.parametrize(
    "nonsense",
    [
        b"data: junk\n\n",
        b"data: []\n\n",
        b"event: report\n\n",
        event(-1),
        event(10**9),
        event(1, seq=-1),
        b"data: " + b"[" * 4000 + b"\n\n",
        b"data: {" + b" " * MAX_EVENT_BYTES + event(1)[7:],
        b"\xff\xfe\n\n",
    ],
)
async def test_nonsense_is_counted_and_nothing_comes_of_it(nonsense) -> None:
    go = asyncio.Event()

    async def push(connection) -> None:
        await connection.begin_events()
        await connection.chunk(nonsense)
        await go.wait()
        await connection.chunk(event(3))
        await connection.wait_closed()

    async with ScriptedBackend(push) as backend, listening(backend) as (streams, heard, _, _):
        await until(lambda: streams.counts["nonsense"] == 1)
        go.set()
        await until(lambda: heard == [("tiny/0", 3.0)])
        assert streams.connected == 1


async def test_old_news_is_counted() -> None:
    async def push(connection) -> None:
        await connection.begin_events()
        await connection.chunk(event(1, seq=1))
        await connection.wait_closed()

    async with ScriptedBackend(push) as backend, listening(backend) as (streams, _, _, _):
        await until(lambda: streams.counts["old"] == 1)


async def not_there(connection) -> None:
    await connection.json({}, 404)


async def no_events(connection) -> None:
    await connection.json({"running": 1, "waiting": 1})


async def elsewhere(connection) -> None:
    await connection.json({}, 307, "location: /other")


async def endless_event(connection) -> None:
    await connection.begin_events()
    with contextlib.suppress(ConnectionError):
        while True:
            await connection.chunk(b"x" * 1000)


async def no_http(connection) -> None:
    await connection.send(b"\x00\x01\x02 junk\r\n\r\n")
    raise Hangup


async def broken(connection) -> None:
    await connection.begin_events()
    connection.reset()
    raise Hangup


async def ended(connection) -> None:
    await connection.begin_events()
    await connection.send(b"0\r\n\r\n")


@pytest.mark.parametrize("wrong", [not_there, no_events, elsewhere, endless_event, no_http, broken, ended])
async def test_what_is_no_stream_is_left_and_tried_again_later(wrong, monkeypatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.01)

    async def well(connection) -> None:
        await connection.begin_events()
        await connection.chunk(event(4))
        await connection.wait_closed()

    async with ScriptedBackend(wrong) as backend, listening(backend) as (streams, heard, silent, _):
        await until(lambda: len(silent) >= 2)
        assert heard == []
        assert all(b"GET /load " in head for head in backend.heads)
        backend.script = well
        await until(lambda: heard == [("tiny/0", 4.0)])
        assert streams.connected == 1


async def test_silence_is_told_and_ends_the_connection_when_it_lasts(monkeypatch) -> None:
    monkeypatch.setattr(module, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(module, "FIRST_DELAY", 0.01)

    async def push(connection) -> None:
        await connection.begin_events()
        await connection.chunk(event(1))
        await connection.wait_closed()

    async with ScriptedBackend(push) as backend, listening(backend) as (_, heard, silent, _):
        await until(lambda: silent and len(heard) == 1)
        await until(lambda: len(heard) == 2)  # on another connection
        assert backend.connections == 2


async def test_a_flood_costs_a_look_now_and_then() -> None:
    async def push(connection) -> None:
        await connection.begin_events()
        with contextlib.suppress(ConnectionError):
            while True:
                await connection.chunk(event(1) * 100)

    loop = asyncio.get_running_loop()
    async with ScriptedBackend(push) as backend, listening(backend) as (_, heard, _, _):
        began = loop.time()
        await until(lambda: len(heard) >= 10)
        assert len(heard) <= (loop.time() - began) / module.APART_SECONDS + 2


async def test_a_backend_that_goes_is_left_and_another_is_heard() -> None:
    async def push(connection) -> None:
        await connection.begin_events()
        await connection.chunk(event(int(connection.header("host")[-1])))
        await connection.wait_closed()

    async with ScriptedBackend(push) as first, ScriptedBackend(push) as second:
        async with listening(first, second) as (streams, heard, _, shown):
            await until(lambda: len(heard) == 2)
            gone = {"tiny/1": shown["tiny/1"], "tiny/2": endpoint("tiny/2", port=first.port)}  # one that pushes nothing
            streams.update(gone)
            await until(lambda: streams.connected == 1 and first.open == 0)
            assert second.connections == 1
            streams.update({"tiny/1": endpoint("tiny/1", port=second.port, load_path="/load", draining=True)})
            await until(lambda: streams.connected == 0)
            assert repr(streams) == "<LoadStreams 0 of 0 connected, {'taken': 2, 'old': 0, 'nonsense': 0}>"


def test_only_so_many_are_listened_to() -> None:
    streams = LoadStreams(lambda key, report: True, print, ssl.create_default_context, Random(1))
    many = {f"tiny/{n}": endpoint(f"tiny/{n}", load_path="/load") for n in range(module.MOST_STREAMS + 5)}
    streams.update(many)
    assert repr(streams).startswith(f"<LoadStreams 0 of {module.MOST_STREAMS} ")
    assert module.APART_SECONDS * module.MOST_STREAMS / module.EACH_FULL_PACE < module.STALE_SECONDS
