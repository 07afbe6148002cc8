"""The client of streams, a process of its own: `python -m benchmarks.streams MODE`, its task as JSON on stdin.

MODE `loop` keeps so many streams going for a while, each followed by the next on the same connection, and tells how
many events came, how long the first of each took, and the gaps between them. MODE `hold` opens streams and keeps them:
it writes a line when all have their first event, a second one when the time is over, and ends when stdin does. MODE
`park` does the same with connections that have had one answer each and ask for nothing more.

An event is counted by its `data:`. A stream is whole when its last chunk came after `[DONE]`; whatever else ends it
has cut it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import uvloop

from benchmarks.processes import HOST

MARK = b"data:"
DONE = b"[DONE]"
END = b"0\r\n\r\n"
TAIL = 32  # as much of the past as a mark or an ending may begin in
LATE_SECONDS = 5.0  # for streams under way when the time is over
RAMP_SECONDS = 1.0
OPEN_SECONDS = 30.0


class Task(msgspec.Struct, frozen=True):
    """What to do. `head` and `body` are the request as it is sent."""

    port: int
    request: str
    streams: int
    seconds: float


@dataclass(slots=True)
class Seen:
    """What came. `firsts` and `gaps` are seconds."""

    events: int = 0
    whole: int = 0
    cut: int = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One connection. `ended` is called with whether the stream is whole; it may send the next request."""

    def __init__(self, task: Task, seen: Seen, ended: Callable[[Stream], None]) -> None:
        self._request = task.request.encode()
        self._seen, self._ended = seen, ended
        self._tail = b""
        self._sent = self._heard = 0.0
        self._is_open = self._is_done = self.has_begun = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.send()

    def send(self) -> None:
        self._is_open, self._is_done, self.has_begun, self._tail = True, False, False, b""
        self._sent = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        tail, text = self._tail, self._tail + data
        marks, dones = (text.count(each) - tail.count(each) for each in (MARK, DONE))
        self._tail = text[-TAIL:]
        self._is_done = self._is_done or dones > 0
        self._seen.events += marks - dones
        if marks and (self.has_begun or self.begins(text)):
            self._time(now)
        if self._is_done and text.endswith(END):
            self._seen.whole += 1
            self._end()

    def begins(self, _: bytes) -> bool:
        """Whether an answer begins with these events."""
        return True

    def connection_lost(self, _: Exception | None) -> None:
        if self._is_open:
            self._seen.cut += 1
            self._end()

    def _time(self, now: float) -> None:
        if self.has_begun:
            self._seen.gaps.append(now - self._heard)
        else:
            self.has_begun = True
            self._seen.firsts.append(now - self._sent)
        self._heard = now

    def _end(self) -> None:
        self._is_open = False
        self._ended(self)


class Parked(Stream):
    """A connection that has begun with the first byte of its one answer, and is cut when it ends at all."""

    def data_received(self, _: bytes) -> None:
        self.has_begun = True


async def loop_streams(task: Task) -> Seen:
    """Keeps `streams` going for `seconds`, then lets those under way end."""
    loop = asyncio.get_running_loop()
    seen, over, left = Seen(), loop.time() + task.seconds, task.streams
    idle = asyncio.Event()
    connecting: set[asyncio.Task[None]] = set()

    def ended(stream: Stream) -> None:
        nonlocal left
        if loop.time() < over and not stream.transport.is_closing():
            stream.send()
            return
        if loop.time() < over:  # a server that closes after each answer: the next one needs a new connection
            connecting.add(task := loop.create_task(connect()))
            task.add_done_callback(connecting.discard)
            return
        stream.transport.close()
        left -= 1
        if not left:
            idle.set()

    async def connect() -> None:
        await loop.create_connection(lambda: Stream(task, seen, ended), HOST, task.port)

    for _ in range(task.streams):
        await connect()
        await asyncio.sleep(RAMP_SECONDS / task.streams)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(task.seconds + LATE_SECONDS):
            await idle.wait()
    return seen


async def hold(task: Task, kind: type[Stream]) -> None:
    """Opens them all, says so, waits, says so, and keeps them until stdin ends."""
    loop = asyncio.get_running_loop()
    seen = Seen()
    streams = []
    for _ in range(task.streams):
        _, stream = await loop.create_connection(lambda: kind(task, seen, lambda _: None), HOST, task.port)
        streams.append(stream)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(OPEN_SECONDS):
            while not all(stream.has_begun for stream in streams):
                await asyncio.sleep(0.05)
    before = seen.events
    _tell(open=sum(stream.has_begun for stream in streams), cut=seen.cut)
    await asyncio.sleep(task.seconds)
    _tell(events=seen.events - before, cut=seen.cut)
    await loop.run_in_executor(None, sys.stdin.read)


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    mode = sys.argv[1]
    task = msgspec.json.decode(sys.stdin.readline(), type=Task)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if mode in ("hold", "park"):
            runner.run(hold(task, Parked if mode == "park" else Stream))
            return
        seen = runner.run(loop_streams(task))
        _tell(events=seen.events, whole=seen.whole, cut=seen.cut, firsts=seen.firsts, gaps=seen.gaps)


if __name__ == "__main__":
    main()
