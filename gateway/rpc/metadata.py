"""Metadata, which are to gRPC what header lines are to HTTP, under the same rules (`gateway/head.py`). Pure.

Names are lower case; values are text, or bytes where the name ends in `-bin`. Names that begin with `grpc-` are gRPC's
own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from gateway.head import FORWARD, TRACESTATE, Lines, action_of

Metadata = tuple[tuple[str, str | bytes], ...]

_OF_GRPC: Final = "grpc-"
_ERROR_DETAILS: Final = "grpc-status-details-bin"  # https://grpc.io/docs/guides/error/
_NOT_OURS_TO_PASS: Final = frozenset({"user-agent"})  # gRPC sends one of its own
_LONGEST_TRACESTATE: Final = 512
_LEGAL: Final = re.compile(r"[\x20-\x7e]*").fullmatch


def lines_of(metadata: Iterable[tuple[str, str | bytes]]) -> Lines:
    """What the rules for header lines are asked about; binary values are nothing to them."""
    return [(name.encode("ascii", "replace"), value.encode()) for name, value in metadata if isinstance(value, str)]


def forwarded(metadata: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """Those of a client's that go on to the backend."""
    return tuple((name, value) for name, value in metadata if _goes_on(name, value))


def _goes_on(name: str, value: str | bytes) -> bool:
    if name.startswith(_OF_GRPC) or name in _NOT_OURS_TO_PASS:
        return False
    if isinstance(value, str) and not _LEGAL(value):  # gRPC would refuse to send it on
        return False
    action = action_of(name.encode("ascii", "replace"))
    return action == FORWARD or (action == TRACESTATE and len(value) <= _LONGEST_TRACESTATE)


def passing(metadata: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """Those of a backend's status that go on to the client: what is wrong with its request, said at length."""
    return tuple((name, value) for name, value in metadata if name == _ERROR_DETAILS)


def value_in(metadata: Iterable[tuple[str, str | bytes]], wanted: str) -> bytes:
    """The first text under a name; empty without one."""
    for name, value in metadata:
        if name == wanted and isinstance(value, str):
            return value.encode()
    return b""


def address_in(peer: str) -> str:
    """The address of a peer, as gRPC names it: `ipv4:10.0.0.9:5000`, `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return "unknown"
    return unquote(rest.rpartition(":")[0]).strip("[]")


def pairs(lines: bytes) -> Metadata:
    """Header lines of ours as metadata."""
    split = (line.partition(b": ") for line in lines.split(b"\r\n") if line)
    return tuple((name.decode(), value.decode()) for name, _, value in split)
