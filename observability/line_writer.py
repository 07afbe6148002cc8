"""Where lines of the log go: JSON lines that never make a request wait.

A line is made where it happens and put into a bounded queue; one thread writes. A full disk, a slow one or a pipe
that nobody reads stops that thread and nothing else. What cannot wait any longer is dropped and counted, the oldest
access lines first: lines that must be kept (what a gateway says of itself, requests that ended in a 5xx) have a queue
of their own, so no flood of good news displaces them, and they are written first. Every line is ASCII.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
from collections import deque
from typing import Final

from observability.background import give_way

_QUEUED_LINES: Final = 10_000  # each queue; an ordinary line has 500 bytes, the longest possible 8 KiB
_BATCH_LINES: Final = 512
_PERIOD_SECONDS: Final = 0.1


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own. `write` never waits and never raises."""

    def __init__(self, descriptor: int, *, queued_lines: int = _QUEUED_LINES) -> None:
        self._descriptor = descriptor
        self._limit = queued_lines
        self._kept: deque[bytes] = deque(maxlen=queued_lines)
        self._ordinary: deque[bytes] = deque(maxlen=queued_lines)
        self._batch = memoryview(b"")
        self._closing = threading.Event()
        self._dropped = 0
        self._worker = threading.Thread(target=self._run, name="weir-log", daemon=True)
        self._worker.start()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Lines that were given up since the start."""
        return self._dropped

    def write(self, line: bytes, *, keep: bool = True) -> None:
        """Queue one line of UTF-8. When there is no room, the oldest line of the same kind makes it."""
        queue = self._kept if keep else self._ordinary
        if len(queue) == self._limit:
            self._dropped += 1
        queue.append(line)

    def close(self, timeout: float = 2.0) -> None:
        """Write what is left; give up on a descriptor that takes nothing for `timeout` seconds."""
        atexit.unregister(self.close)
        self._closing.set()
        self._worker.join(timeout)

    def _run(self) -> None:
        give_way()
        while not self._closing.wait(_PERIOD_SECONDS):
            self._write_queued()
        self._write_queued()
        self._dropped += self._batch.tobytes().count(b"\n") + len(self._kept) + len(self._ordinary)

    def _write_queued(self) -> None:
        """Write until nothing is left or the descriptor refuses (disk full): then the rest waits for the next turn."""
        while self._batch or self._fill_batch():
            try:
                written = os.write(self._descriptor, self._batch)
            except OSError:
                return  # nothing to tell it to: this is the log. The queue overflows and that is counted
            self._batch = self._batch[written:]

    def _fill_batch(self) -> bool:
        queues = (self._kept, self._ordinary)
        lines = [queue.popleft() for queue in queues for _ in range(min(len(queue), _BATCH_LINES))]
        self._batch = memoryview(_ascii(b"\n".join([*lines, b""])))
        return bool(lines)


_NOT_PLAIN = re.compile("[^\0-\x7e]")


def _ascii(lines: bytes) -> bytes:
    r"""Write what is not ASCII, and DEL, as JSON does (`\u20ac`): a terminal has nothing to obey in it."""
    if lines.isascii() and b"\x7f" not in lines:
        return lines
    return _NOT_PLAIN.sub(lambda char: _escaped(char[0]), lines.decode("utf-8", "replace")).encode("ascii")


def _escaped(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]
