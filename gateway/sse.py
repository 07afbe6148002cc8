r"""Server-sent events, looked into only as far as needed: where an event ends, and the few that say something to us.

An event ends at an empty line; lines end with LF, CRLF or CR (WHATWG HTML, 9.2.6). Bytes are not changed, but for the
`load` that we asked the backend for. What has not ended is held back, so that a stream that breaks can be closed
between two events.
"""

from __future__ import annotations

import re

from gateway.usage import load_in, usage_of

MAX_EVENT_BYTES = 1024 * 1024

_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_FINISHED = re.compile(rb'"finish_reason" *: *"').search
_DATA = re.compile(rb"(?:^|[\r\n])data: ?([^\r\n]*)").findall

# What says so must stand at the beginning of a line, or as a key and not in a text: a model may write anything.
_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\]").search
_MESSAGE_STOP = re.compile(rb'(?:^|[\r\n])event: ?message_stop|"type" *: *"message_stop"').search
_TELLS_ERROR = re.compile(rb'(?:^|[\r\n])(?:event: ?error|data: ?\{"error")').search

# How a stream of each kind says that it is whole. A kind that is not here says it by its framing alone.
TERMINALS = {
    "/v1/chat/completions": b"[DONE]",
    "/v1/completions": b"[DONE]",
    "/v1/messages": b"message_stop",
}


class EventTooLarge(Exception):  # noqa: N818  a noun, as in policies/errors.py
    """An event grew past MAX_EVENT_BYTES."""


class Scanner:
    """Feed bytes, get back the bytes of whole events. `repr` tells what was seen."""

    __slots__ = (
        "_counts",
        "_held",
        "_held_bytes",
        "_last",
        "_tail",
        "_terminal",
        "errored",
        "events",
        "load",
        "terminated",
        "tokens_cached",
        "tokens_in",
        "tokens_out",
    )

    def __init__(self, path: str, *, counts: bool = False) -> None:
        self._counts = counts
        self._terminal = TERMINALS.get(path, b"")
        self._held: list[bytes] = []  # pieces of the event that has not ended
        self._held_bytes = 0
        self._tail = b""  # the last bytes of them
        self._last = (b"", b"")
        self.terminated = False  # the terminal event of this kind of stream has passed
        self.errored = False  # the backend reported an error inside the stream
        self.tokens_in = self.tokens_out = self.tokens_cached = -1
        self.load = b""  # what the backend told of its load, beside the usage
        self.events = 0  # with data, where somebody wants to know

    def __repr__(self) -> str:
        return f"<Scanner held={self._held_bytes} terminated={self.terminated} errored={self.errored}>"

    def feed(self, data: bytes) -> bytes:
        """The bytes up to the last event that has ended. Raises EventTooLarge."""
        if self._held or not data.endswith(b"\n\n"):
            data = self._split(data)
            if not data:
                return b""
        self._last = (self._last[1], data)
        if self._counts:
            self.events += data.count(b"\ndata:") + data.startswith(b"data:")
        # `find`, because `in` first tries whether what it looks for is a number, at five times the price
        if data.find(b'"usage"') >= 0:
            self._note_usage(data)
            if data.find(b'"load"') >= 0:
                data = self._without_load(data)
        self._note_end(data)
        if data.find(b"error") >= 0 and _TELLS_ERROR(data):
            self.errored = True
        return data

    def _note_end(self, data: bytes) -> None:
        terminal = self._terminal
        if terminal and data.find(terminal) >= 0 and (_DONE if terminal == b"[DONE]" else _MESSAGE_STOP)(data):
            self.terminated = True

    def _split(self, data: bytes) -> bytes:
        """What is held is not looked at again, but for its last bytes: a large event comes in many pieces."""
        seen, end = self._tail + data, 0
        for boundary in _BOUNDARY.finditer(seen):
            end = boundary.end()
        whole = b""
        if end:
            cut = end - len(self._tail)
            whole = b"".join((*self._held, data[:cut]))
            data = data[cut:]
            self._held, self._held_bytes, seen = [], 0, data
        if data:
            self._held.append(data)
            self._held_bytes += len(data)
        self._tail = seen[-3:]
        if self._held_bytes > MAX_EVENT_BYTES:
            raise EventTooLarge
        return whole

    def _note_usage(self, data: bytes) -> None:
        for document in _DATA(data):
            if b'"usage"' in document:
                tokens_in, tokens_out, tokens_cached = usage_of(document)
                self.tokens_in = max(self.tokens_in, tokens_in)
                self.tokens_out = max(self.tokens_out, tokens_out)
                self.tokens_cached = max(self.tokens_cached, tokens_cached)

    def _without_load(self, data: bytes) -> bytes:
        """The one thing that is taken out of an event: it was for us, and how busy a backend is is the operator's."""
        for document in _DATA(data):
            load = load_in(document)
            if load:
                self.load = load
                data = data.replace(b',"load":' + load, b"", 1)
        return data

    def rest(self) -> bytes:
        """What was held back, once the framing has said that nothing more comes. Ends the scan."""
        held = b"".join(self._held)
        self._held, self._held_bytes, self._tail = [], 0, b""
        self._note_end(held)
        return held

    @property
    def is_whole(self) -> bool:
        """Enough has passed to call the stream complete; `[DONE]` may be missing (then is_finished is true)."""
        return not self._terminal or self.terminated or self.is_finished

    @property
    def is_finished(self) -> bool:
        """An event near the end gave a finish_reason: all but the `[DONE]` was there."""
        return self._terminal == b"[DONE]" and any(_FINISHED(piece) for piece in self._last)
