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
from policies.deadline import Kind, remaining_ms
from policies.retry import Failure, RetryBudget, delay_before, may_retry
from policies.routing import pick_target

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.server import ClientConnection
    from gateway.trail import Trail
    from gateway.upstream.connection import Connection
    from gateway.upstream.endpoint import Backend, Lease
    from gateway.upstream.fleet import Fleet, Group
    from policies.policy import Route, Target

consumer_line = lru_cache(maxsize=4096)(header_safe)

# What the breaker hears. Not in the table: IGNORED, for what says nothing about the backend's health.
_OUTCOMES = {
    "ok": Outcome.SUCCESS,
    "upstream_reset": Outcome.FAILURE,
    "upstream_timeout": Outcome.FAILURE,
    "upstream_protocol": Outcome.FAILURE,
    "upstream_error": Outcome.FAILURE,
    "stream_truncated": Outcome.FAILURE,
    "connect_fail": Outcome.FAILURE,
}


class Forwarder:
    """Sends calls to backends of the fleet and relays what they answer."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float], rng: Random) -> None:
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._budgets: dict[tuple[str, float], RetryBudget] = {}
        self.relays: set[Relay] = set()  # answers on their way

    async def forward(
        self, call: Call, trail: Trail, route: Route, consumer: str, client: ClientConnection
    ) -> None:
        """Answer the call from a backend. Raises a Refusal while nothing has gone out to the client."""
        group = self._group(call, trail, route, consumer)
        budget = self._budget(route)
        budget.deposit(trail.mark)
        hash_key = _hash_key(call, route, consumer)
        tried: tuple[Backend, ...] = ()
        made = 0
        while True:
            try:
                lease = self._fleet.lease(group, route, tried, hash_key)
            except errors.Refusal:
                if made:  # nobody is left to retry with: what the last one said stands
                    raise self._refusal(ending, relay_head, route) from None
                raise
            trail.pick += trail.lap()
            with lease:
                ending, relay_head = await self._attempt(lease, call, trail, route, consumer, client)
            made += 1
            failure = ending.failure
            if failure is None:
                return
            trail.end_reason = ending.reason
            if ending.reason == "drain":
                raise errors.Draining("The gateway is shutting down.", retry_after=1.0)
            if not may_retry(failure, route.retry, made, budget, self._clock()):
                raise self._refusal(ending, relay_head, route)
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
            raise fleet.missing(route, model)
        trail.service = target.service
        return group

    def _budget(self, route: Route) -> RetryBudget:
        key = (route.name, route.retry.budget)
        budget = self._budgets.get(key)
        if budget is None:
            budget = self._budgets[key] = RetryBudget(route.retry.budget)
        return budget

    async def _attempt(
        self, lease: Lease, call: Call, trail: Trail, route: Route, consumer: str, client: ClientConnection
    ) -> tuple[Ending, Relay | None]:
        """One try at one backend, with a second connection for free when a pooled one turns out to be dead."""
        backend = lease.backend
        span_id = self._rng.getrandbits(64) or 1
        started, connect_before = trail.mark, trail.connect
        ending, relay = Ending("client_abort"), None
        try:
            for reuse in (True, False):
                connection = backend.pool.take(trail.mark) if reuse else None
                if connection is None:
                    connection, ending = await self._connect(backend, trail, route)
                    if connection is None:
                        return ending, None
                ending, relay = await self._exchange(connection, backend, call, trail, route, consumer, client, span_id)
                if ending.failure is not Failure.STALE:
                    break
            return ending, relay
        finally:
            self._note(lease, relay, trail, ending, span_id, started, trail.connect - connect_before)

    async def _connect(self, backend: Backend, trail: Trail, route: Route) -> tuple[Connection | None, Ending]:
        try:
            async with asyncio.timeout(min(route.timeout.connect, trail.start + route.timeout.total - trail.mark)):
                connection = await backend.pool.connect()
        except TimeoutError:
            return None, Ending("connect_fail", Failure.CONNECT_TIMEOUT)
        except OSError:
            return None, Ending("connect_fail", Failure.CONNECT_FAIL)
        finally:
            trail.connect += trail.lap()
        return connection, Ending("ok")

    async def _exchange(  # noqa: PLR0913  the facts of one exchange
        self,
        connection: Connection,
        backend: Backend,
        call: Call,
        trail: Trail,
        route: Route,
        consumer: str,
        client: ClientConnection,
        span_id: int,
    ) -> tuple[Ending, Relay]:
        lines = b"x-request-id: %b\r\nx-weir-policy: %b\r\n%bx-weir-attempts: %d\r\n" % (
            call.request_id.encode(),
            trail.policy.encode(),
            backend.name_line,
            len(trail.attempts) + 1,
        )
        relay = Relay(call, trail, client, connection, route.timeout, lines)
        self.relays.add(relay)
        try:
            deadline = remaining_ms(route.timeout, trail.start, trail.mark)
            head = request_head(
                call,
                backend.head_lines,
                backend.endpoint.base_path,
                client.forwarded_lines,
                consumer_line(consumer),
                span_id,
                deadline,
            )
            connection.start(relay, head + call.body)
            ending = await relay.wait()
        finally:
            self.relays.discard(relay)
            relay.release()
        if not relay.committed:
            trail.upstream += trail.lap()
        return ending, relay

    def _note(  # noqa: PLR0913
        self, lease: Lease, relay: Relay | None, trail: Trail, ending: Ending, span_id: int, started: float, connect: float
    ) -> None:
        """Tell the breaker, the balancer and the trail how the attempt ended."""
        backend, now = lease.backend, self._clock()
        head = relay.head if relay is not None else None
        if ending.reason == "ok" and head is not None and head.status >= 400:
            lease.outcome = Outcome.IGNORED
        elif ending.failure is not Failure.NOT_STARTED:
            lease.outcome = _OUTCOMES.get(ending.reason, Outcome.IGNORED)
        if head is not None and head.load_report:
            backend.hear_load(head.load_report, now)
        if ending.failure is Failure.BUSY:
            backend.hear_busy(now)
        elif ending.reason == "ok":
            backend.ewma.observe(trail.upstream, now)
        if ending.failure is None:
            trail.end_reason = ending.reason
        trail.attempts.append(
            Attempt(
                backend.endpoint.id,
                backend.endpoint.service,
                started - trail.start,
                connect,
                now - started,
                ending.reason,
                head.status if head is not None else 0,
                span_id,
            )
        )

    def _refusal(self, ending: Ending, relay: Relay | None, route: Route) -> errors.Refusal:
        """What the client is told when the last attempt failed."""
        failure = ending.failure
        head = relay.head if relay is not None else None
        after = _retry_after(head.retry_after) if head is not None else None
        if failure in (Failure.CONNECT_FAIL, Failure.CONNECT_TIMEOUT):
            return errors.NoBackend("No backend of this route could be reached.", retry_after=1.0)
        if failure is Failure.BUSY:
            return errors.BackendsBusy("The backends of this route are busy.", rule=f"routes.{route.name}", retry_after=after or 1.0)
        if failure is Failure.NOT_STARTED or (head is not None and head.status == 503 and after is not None):
            return errors.Overloaded("The backends of this route take no more requests now.", retry_after=after or 1.0)
        if failure is Failure.FIRST_BYTE_TIMEOUT:
            if relay is not None and relay.overdue is Kind.TOTAL:
                rule = f"routes.{route.name}.timeout.total"
                return errors.DeadlineExceeded("The request took longer than its route allows.", rule=rule)
            rule = f"routes.{route.name}.timeout.first_byte"
            return errors.UpstreamTimeout("The backend did not begin to answer in time.", rule=rule)
        return errors.UpstreamFailed("The backend failed before its answer was there.")


def _hash_key(call: Call, route: Route, consumer: str) -> str:
    header = route.balance.hash_header
    if header is None:
        return consumer
    return call.header(header) or consumer


def _retry_after(value: bytes) -> float | None:
    return min(float(value), 3600.0) if value.isdigit() and len(value) < 6 else None
