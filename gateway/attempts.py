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
from typing import TYPE_CHECKING

from gateway.headers import header_safe, request_head
from gateway.relay import Ending, Relay
from observability.events import Attempt
from policies import errors
from policies.breaker import Outcome
from policies.deadline import Kind, Phase, next_due, remaining_ms
from policies.policy import BalanceKind
from policies.prefix import CHUNK_BYTES, chain_of
from policies.retry import Failure, RetryBudget, delay_before, may_retry
from policies.routing import pick_target

if TYPE_CHECKING:
    from gateway.call import Call, Ids
    from gateway.trail import Trail
    from gateway.upstream.connection import Connection
    from gateway.upstream.endpoint import Backend, Lease
    from gateway.upstream.fleet import Fleet, Group
    from gateway.upstream.pool import Pool
    from policies.policy import Route, Target

_consumer_line = lru_cache(maxsize=4096)(header_safe)


@lru_cache(maxsize=4096)
def _with_priority(consumer: str, priority: str) -> bytes:
    return b"%b\r\nx-weir-priority: %b" % (header_safe(consumer), priority.encode())


_FAILURES = frozenset(
    {"upstream_reset", "upstream_timeout", "upstream_protocol", "upstream_error", "stream_truncated", "connect_fail"}
)
_NO_WORK = frozenset({"connect_fail", "shed"})
_TOO_LATE = Ending("upstream_timeout", Failure.FIRST_BYTE_TIMEOUT)
# Looking a member up in its Enum costs as much as a short function.
_STALE, _BUSY, _NOT_STARTED = Failure.STALE, Failure.BUSY, Failure.NOT_STARTED
_SUCCESS, _FAILURE, _IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.IGNORED
_PEAK_EWMA, _HASH, _PREFIX = BalanceKind.PEAK_EWMA, BalanceKind.HASH, BalanceKind.PREFIX


class Forwarder:
    """Sends calls to backends of the fleet and relays what they answer."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float], rng: Random, ids: Ids) -> None:
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._ids = ids
        self._budgets: dict[tuple[str, float], RetryBudget] = {}
        self.relays: set[Relay] = set()  # answers on their way

    async def forward(self, call: Call, trail: Trail, route: Route, consumer: str) -> None:
        """Answer the call from a backend. Raises a Refusal while nothing has gone out to the client."""
        target = self._target(call, route, consumer)
        budget = self._budget(route)
        budget.deposit(trail.mark)
        kind = route.balance.kind
        hash_key = _hash_key(call, route, consumer) if kind is _HASH else ""
        chain = chain_of(call.body, call.model or "") if kind is _PREFIX else ()
        tried: tuple[Backend, ...] = ()
        last: Ending | None = None
        carry = call.connection.carry
        while True:
            try:  # each time with the fleet as it is now: who has left during an attempt gets no retry
                lease = self._fleet.lease(self._group(call, trail, route, target), route, tried, hash_key, chain)
            except errors.Refusal:
                if last is None:
                    raise
                raise refusal_of(last, route) from None  # nobody is left to retry with: what the last one did stands
            trail.pick += trail.lap()
            known = lease.backend.note_prompt(chain) if chain else 0
            with lease:
                if carry is None:
                    last = await self._attempt(lease, call, trail, route, consumer)
                else:
                    last = await carry(lease, call, trail, route, consumer)
            failure = last.failure
            if chain:
                expected = known * CHUNK_BYTES / len(call.body)
                lease.backend.hear_cached(chain, expected, trail.tokens_in, trail.tokens_cached)
            if failure is None:
                return
            if last.reason == "drain":
                raise errors.Draining("The gateway is shutting down.", retry_after=1.0)
            made = len(trail.attempts)
            if not may_retry(failure, route.retry, made, budget, self._clock()):
                raise refusal_of(last, route)
            tried += (lease.backend,)
            delay = delay_before(failure, made - 1, self._rng)
            if delay:
                await asyncio.sleep(delay)
                trail.queue += trail.lap()

    async def _attempt(self, lease: Lease, call: Call, trail: Trail, route: Route, consumer: str) -> Ending:
        """One try at one backend. At its end breaker, balancer and trail hear how it ended, whatever happens."""
        started, connect_before, upstream_before = trail.mark, trail.connect, trail.upstream
        backend, timeout, span_id = lease.backend, route.timeout, self._ids.span()
        deadline_ms = remaining_ms(timeout, trail.start, started)
        request = request_head(call, backend, caller_line(consumer, trail), span_id, deadline_ms) + call.body
        relay = Relay(call, trail, timeout, backend)
        try:
            connection = backend.pool.take(started)
            if connection is not None:
                await self._exchange(relay, connection, request)
            if connection is None or relay.ending.failure is _STALE:  # a dead pooled one is replaced once, for free
                relay = Relay(call, trail, timeout, backend)
                connection = await self._connect(relay, backend.pool)
                if connection is not None:
                    await self._exchange(relay, connection, request)
        finally:
            ending, head = relay.ending, relay.head
            status = head.status if head is not None else 0
            lease.outcome = outcome_of(ending, status, relay.overdue)
            note_attempt(lease, trail, route, ending, status, span_id, started, connect_before, upstream_before)
        if ending.failure is None:
            return ending
        after = _retry_after(head.retry_after) if head is not None else None
        return ending._replace(overdue=relay.overdue, status=status, retry_after=after)

    async def _connect(self, relay: Relay, pool: Pool) -> Connection | None:
        """A new connection; None: none could be made, and the relay has ended so."""
        trail = relay.trail
        due, kind = next_due(Phase.CONNECTING, relay.timeouts, trail.start, trail.mark)
        try:
            async with asyncio.timeout(due - trail.mark):
                return await pool.connect()
        except TimeoutError:
            relay.overdue = kind
            is_late = kind is Kind.TOTAL  # then there is no time for another backend either
            relay.ending = _TOO_LATE if is_late else Ending("connect_fail", Failure.CONNECT_TIMEOUT)
        except OSError:
            relay.ending = Ending("connect_fail", Failure.CONNECT_FAIL)
        finally:
            trail.connect += trail.lap()
        return None

    async def _exchange(self, relay: Relay, connection: Connection, request: bytes) -> None:
        """Send the request, and relay the answer to its end."""
        self.relays.add(relay)
        try:
            relay.start(connection, request)
            await relay
        finally:
            self.relays.discard(relay)
            relay.release()
            if not relay.committed:
                relay.trail.upstream += relay.trail.lap()

    def _target(self, call: Call, route: Route, consumer: str) -> Target:
        if len(route.to) == 1:
            return route.to[0]
        fleet, model, version = self._fleet, call.model, call.resource.version
        over_grpc = call.connection.carry is not None
        target = pick_target(
            route, self._rng, consumer, lambda one: fleet.group(one, model, version, over_grpc) is not None
        )
        if target is None:
            raise fleet.missing(route, model, version, over_grpc)
        return target

    def _group(self, call: Call, trail: Trail, route: Route, target: Target) -> Group:
        model, version = call.model, call.resource.version
        over_grpc = call.connection.carry is not None
        group = self._fleet.group(target, model, version, over_grpc)
        if group is None:
            raise self._fleet.missing(route, model, version, over_grpc)
        trail.service = target.service
        return group

    def _budget(self, route: Route) -> RetryBudget:
        key = (route.name, route.retry.budget)
        budget = self._budgets.get(key)
        if budget is None:
            budget = self._budgets[key] = RetryBudget(route.retry.budget)
        return budget


def had_work(attempts: list[Attempt]) -> bool:
    """Whether a backend may have begun with the request: not where none could be reached or all said they are full."""
    return any(attempt.outcome not in _NO_WORK for attempt in attempts)


def caller_line(consumer: str, trail: Trail) -> bytes:
    """Who asks, and how urgently: what stands behind `x-weir-consumer: `."""
    priority = trail.payer.plan.priority if trail.payer is not None else None
    return _consumer_line(consumer) if priority is None else _with_priority(consumer, priority)


def note_attempt(
    lease: Lease,
    trail: Trail,
    route: Route,
    ending: Ending,
    status: int,
    span_id: str,
    started: float,
    connect_before: float,
    upstream_before: float,
) -> None:
    """What balancer and trail hear of an attempt that has ended. The last three: the trail as it was before."""
    backend = lease.backend
    if ending.failure is _BUSY:
        backend.hear_busy(trail.mark)
    elif ending.reason == "ok" and route.balance.kind is _PEAK_EWMA:
        backend.ewma.observe(trail.upstream - upstream_before, trail.mark)
    trail.end_reason = ending.reason
    trail.attempts.append(
        Attempt(
            backend.endpoint.id,
            backend.endpoint.service,
            started - trail.start,
            trail.connect - connect_before,
            trail.clock() - started,
            ending.reason,
            status,
            span_id,
        )
    )


def outcome_of(ending: Ending, status: int, overdue: Kind | None) -> Outcome:
    """What the breaker hears. 4xx, 429, clients that left and a backend that did not start count neither way.

    Nor does an answer that was on its way when the request's own time ran out: it was only long.
    """
    if ending.reason == "ok":
        return _SUCCESS if status < 400 else _IGNORED
    if ending.failure in (_NOT_STARTED, _STALE):  # a stale connection is replaced, unless the client left
        return _IGNORED
    if overdue is Kind.TOTAL and status:
        return _IGNORED
    return _FAILURE if ending.reason in _FAILURES else _IGNORED


def refusal_of(ending: Ending, route: Route) -> errors.Refusal:
    """What the client is told when the last attempt failed."""
    failure, after = ending.failure, ending.retry_after
    if failure in (Failure.CONNECT_FAIL, Failure.CONNECT_TIMEOUT):
        return errors.NoBackend("No backend of this route could be reached.", retry_after=1.0)
    if failure is _BUSY:
        rule = f"routes.{route.name}"
        return errors.BackendsBusy("The backends of this route are busy.", rule=rule, retry_after=after or 1.0)
    if failure is _NOT_STARTED or (ending.status == 503 and after is not None):
        return errors.Overloaded("The backends of this route take no more requests now.", retry_after=after or 1.0)
    if failure is Failure.FIRST_BYTE_TIMEOUT:
        overdue = ending.overdue or Kind.FIRST_BYTE
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
