"""One backend as the data path sees it: its registration, connections, breakers and load.

What a request takes from a backend is held by a `Lease`, to the last byte, and given back whatever happens.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection
from random import Random
from types import TracebackType
from typing import Protocol, Self

from discovery.endpoint import Endpoint
from gateway.certificates import system_context
from gateway.upstream.load_report import LoadReport, of_document, of_header
from gateway.upstream.pool import Pool
from policies.balance import Candidate
from policies.breaker import Breaker, Outcome, State
from policies.policy import BreakerRule
from policies.prefix import Chain, PrefixIndex

_IGNORED, _FAILURE = Outcome.IGNORED, Outcome.FAILURE  # looking a member up in its Enum costs as much as a function

REPORT_SECONDS = 2.0  # how long a backend's own word about its load counts, where it came with an answer


class Channel(Protocol):
    """A connection over gRPC, as `gateway/rpc/` makes them."""

    def close(self) -> None:
        """Take no new calls; end with the last one under way."""


class Backend(Candidate):
    """A backend in service."""

    __slots__ = (
        "_breakers", "_cache_tokens", "_on_breaker", "_reported_until", "_rng", "_seq", "base_path", "channel",
        "endpoint", "grpc_healthy", "head_lines", "healthy", "name_line", "pool",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        now: float,
        rng: Random,
        on_breaker: Callable[[Backend, State], None],
        tls: Callable[[], ssl.SSLContext] = system_context,
    ) -> None:
        super().__init__(endpoint.key, endpoint.weight, endpoint.max_concurrency, now)
        self.endpoint = endpoint
        self.healthy: bool | None = None  # over HTTP; None: not probed yet
        self.grpc_healthy: bool | None = None  # the same over gRPC
        self.pool = Pool(endpoint, tls)
        self.channel: Channel | None = None  # to its gRPC port, once somebody asked for it
        self._breakers: dict[str, Breaker] = {}
        self._rng = rng
        self._on_breaker = on_breaker
        self._reported_until = 0.0  # when its own last word stops counting
        self._seq = 0  # the number of that word
        self._cache_tokens = 0  # that its cache holds; 0: not told
        self.head_lines = f"host: {endpoint.authority}\r\nendpoint-load-metrics-format: json\r\n".encode()
        self.base_path = endpoint.base_path.encode()
        self.name_line = f"x-weir-backend: {endpoint.id}\r\n".encode()

    def __repr__(self) -> str:
        state = (
            "draining"
            if self.endpoint.draining
            else {True: "healthy", False: "unhealthy", None: "unprobed"}[self.healthy]
        )
        return f"<Backend {self.key} {state} inflight={self.inflight} breaker={self.breaker_state.value}>"

    def adopt(self, endpoint: Endpoint) -> bool:
        """Go on with a changed registration; False when it names another place to connect to."""
        old = self.endpoint
        if _place(old) != _place(endpoint):
            return False
        self.endpoint = self.pool.endpoint = endpoint
        self.weight = endpoint.weight
        self.max_concurrency = endpoint.max_concurrency
        self.base_path = endpoint.base_path.encode()
        return True

    def breaker(self, rule: BreakerRule) -> Breaker:
        """The breaker under this rule. Routes with equal rules share it; a reloaded policy finds it again."""
        breaker = self._breakers.get(rule.key)
        if breaker is None:
            breaker = Breaker(rule, self._rng, self._breaker_changed)
            self._breakers[rule.key] = breaker
        return breaker

    def keep_breakers(self, keys: Collection[str]) -> None:
        """Forget the breakers under other rules. Who holds a ticket of one still gives it back."""
        self._breakers = {key: breaker for key, breaker in self._breakers.items() if key in keys}

    def renew_connections(self) -> None:
        """No new request on what is connected now."""
        self.pool = self.pool.successor()
        self._close_channel()

    def close(self) -> None:
        """It is gone: what is under way may end."""
        self.pool.close()
        self._close_channel()

    def _close_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _breaker_changed(self, state: State) -> None:
        self._on_breaker(self, state)

    @property
    def has_open_breaker(self) -> bool:
        return any(not breaker.is_closed for breaker in self._breakers.values())

    @property
    def breaker_state(self) -> State:
        """The worst of its breakers."""
        states = {breaker.state for breaker in self._breakers.values()}
        return next((state for state in (State.OPEN, State.HALF_OPEN) if state in states), State.CLOSED)

    def tidy(self, now: float) -> None:
        """Now and then: forget a report that has grown old, close connections that idled too long."""
        self.forget_load(now)
        self.pool.close_idle(now)

    def forget_load(self, now: float) -> None:
        """A report that has grown old says nothing any more: only our own requests there count."""
        if now >= self._reported_until:
            self.reported = 0.0

    def hear_header(self, value: bytes, now: float) -> None:
        """Take in an `endpoint-load-metrics` header. Nonsense is ignored: a backend may be hostile."""
        report = of_header(value)
        if report is not None:
            self.hear_load(report, now, REPORT_SECONDS)

    def hear_ended(self, document: bytes, now: float) -> None:
        """Take in what came with the end of an answer: that request is over there, though not yet here."""
        report = of_document(document)
        if report is not None:
            self.hear_load(report._replace(requests=report.requests + 1), now, REPORT_SECONDS)

    def hear_load(self, report: LoadReport, now: float, seconds: float) -> bool:
        """Take in a report, which counts for so long; False if a newer one is known.

        What others have there is what it has less what we have there now. From here on our own requests are counted
        as they come and go, so that those sent since the report weigh at once: nobody herds after old news.
        """
        if report.seq and report.seq < self._seq and now < self._reported_until:
            return False
        self._seq = report.seq
        self.reported = max(0.0, report.requests - self.inflight)
        self._reported_until = now + seconds
        if report.cache_tokens and report.cache_tokens != self._cache_tokens:
            self._cache_tokens = report.cache_tokens
            if self.prefixes is not None:
                self.prefixes.fit(report.cache_tokens)
        return True

    def note_prompt(self, chain: Chain) -> int:
        """A prompt with this chain is sent there. Returns how many of its chunks it should have cached."""
        if self.prefixes is None:
            self.prefixes = PrefixIndex(self._cache_tokens)
        return self.prefixes.note(chain)

    def hear_cached(self, chain: Chain, expected: float, prompt_tokens: int, cached_tokens: int) -> None:
        """An answer tells how much of its prompt was cached, or does not (-1). The share `expected` was."""
        if self.prefixes is not None and cached_tokens >= 0 and prompt_tokens > 0:
            self.prefixes.learn(chain, expected, cached_tokens / prompt_tokens)

    def hear_busy(self, now: float) -> None:
        """It answered 429: count it as loaded for a while, so that its fast refusals do not draw more requests."""
        self.reported = max(self.reported, 2.0 * self.inflight + 8.0)
        self._reported_until = now + REPORT_SECONDS


def _place(endpoint: Endpoint) -> tuple[str, str, str, int, int | None]:
    return endpoint.scheme, endpoint.host, endpoint.address, endpoint.port, endpoint.grpc_port


class Lease:
    """One request's hold on one backend: its in-flight count and its breaker's ticket.

    `outcome` is what the breaker hears at the end; until someone knows better the request counts neither way.
    """

    __slots__ = ("_breaker", "_clock", "_may_open", "_ticket", "backend", "outcome")

    def __init__(
        self,
        backend: Backend,
        breaker: Breaker,
        ticket: int,
        clock: Callable[[], float],
        may_open: Callable[[Backend], bool],
    ) -> None:
        self.backend = backend
        self.outcome = _IGNORED
        self._breaker = breaker
        self._ticket = ticket
        self._clock = clock
        self._may_open = may_open
        backend.inflight += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.backend.inflight -= 1
        outcome = self.outcome
        may_open = outcome is not _FAILURE or self._may_open(self.backend)
        self._breaker.leave(self._ticket, outcome, self._clock(), may_open=may_open)
