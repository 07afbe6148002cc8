"""One keep-alive connection to a backend, on httptools' response parser.

A connection carries one `Answer` at a time. It decides nothing: it feeds bytes to the parser and tells the answer what
came (head, body, end) or how it broke. It goes back to its pool only after a whole answer, with nothing left over.

The parser is llhttp in its strict mode; what it lets through is checked again in `answer.py`. A read that is one whole
chunk, as most events of a stream come, is not shown to it: it has nothing to find there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

if TYPE_CHECKING:
    from gateway.outbox import Outbox
    from gateway.upstream.pool import Pool

_CHUNK_HEADS: Final = [b"%x\r\n" % size for size in range(4096)]  # of an event, mostly; larger ones can be parsed

MAX_HEAD_BYTES = 64 * 1024  # of a head; and of what stands between and behind a body's pieces, such as trailers


class Answer(Protocol):
    """Who hears what a connection receives. Called synchronously; must not raise."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_chunk(self, chunk: bytes, at: int) -> None: ...
    def on_end(self) -> None: ...
    def on_flush(self) -> None: ...
    def on_broken(self, reason: str) -> None: ...
    def on_alarm(self) -> None: ...


class Connection:
    """An asyncio protocol: idle (answer is None) => busy (start) => idle (whole answer) or closed (anything else)."""

    __slots__ = (
        "_alarm", "_bodyless_bytes", "_ends_by_itself", "_headers", "_in_head", "_is_between_chunks", "_is_paused",
        "_keeps_alive", "_outbox", "_parser", "_rings_at", "answer", "got_bytes", "idle_since", "leftover", "pool",
        "reused", "transport", "whole",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, pool: Pool, outbox: Outbox) -> None:
        self.pool = pool
        self._outbox = outbox
        self._alarm: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self.answer: Answer | None = None
        self.reused = False  # has carried an answer before
        self.idle_since = 0.0
        self.got_bytes = False  # any byte of the current answer
        self.whole = False  # the current answer has ended as its framing says
        self.leftover = False  # what comes is not heard: it came after the end of the answer, or after too large a head
        self._in_head = True
        self._is_between_chunks = False
        self._bodyless_bytes = 0  # since the last piece of a body, or since the answer began
        self._headers: list[tuple[bytes, bytes]] = []
        self._ends_by_itself = False
        self._keeps_alive = False
        self._is_paused = False
        self._parser = httptools.HttpResponseParser(self)

    # What the gateway does

    def start(self, answer: Answer, head_and_body: bytes) -> None:
        """Send a request; from here on `answer` hears what comes."""
        self.answer = answer
        self.got_bytes = self.whole = self.leftover = False
        self._in_head, self._bodyless_bytes, self._headers = True, 0, []
        self._is_between_chunks = False
        self._outbox.write(self.transport, head_and_body)

    def finish(self, now: float) -> None:
        """The answer is over: back to the pool if it was whole and nothing is left over, else close."""
        self.answer = None
        if self._is_fit_for_another():
            self.resume()  # its answer's client may have been slow to the end
            self.reused = True
            self.idle_since = now
            self.pool.put_back(self)
        else:
            self.close()

    def _is_fit_for_another(self) -> bool:
        """The answer was whole, nothing came behind it, and the backend has been sent all of the request."""
        return (
            self.whole
            and not self.leftover
            and self._keeps_alive
            and not self.transport.is_closing()
            and not self.transport.get_write_buffer_size()
        )

    def close(self) -> None:
        """Drop the connection at once: the backend sees that nobody listens any more."""
        self.answer = None
        self.transport.abort()

    def wake_in(self, seconds: float, now: float) -> None:
        """Call the answer's `on_alarm` then, or sooner. `now` is a reading of the answers' clock.

        The alarm belongs to the connection and outlives an answer: one that was set for an earlier answer rings for
        the present one, which finds that it is not time and sets the next. So most requests set no timer at all.
        """
        if self._alarm is not None:
            if self._rings_at <= now + seconds:
                return
            self._alarm.cancel()
        self._rings_at = now + seconds
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self.answer is not None:
            self.answer.on_alarm()

    def pause(self) -> None:
        if not self._is_paused and not self.transport.is_closing():
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and not self.transport.is_closing():
            self._is_paused = False
            self.transport.resume_reading()

    # What the transport does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if answer is None:  # nobody asked: whatever it is, it must not reach the next request
            self.close()
            return
        if self._is_between_chunks and not (self.whole or self.leftover):
            at = _begin_of_chunk(data)
            if at > 0:
                self._bodyless_bytes = 0
                answer.on_chunk(data, at)
                return
        self.got_bytes = True
        self._bodyless_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of ours: the event loop logs it and closes the connection
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._unreadable(answer)
            return
        if (self._bodyless_bytes > MAX_HEAD_BYTES or self.leftover) and not self.whole:
            self.leftover = True
            answer.on_broken("upstream_protocol")
            return
        if self._is_between_chunks and not data.endswith(b"\r\n"):
            self._is_between_chunks = False  # within the line that begins the next one
        answer.on_flush()

    def _unreadable(self, answer: Answer) -> None:
        self.leftover = True
        if self.whole:  # the answer itself was fine, junk came behind it
            answer.on_flush()
        else:
            answer.on_broken("upstream_protocol")

    def pause_writing(self) -> None:
        """The backend takes its request slowly. There is nothing to hold back: all of it has been written."""

    def resume_writing(self) -> None:
        """It has taken most of it."""

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()  # it would keep all of this until it rings
            self._alarm = None
        answer, self.answer = self.answer, None
        if answer is None:
            self.pool.forget(self)
        elif not self.whole:
            answer.on_broken("eof" if exc is None else "upstream_reset")

    # What the parser finds

    def on_message_begin(self) -> None:
        if self.whole:
            self.leftover = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # after it they are trailers, which end here
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.answer is None or self.whole:
            return
        headers, self._headers = self._headers, []
        if self._bodyless_bytes > MAX_HEAD_BYTES and _size_of(headers) > MAX_HEAD_BYTES:
            self.leftover = True  # the answer hears of it when this read has been parsed
            return
        self._in_head = False
        status = self._parser.get_status_code()
        # Behind 1xx the answer proper is to come; where a status allows no body, some backends send one all the same.
        self._ends_by_itself = status >= 200 and status not in (204, 304)
        self.answer.on_head(status, headers)

    def on_body(self, data: bytes) -> None:
        self._bodyless_bytes = 0
        if self.answer is not None and not self.leftover:
            self.answer.on_body(data)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        if self.answer is not None and not self.leftover:
            self.whole = True
            self._keeps_alive = self._ends_by_itself and self._parser.should_keep_alive()  # llhttp knows it only now
            self.answer.on_end()


def _begin_of_chunk(data: bytes) -> int:
    """Where the content begins of a read that is one whole chunk, framed as we would; 0 for any other."""
    at = data.find(b"\r\n", 0, 5) + 2
    size = len(data) - at - 2
    return at if 0 < size < 4096 and data.startswith(_CHUNK_HEADS[size]) and data.endswith(b"\r\n") else 0


def _size_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum([len(name) + len(value) + 4 for name, value in headers])
