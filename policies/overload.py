"""Whether the process itself has too much to do: then it refuses new requests, so that those under way are served.

Two signs, each judged by itself at every reading:

    the event loop   late by more than 250 ms at every reading for 5 s   => no new requests, until it is in time once
    memory           92 % of what the process may use                    => connections are not kept
                     95 %                                                => no new requests either

The numbers for memory are those of Envoy's overload manager as its documentation for edge proxies has them. Lateness
must last, because one long pause (a burst, a page fault, a suspended machine) is over before a refusal would help.
"""

from __future__ import annotations

from typing import Final

LATE_SECONDS: Final = 0.25
LATE_FOR_SECONDS: Final = 5.0
KEEP_NO_CONNECTIONS: Final = 0.92
TAKE_NO_REQUESTS: Final = 0.95


class Overload:
    """What the last reading means. `reason` is "" while requests and connections are welcome."""

    def __init__(self, late_for: float = LATE_FOR_SECONDS) -> None:
        self.keeps_connections = True
        self.takes_requests = True
        self.reason = ""
        self._late_for = late_for
        self._late_since: float | None = None

    def note(self, now: float, lag: float, memory: float | None) -> bool:
        """Take a reading: seconds of lag, and the share of the memory in use, None if unlimited. True: a change."""
        if lag <= LATE_SECONDS:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        is_late = self._late_since is not None and now - self._late_since >= self._late_for
        used = memory or 0.0
        before = (self.keeps_connections, self.takes_requests, self.reason)
        self.keeps_connections = used < KEEP_NO_CONNECTIONS
        self.takes_requests = used < TAKE_NO_REQUESTS and not is_late
        self.reason = "event loop" if is_late else "" if self.keeps_connections else "memory"
        return before != (self.keeps_connections, self.takes_requests, self.reason)

    @property
    def state(self) -> str:
        """As one word: normal, no_keep_alive, or shedding."""
        if not self.takes_requests:
            return "shedding"
        return "normal" if self.keeps_connections else "no_keep_alive"

    def __repr__(self) -> str:
        return f"<Overload {self.state} {self.reason}>"
