"""The header lines that tell a client its limits: the IETF draft's `ratelimit` fields and OpenAI's `x-ratelimit-*`.

    ratelimit: "free";r=7;t=3                 7 left; all of it in 3 s
    ratelimit-policy: "free";q=60;w=60        60 per 60 s
    x-ratelimit-limit-requests: 10            the most that can be left (the burst)
    x-ratelimit-remaining-requests: 7
    x-ratelimit-reset-requests: 3s            as Go prints durations: 3s, 6m0s, 1h0m0s

A limit of tokens has five lines of its own: its name in the first two is `free.tokens`, and the others end in `tokens`.
A field that comes twice is one list (RFC 9110, 5.2).

Sources: draft-ietf-httpapi-ratelimit-headers, sections 3 and 4; OpenAI API guide, "Rate limits in headers".

They go with every answer, so what does not change is formatted once, and the whole is kept while its numbers last.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from policies.lease import Limit


class LimitHeaders:
    """The lines for one limit of one account; `unit` is `requests` or `tokens`. None: there is no limit."""

    __slots__ = ("_burst", "_form", "_last", "_last_left", "_last_reset", "_seconds_per_token")

    def __init__(self, plan: str, unit: str, limit: Limit | None) -> None:
        self._last = b""
        self._last_left = self._last_reset = -1
        self._burst = 0
        self._form = b""
        self._seconds_per_token = 0.0
        if limit is None:
            return
        self._burst = limit.capacity
        self._seconds_per_token = 1.0 / limit.rate.per_second
        name = quoted(plan if unit == "requests" else f"{plan}.{unit}").replace(b"%", b"%%")
        self._form = (
            b"ratelimit: %b;r=%%d;t=%%d\r\n"
            b"ratelimit-policy: %b;q=%d;w=%d%b\r\n"
            b"x-ratelimit-limit-@: %d\r\n"
            b"x-ratelimit-remaining-@: %%d\r\n"
            b"x-ratelimit-reset-@: %%b\r\n"
        ).replace(b"@", unit.encode()) % (
            name,
            name,
            ceil(limit.rate.count),
            ceil(limit.rate.seconds),
            b"" if unit == "requests" else b';qu="%b"' % unit.encode(),
            limit.capacity,
        )

    def lines(self, remaining: float) -> bytes:
        """The lines when `remaining` tokens are left, or owed; empty without a limit."""
        if not self._form:
            return b""
        left = int(remaining)
        if left < 0:  # noqa: PLR1730  max() costs more
            left = 0
        reset = -int((remaining - self._burst) * self._seconds_per_token // 1)  # rounded up
        if left != self._last_left or reset != self._last_reset:
            self._last_left, self._last_reset = left, reset
            self._last = self._form % (left, reset, left, encoded_duration(reset))
        return self._last


def told(limit: Limit) -> str:
    """A limit in words: `60 per 1m0s`."""
    count = f"{limit.rate.count:.6f}".rstrip("0").rstrip(".")
    return f"{count} per {duration(ceil(limit.rate.seconds))}"


def quoted(name: str) -> bytes:
    """A structured-field string (RFC 9651, 3.3.3): printable ASCII; what is not becomes `?`."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in name)
    return b'"%b"' % plain.replace("\\", "\\\\").replace('"', '\\"').encode()


def duration(seconds: int) -> str:
    """Whole seconds as Go prints them: 0s, 59s, 6m0s, 1h0m0s."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


@lru_cache(maxsize=4096)
def encoded_duration(seconds: int) -> bytes:
    return duration(seconds).encode()
