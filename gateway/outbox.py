"""Small writes to sockets, sent together at the end of the event loop's turn.

A turn reads from many connections, and each answer or request that comes of it is a small write to another one. Sent at
once, each wakes a reader that has just gone to sleep, and to wake another processor's sleeper is the dearest part of a
write (a virtual machine leaves to its host for it). Sent one behind the other, the first wakes the reader and the
others find it awake: the same reason for which Envoy and nginx write at the end of their turns.

To hold a write costs a turn of its own. So while turns have little to write nothing is held, but for a look now and
then whether there is more to do.
"""

from __future__ import annotations

import asyncio
from typing import Final

MOST_HELD: Final = 16  # writes; they wait for each other, so this bounds by how much the first is late
FEW: Final = 2  # writes of a turn that are not worth holding
DIRECT: Final = 16  # writes that leave at once after such a turn, before the next one is looked at
HELD_BYTES: Final = 16 * 1024  # a larger one is worth its own waking, and the transport's back-pressure must see it


class Outbox:
    """One for an event loop: see `outbox_of`. Whatever closes a transport or its writing half calls `flush` first."""

    __slots__ = ("_direct", "_held", "_is_due", "_written", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._held: list[tuple[asyncio.Transport, bytes]] = []
        self._is_due = False
        self._direct = 0  # so many writes are not held
        self._written = 0  # in the turn that is looked at

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Send these bytes in this turn of the loop, after what was written before."""
        if self._direct > 0:
            self._direct -= 1
            _send(transport, data)
            return
        self._written += 1
        if len(data) > HELD_BYTES:
            self.flush()
            _send(transport, data)
            return
        held = self._held
        held.append((transport, data))
        if len(held) >= MOST_HELD:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            self.loop.call_soon(self._end_turn)

    def flush(self) -> None:
        """Hand what is held to the transports."""
        held = self._held
        if held:
            self._held = []
            for transport, data in held:
                _send(transport, data)

    def _end_turn(self) -> None:
        self._is_due = False
        if self._written <= FEW:
            self._direct = DIRECT
        self._written = 0
        self.flush()


def _send(transport: asyncio.Transport, data: bytes) -> None:
    """Write, unless the transport is closing: uvloop raises then, and its protocol is about to hear that it is lost."""
    if not transport.is_closing():
        transport.write(data)


_last: Outbox | None = None


def outbox_of(loop: asyncio.AbstractEventLoop) -> Outbox:
    """The outbox of this event loop."""
    global _last  # noqa: PLW0603  a process has one event loop; its connections share what they write
    if _last is None or _last.loop is not loop:
        _last = Outbox(loop)
    return _last
