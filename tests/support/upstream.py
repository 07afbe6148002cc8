"""The two ends of an upstream connection without a network: a transport that only remembers, and who hears an answer."""

import asyncio

from discovery.endpoint import Endpoint, Model
from gateway.upstream.connection import Connection
from gateway.upstream.endpoint import Backend
from tests.support.outbox import immediate


class MemoryTransport(asyncio.Transport):
    """Remembers what was written. `fill()` is a peer that takes nothing; closing is told at once, as `abort` is."""

    def __init__(self, protocol: asyncio.BaseProtocol, peer: tuple[str, int] = ("127.0.0.1", 50000)) -> None:
        super().__init__({"peername": peer})
        self.protocol = protocol
        self.written = b""
        self.unsent = 0
        self.is_reading_paused = False
        self.closed = ""  # how: close | abort
        self.half_closes = False  # whether it can be told that nothing more comes; TLS cannot
        self.is_half_closed = False
        protocol.connection_made(self)

    def write(self, data) -> None:
        assert not self.closed, "written to after its end"
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        self.limits = (low, high)

    def is_closing(self) -> bool:
        return bool(self.closed)

    def can_write_eof(self) -> bool:
        return self.half_closes

    def write_eof(self) -> None:
        self.is_half_closed = True

    def pause_reading(self) -> None:
        self.is_reading_paused = True

    def resume_reading(self) -> None:
        self.is_reading_paused = False

    def close(self) -> None:
        self._end("close")

    def abort(self) -> None:
        self._end("abort")

    def _end(self, how: str) -> None:
        if not self.closed:
            self.closed = how

    def lose(self, error: Exception | None = None) -> None:
        """The connection is gone: the protocol hears of it."""
        self.closed = self.closed or "peer"
        self.protocol.connection_lost(error)


def endpoint(key: str = "tiny/a", **fields) -> Endpoint:
    service, _, name = key.partition("/")
    told = {
        "scheme": "http",
        "host": "127.0.0.1",
        "port": 9000,
        "address": "127.0.0.1",
        "models": (Model("tiny", "1"),),
    }
    return Endpoint(key, service, name, **(told | fields))


class Listener:
    """An `Answer` that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.headers: list[tuple[bytes, bytes]] = []

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers += headers
        self.heard.append(status)

    def on_body(self, data: bytes) -> None:
        self.heard.append(data)

    def on_chunk(self, chunk: bytes, at: int) -> None:
        self.heard += [chunk[at:-2], "flush"]

    def on_end(self) -> None:
        self.heard.append("end")

    def on_flush(self) -> None:
        self.heard.append("flush")

    def on_broken(self, reason: str) -> None:
        self.heard.append(reason)

    def on_alarm(self) -> None:
        self.heard.append("alarm")


def connected(pool) -> Connection:
    connection = Connection(pool, immediate())
    MemoryTransport(connection)
    return connection


REFUSED, HANGS, SILENT, CLOSED = "refused", "hangs", "silent", "closed"  # what a backend can do besides answering


class AnsweringTransport(MemoryTransport):
    """Answers each request with the next of `answers`; the last one stays."""

    def __init__(self, protocol, answers) -> None:
        super().__init__(protocol)
        self.answers = answers

    def write(self, data) -> None:
        super().write(data)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        loop = asyncio.get_running_loop()
        if answer == CLOSED:
            loop.call_soon(self.lose)
        elif answer != SILENT:
            loop.call_soon(self.protocol.data_received, answer)


def script(backend: Backend, answers: list, transports: list[MemoryTransport]) -> None:
    """From now on connections to a backend answer request after request so; `transports` gets each one made."""

    async def connect() -> Connection:
        if answers[0] == HANGS:
            await asyncio.sleep(10_000)
        await asyncio.sleep(0)
        if answers[0] == REFUSED:
            raise ConnectionRefusedError
        connection = Connection(backend.pool, immediate())
        transports.append(AnsweringTransport(connection, answers))
        return connection

    backend.pool.connect = connect
