"""The header lines that tell a client its limit: the IETF draft's `ratelimit` fields and OpenAI's `x-ratelimit-*`.

    ratelimit: "free";r=7;t=3                 7 left; all of it in 3 s
    ratelimit-policy: "free";q=60;w=60        60 per 60 s
    x-ratelimit-limit-requests: 10            the most that can be left (the burst)
    x-ratelimit-remaining-requests: 7
    x-ratelimit-reset-requests: 3s            as Go prints durations: 3s, 6m0s, 1h0m0s

Sources: draft-ietf-httpapi-ratelimit-headers, sections 3 and 4; OpenAI API guide, "Rate limits in headers".

They go with every answer, so what does not change is formatted once, and the whole is kept while its numbers last.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from policies.policy import Plan


class LimitHeaders:
    """The lines for one account."""

    __slots__ = ("_burst", "_form", "_last", "_last_left", "_last_reset", "_seconds_per_token", "refusal")

    def __init__(self, plan: Plan) -> None:
        self._last = b""
        self._last_left = self._last_reset = -1
        self._burst = plan.burst
        self._form = b""
        self._seconds_per_token = 0.0
        self.refusal = ""
        if plan.requests is None:
            return
        count, seconds = plan.requests.count, plan.requests.seconds
        self.refusal = f"The request limit of this plan is reached: {count:g} per {duration(ceil(seconds))}."
        """The message for who is over the limit."""
        self._seconds_per_token = 1.0 / plan.requests.per_second
        name = quoted(plan.name)
        self._form = (
            b"ratelimit: %b;r=%%d;t=%%d\r\n"
            b"ratelimit-policy: %b;q=%d;w=%d\r\n"
            b"x-ratelimit-limit-requests: %d\r\n"
            b"x-ratelimit-remaining-requests: %%d\r\n"
            b"x-ratelimit-reset-requests: %%b\r\n"
        ) % (name.replace(b"%", b"%%"), name.replace(b"%", b"%%"), ceil(count), ceil(seconds), plan.burst)

    def lines(self, remaining: float) -> bytes:
        """The lines when `remaining` tokens are left; empty without a limit."""
        if not self._form:
            return b""
        left = int(remaining)
        reset = -int((remaining - self._burst) * self._seconds_per_token // 1)  # rounded up
        if left != self._last_left or reset != self._last_reset:
            self._last_left, self._last_reset = left, reset
            self._last = self._form % (left, reset, left, encoded_duration(reset))
        return self._last


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
