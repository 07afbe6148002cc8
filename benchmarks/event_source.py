"""A backend that streams: `python -m benchmarks.event_source INTERVAL EVENTS PORT...`

Each answer is `text/event-stream` in chunks: the first event at once, each next one INTERVAL seconds after the one
before by the clock and not by the one before's delay. Everything that is no POST is a health check and answered 200.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

import httptools
import uvloop

from benchmarks.payloads import event
from benchmarks.processes import HOST

HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Pace:
    interval: float
    events: int


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENT, LAST = chunk(event()), chunk(event(last=True))


class Source(asyncio.Protocol):
    """One connection: a stream for each POST, one after the other."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._transport.write(HEALTHY)
            return
        self._transport.write(HEAD)
        self._send(self._pace.events, self._loop.time())

    def _send(self, left: int, due: float) -> None:
        if left == 1:
            self._transport.write(LAST + END)
            return
        self._transport.write(EVENT)
        due += self._pace.interval
        self._timer = self._loop.call_at(due, self._send, left - 1, due)


async def serve(pace: Pace, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda: Source(pace), HOST, port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    interval, events, *ports = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Pace(float(interval), int(events)), [int(port) for port in ports]))
