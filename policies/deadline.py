"""The four timeouts of an attempt, each its own: which of them is due next, and when.

A request is CONNECTING until a backend's connection is there, WAITING until the first byte of the answer and STREAMING
to its last byte. Each phase has a timeout of its own, counted from its beginning (STREAMING: from the last piece that
came); `total` runs from the start of the request, over every attempt. Pure arithmetic: a timer is the caller's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from policies.policy import Timeouts


class Phase(Enum):
    CONNECTING = "connecting"
    WAITING = "waiting"
    STREAMING = "streaming"


class Kind(Enum):
    """Which timeout it is. The values are the keys of `timeout:` in policy.yaml."""

    CONNECT = "connect"
    FIRST_BYTE = "first_byte"
    IDLE = "idle"
    TOTAL = "total"


# Looking a member up in its Enum costs more than the arithmetic.
_CONNECTING: Final = Phase.CONNECTING
_WAITING: Final = Phase.WAITING
_CONNECT: Final = Kind.CONNECT
_FIRST_BYTE: Final = Kind.FIRST_BYTE
_IDLE: Final = Kind.IDLE
_TOTAL: Final = Kind.TOTAL


def next_due(phase: Phase, timeouts: Timeouts, started_at: float, phase_at: float) -> tuple[float, Kind]:
    """Return when the next timeout is due and which it is; `total` where both fall together.

    `started_at` is the start of the request, `phase_at` that of the phase or, while STREAMING, of the last piece.
    """
    if phase is _CONNECTING:
        due, kind = phase_at + timeouts.connect, _CONNECT
    elif phase is _WAITING:
        due, kind = phase_at + timeouts.first_byte, _FIRST_BYTE
    else:
        due, kind = phase_at + timeouts.idle, _IDLE
    total_due = started_at + timeouts.total
    return (due, kind) if due < total_due else (total_due, _TOTAL)


def remaining_ms(timeouts: Timeouts, started_at: float, now: float) -> int:
    """Return what is left of `total` in whole milliseconds, rounded down, never below 0: x-weir-deadline-ms."""
    return max(0, int((started_at + timeouts.total - now) * 1000))
