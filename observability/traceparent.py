"""The `traceparent` header of W3C Trace Context, level 1: https://www.w3.org/TR/trace-context-1/#traceparent-header.

Strict, because a value that is passed on must mean the same to everyone who reads it. Its sampled flag is a wish of
the client's: who reads it here decides alone what is kept.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST = 512  # a longer value is not looked at
_VERSION_00 = 55  # characters: 00-{32}-{16}-{2}
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(NamedTuple):
    """Where a caller's trace stands. Bit 0 of `flags`: the caller says that it keeps this trace."""

    trace_id: str  # 32 and 16 hexadecimal digits
    parent_id: str
    flags: int


def parse_traceparent(value: bytes | str) -> TraceParent | None:
    """None for everything that the specification does not allow: the request then begins a trace of its own."""
    if not _VERSION_00 <= len(value) <= LONGEST:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    form = _FORM.fullmatch(text)
    if form is None:
        return None
    version, trace, parent, flags, more = form.groups()
    if version == "ff" or (more and version == "00"):
        return None  # ff is reserved; only a later version may say more
    if not int(trace, 16) or not int(parent, 16):
        return None
    return TraceParent(trace, parent, int(flags, 16))
