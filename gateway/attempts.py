"""Forward, the request's half: try backends until one has answered, or until trying again would be wrong.

One attempt holds one `Lease` (in-flight count, breaker ticket) and one connection, both to the last streamed byte, both
by `with` or `finally`. The breaker hears of an attempt when it has ended, not at the answer's head. When the client
leaves, the task is cancelled wherever it waits, and the connection to the backend closes on the way out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gateway.headers import header_safe, request_head
from gateway.relay import Ending, Relay
from observability.events import Attempt
from policies import errors
from policies.breaker import Outcome
from policies.deadline import Kind, Phase, next_due, remaining_ms
from policies.policy import BalanceKind
from policies.retry import Failure, RetryBudget, delay_before, may_retry
from policies.routing import pick_target

if TYPE_CHECKING:
    from gateway.answer import AnswerHead
    from gateway.call import Call, Ids
    from gateway.server import ClientConnection
    from gateway.trail import Trail
    from gateway.upstream.connection import Connection
    from gateway.upstream.endpoint import Backend, Lease
    from gateway.upstream.fleet import Fleet, Group
    from gateway.upstream.pool import Pool
    from policies.policy import Route, Target

consumer_line = lru_cache(maxsize=4096)(header_safe)

_FAILURES = frozenset(
    {"upstream_reset", "upstream_timeout", "upstream_protocol", "upstream_error", "stream_truncated", "connect_fail"}
)


class Forwarder:
    """Sends calls to backends of the fleet and relays what they answer."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float], rng: Random, ids: Ids) -> None:
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._ids = ids
        self._budgets: dict[tuple[str, float], RetryBudget] = {}
        self.relays: set[Relay] = set()  # answers on their way

    async def forward(self, call: Call, trail: Trail, route: Route, consumer: str, client: ClientConnection) -> None:
        """Answer the call from a backend. Raises a Refusal while nothing has gone out to the client."""
        group = self._group(call, trail, route, consumer)
        budget = self._budget(route)
        budget.deposit(trail.mark)
        hash_key = _hash_key(call, route, consumer)
        tried: tuple[Backend, ...] = ()
        last: _Attempt | None = None
        while True:
            try:
                lease = self._fleet.lease(group, route, tried, hash_key)
            except errors.Refusal:
                if last is None:
                    raise
                raise _refusal(last, route) from None  # nobody is left to retry with: what the last one did stands
            trail.pick += trail.lap()
            with lease, _Attempt(lease, call, trail, route, client, self._ids.span()) as last:
                ending = await last.run(self.relays, consumer)
            failure = ending.failure
            if failure is None:
                return
            if ending.reason == "drain":
                raise errors.Draining("The gateway is shutting down.", retry_after=1.0)
            made = len(trail.attempts)
            if not may_retry(failure, route.retry, made, budget, self._clock()):
                raise _refusal(last, route)
            tried += (lease.backend,)
            delay = delay_before(failure, made - 1, self._rng)
            if delay:
                await asyncio.sleep(delay)
                trail.queue += trail.lap()

    def _group(self, call: Call, trail: Trail, route: Route, consumer: str) -> Group:
        fleet, model, version = self._fleet, call.model, call.version
        target: Target | None = route.to[0]
        if len(route.to) > 1:
            target = pick_target(route, self._rng, consumer, lambda one: fleet.group(one, model, version) is not None)
        group = fleet.group(target, model, version) if target is not None else None
        if target is None or group is None:
            raise fleet.missing(route, model, version)
        trail.service = target.service
        return group

    def _budget(self, route: Route) -> RetryBudget:
        key = (route.name, route.retry.budget)
        budget = self._budgets.get(key)
        if budget is None:
            budget = self._budgets[key] = RetryBudget(route.retry.budget)
        return budget


class _Attempt:
    """One try at one backend. On the way out of its `with` breaker, balancer and trail hear how it ended."""

    __slots__ = (
        "_before",
        "_call",
        "_client",
        "_route",
        "_span_id",
        "_started",
        "_trail",
        "ending",
        "lease",
        "overdue",
        "relay",
    )

    def __init__(
        self, lease: Lease, call: Call, trail: Trail, route: Route, client: ClientConnection, span_id: int
    ) -> None:
        self.lease = lease
        self.relay: Relay | None = None
        self.ending = _LEFT
        self.overdue: Kind | None = None  # which timeout has run out
        self._call = call
        self._trail = trail
        self._route = route
        self._client = client
        self._span_id = span_id
        self._started = trail.mark
        self._before = (trail.connect, trail.upstream)

    async def run(self, relays: set[Relay], consumer: str) -> Ending:
        """Until the answer has ended. A pooled connection that turns out to be dead is replaced once, for free."""
        pool, trail = self.lease.backend.pool, self._trail
        connection = pool.take(trail.mark)
        if connection is not None:
            await self._exchange(connection, relays, consumer)
            if self.ending.failure is not Failure.STALE:
                return self.ending
        connection = await self._connect(pool)
        if connection is not None:
            await self._exchange(connection, relays, consumer)
        return self.ending

    async def _connect(self, pool: Pool) -> Connection | None:
        trail, timeout = self._trail, self._route.timeout
        due, kind = next_due(Phase.CONNECTING, timeout, trail.start, trail.mark)
        self.ending = _LEFT  # what a stale connection did before stands no longer
        try:
            async with asyncio.timeout(due - trail.mark):
                return await pool.connect()
        except TimeoutError:
            self.overdue = kind
            is_late = kind is Kind.TOTAL  # then there is no time for another backend either
            self.ending = _TOO_LATE if is_late else Ending("connect_fail", Failure.CONNECT_TIMEOUT)
        except OSError:
            self.ending = Ending("connect_fail", Failure.CONNECT_FAIL)
        finally:
            trail.connect += trail.lap()
        return None

    async def _exchange(self, connection: Connection, relays: set[Relay], consumer: str) -> None:
        call, trail, backend, timeout = self._call, self._trail, self.lease.backend, self._route.timeout
        lines = b"x-request-id: %b\r\nx-weir-policy: %b\r\n%bx-weir-attempts: %d\r\n" % (
            call.request_id.encode(),
            trail.policy.encode(),
            backend.name_line,
            len(trail.attempts) + 1,
        )
        head = request_head(
            call,
            backend.head_lines,
            backend.endpoint.base_path,
            self._client.forwarded_lines,
            consumer_line(consumer),
            self._span_id,
            remaining_ms(timeout, trail.start, trail.mark),
        )
        self.relay = relay = Relay(call, trail, self._client, connection, timeout, lines)
        self.ending = _LEFT
        relays.add(relay)
        try:
            connection.start(relay, head + call.body)
            await relay.wait()
        finally:
            relays.discard(relay)
            relay.release()
            self.overdue = relay.overdue
            if relay.ending is not None:  # also when its own cut of the client's connection cancelled us
                self.ending = relay.ending
            if not relay.committed:
                trail.upstream += trail.lap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        trail, ending, backend = self._trail, self.ending, self.lease.backend
        head = self.relay.head if self.relay is not None else None
        connect_before, upstream_before = self._before
        self.lease.outcome = _outcome(ending, head, self.overdue)
        if head is not None and head.load_report:
            backend.hear_load(head.load_report, trail.mark)
        if ending.failure is Failure.BUSY:
            backend.hear_busy(trail.mark)
        elif ending.reason == "ok" and self._route.balance.kind is _PEAK_EWMA:
            backend.ewma.observe(trail.upstream - upstream_before, trail.mark)
        trail.end_reason = ending.reason
        trail.attempts.append(
            Attempt(
                backend.endpoint.id,
                backend.endpoint.service,
                self._started - trail.start,
                trail.connect - connect_before,
                trail.clock() - self._started,
                ending.reason,
                head.status if head is not None else 0,
                self._span_id,
            )
        )


_LEFT = Ending("client_abort")
_TOO_LATE = Ending("upstream_timeout", Failure.FIRST_BYTE_TIMEOUT)
_PEAK_EWMA = BalanceKind.PEAK_EWMA


def _outcome(ending: Ending, head: AnswerHead | None, overdue: Kind | None) -> Outcome:
    """What the breaker hears. 4xx, 429, clients that left and a backend that did not start count neither way.

    Nor does an answer that was on its way when the request's own time ran out: it was only long.
    """
    if ending.reason == "ok":
        return Outcome.SUCCESS if head is None or head.status < 400 else Outcome.IGNORED
    if ending.failure in (Failure.NOT_STARTED, Failure.STALE):  # a stale connection is replaced, unless the client left
        return Outcome.IGNORED
    if overdue is Kind.TOTAL and head is not None:
        return Outcome.IGNORED
    return Outcome.FAILURE if ending.reason in _FAILURES else Outcome.IGNORED


def _refusal(attempt: _Attempt, route: Route) -> errors.Refusal:
    """What the client is told when the last attempt failed."""
    failure, relay = attempt.ending.failure, attempt.relay
    head = relay.head if relay is not None else None
    after = _retry_after(head.retry_after) if head is not None else None
    if failure in (Failure.CONNECT_FAIL, Failure.CONNECT_TIMEOUT):
        return errors.NoBackend("No backend of this route could be reached.", retry_after=1.0)
    if failure is Failure.BUSY:
        rule = f"routes.{route.name}"
        return errors.BackendsBusy("The backends of this route are busy.", rule=rule, retry_after=after or 1.0)
    if failure is Failure.NOT_STARTED or (head is not None and head.status == 503 and after is not None):
        return errors.Overloaded("The backends of this route take no more requests now.", retry_after=after or 1.0)
    if failure is Failure.FIRST_BYTE_TIMEOUT:
        overdue = attempt.overdue or Kind.FIRST_BYTE
        rule = f"routes.{route.name}.timeout.{overdue.value}"
        if overdue is Kind.TOTAL:
            return errors.DeadlineExceeded("The request took longer than its route allows.", rule=rule)
        return errors.UpstreamTimeout("The backend did not answer in time.", rule=rule)
    return errors.UpstreamFailed("The backend failed before its answer was there.")


def _hash_key(call: Call, route: Route, consumer: str) -> str:
    header = route.balance.hash_header
    if header is None:
        return consumer
    return call.header(header) or consumer


def _retry_after(value: bytes) -> float | None:
    return min(float(value), 3600.0) if value.isdigit() and len(value) < 6 else None
