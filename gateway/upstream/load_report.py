"""The part of an ORCA load report that balancing uses: how many requests a backend has.

Source: https://github.com/cncf/xds, orca_load_report.proto, in the JSON form of the `endpoint-load-metrics` header.
"""

from __future__ import annotations

import msgspec


class _NamedMetrics(msgspec.Struct, gc=False):
    num_requests_running: float = 0.0
    num_requests_waiting: float = 0.0


class _LoadReport(msgspec.Struct, gc=False):
    named_metrics: _NamedMetrics


_decode = msgspec.json.Decoder(_LoadReport).decode


def requests_in(report: bytes) -> float | None:
    """Requests running and waiting, of a header's value (`JSON {...}`); None if it does not say. Never raises."""
    if not report.startswith(b"JSON "):
        return None
    try:
        named = _decode(report[5:]).named_metrics
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    total = named.num_requests_running + named.num_requests_waiting
    return total if 0.0 <= total < 1e6 else None
