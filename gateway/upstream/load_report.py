"""What a backend says of its load, as far as balancing uses it: how many requests it has, and how much its cache holds.

It comes in three forms: the `endpoint-load-metrics` header in JSON (ORCA: https://github.com/cncf/xds,
orca_load_report.proto), the events of a load stream, and `load` beside the usage of an answer's last event
(docs/backend.md). Nothing in it is believed beyond bounds; what is out of them is nonsense and says nothing.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

_Count = Annotated[float, msgspec.Meta(ge=0.0, lt=1e6)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
_MOST_TOKENS = 10**8  # in a cache


class LoadReport(NamedTuple):
    """Requests running and waiting. `seq` grows with each change (0: not told); `cache_tokens`: 0 is not told."""

    requests: float
    seq: int = 0
    cache_tokens: int = 0


class _NamedMetrics(msgspec.Struct, gc=False):
    num_requests_running: _Count = 0.0
    num_requests_waiting: _Count = 0.0
    seq: _Number = 0


class _Orca(msgspec.Struct, gc=False):
    named_metrics: _NamedMetrics


class _Whole(msgspec.Struct, gc=False):
    running: _Count
    waiting: _Count
    seq: _Number = 0
    kv_blocks: _Number = 0
    block_size: _Number = 0


_decode_orca = msgspec.json.Decoder(_Orca).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_NONSENSE = (msgspec.MsgspecError, ValueError, RecursionError)


def of_header(value: bytes) -> LoadReport | None:
    """The report in a header's value (`JSON {...}`); None if it is none. Never raises."""
    if not value.startswith(b"JSON "):
        return None
    try:
        named = _decode_orca(value[5:]).named_metrics
    except _NONSENSE:
        return None
    return LoadReport(named.num_requests_running + named.num_requests_waiting, named.seq)


def of_document(document: bytes) -> LoadReport | None:
    """The report in a JSON document; None if it is none. Never raises."""
    try:
        found = _decode_whole(document)
    except _NONSENSE:
        return None
    tokens = min(found.kv_blocks * found.block_size, _MOST_TOKENS)
    return LoadReport(found.running + found.waiting, found.seq, tokens)
