"""The client of streams before the source of streams, on real sockets of loopback."""

import asyncio
import contextlib
import time

import pytest

from benchmarks.event_source import Pace, Source, chunk
from benchmarks.payloads import PATH, chat_request, event
from benchmarks.processes import HOST
from benchmarks.streams import Parked, Seen, Stream, Task, loop_streams

BODY = chat_request(stream=True)
REQUEST = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY.decode()}"


@contextlib.asynccontextmanager
async def source(interval=0.001, events=5):
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Source(Pace(interval, events)), HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_every_event_of_every_stream_is_counted_once():
    async with source() as port:
        seen = await loop_streams(Task(port, REQUEST, streams=4, seconds=0.0))
    assert (seen.whole, seen.cut, seen.events) == (4, 0, 20)
    assert len(seen.firsts) == 4
    assert all(first > 0 for first in seen.firsts)
    assert all(gap >= 0 for gap in seen.gaps)


async def test_streams_follow_each_other_until_the_time_is_over():
    async with source() as port:
        seen = await loop_streams(Task(port, REQUEST, streams=1, seconds=1.2))
    assert seen.whole > 1
    assert seen.events == 5 * seen.whole


async def test_health_is_asked_for_with_get():
    async with source() as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


class Silent(asyncio.Transport):
    """Takes what is written and says nothing."""

    def write(self, data):
        pass

    def close(self):
        pass


ANSWER = b"HTTP/1.1 200 OK\r\n\r\n" + chunk(event()) * 3 + chunk(event(last=True)) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 100, len(ANSWER)])
def test_however_the_bytes_are_cut_the_same_events_are_seen(size):
    seen, ended = Seen(), []
    stream = Stream(Task(0, REQUEST, 1, 1.0), seen, ended.append)
    stream.connection_made(Silent())
    for start in range(0, len(ANSWER), size):
        stream.data_received(ANSWER[start : start + size])
    assert (seen.events, seen.whole, seen.cut, len(ended)) == (4, 1, 0, 1)


def test_a_stream_that_ends_early_is_cut():
    seen, ended = Seen(), []
    stream = Stream(Task(0, REQUEST, 1, 1.0), seen, ended.append)
    stream.connection_made(Silent())
    stream.data_received(ANSWER[:300])
    stream.connection_lost(None)
    assert (seen.whole, seen.cut, ended) == (0, 1, [stream])


def test_a_stream_without_its_last_chunk_is_not_whole():
    seen = Seen()
    stream = Stream(Task(0, REQUEST, 1, 1.0), seen, lambda _: None)
    stream.connection_made(Silent())
    stream.data_received(ANSWER.removesuffix(b"0\r\n\r\n"))
    stream.connection_lost(None)
    assert (seen.whole, seen.cut) == (0, 1)


def test_a_parked_connection_has_begun_with_its_answer_and_is_cut_when_it_ends():
    seen = Seen()
    parked = Parked(Task(0, REQUEST, 1, 1.0), seen, lambda _: None)
    parked.connection_made(Silent())
    assert not parked.has_begun
    parked.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert (parked.has_begun, seen.cut) == (True, 0)
    parked.connection_lost(None)
    assert seen.cut == 1


async def test_events_keep_to_the_clock_and_not_to_each_others_delay():
    async with source(interval=0.02, events=6) as port:
        started = time.perf_counter()
        seen = await loop_streams(Task(port, REQUEST, streams=1, seconds=0.0))
    assert seen.events == 6
    assert time.perf_counter() - started >= 5 * 0.02
