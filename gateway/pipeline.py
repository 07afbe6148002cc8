"""The life of a request, in one place: accept -> identify -> admit -> route -> balance -> guard -> forward -> observe.

`_serve` is that sentence. Each step returns a typed value for the next or raises a Refusal; whatever is taken is held
by `with` to the last streamed byte. Observe is the frame: one event per request, in one `finally`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

import structlog

from gateway.attempts import Forwarder, had_work
from gateway.body import is_at_hand
from gateway.call import Call, Ids, accept
from gateway.meter import UNKNOWN
from gateway.peek import peek
from gateway.trail import Trail
from policies import access, errors
from policies.policy import Policy
from policies.routing import Router

if TYPE_CHECKING:
    from gateway.admission import Admission
    from gateway.client import Client
    from gateway.identify import Identifier
    from gateway.local_answers import LocalAnswers
    from gateway.upstream.fleet import Fleet
    from observability.events import RequestObserver

_END_REASONS: Final = {
    401: "auth", 403: "policy", 404: "policy", 408: "client_slow", 429: "rate_limited", 500: "internal",
}  # fmt: skip
_END_REASONS_BY_CODE: Final = {
    "keys_unavailable": "auth", "no_backend": "no_backend", "circuit_open": "breaker_open", "overloaded": "shed",
    "draining": "drain", "model_not_found": "policy", "upstream_failed": "upstream_error",
    "upstream_timeout": "upstream_timeout", "deadline": "upstream_timeout", "queue_full": "shed", "loop": "policy",
}  # fmt: skip


def end_reason_of(refusal: errors.Refusal) -> str:
    """How the record of a request calls its refusal."""
    reason = _END_REASONS_BY_CODE.get(refusal.code) or _END_REASONS.get(refusal.status)
    return reason or ("policy" if refusal.rule else "parse_error")


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy with what is made of it. A request keeps the one it began with."""

    policy: Policy
    router: Router
    line: bytes  # names the policy's version in each answer

    @classmethod
    def of(cls, policy: Policy) -> InForce:
        return cls(policy, Router(policy), b"x-weir-policy: %b\r\n" % policy.version.encode())


@dataclass(frozen=True, slots=True)
class Settings:
    """What weir.yaml says about requests. Bytes, seconds, and a share."""

    body_bytes: int
    body_timeout: float
    sample: float


class Pipeline:
    """Serves requests. Everything it needs is handed in; it owns nothing but the order."""

    def __init__(
        self,
        settings: Settings,
        identifier: Identifier,
        admission: Admission,
        fleet: Fleet,
        forwarder: Forwarder,
        local: LocalAnswers,
        observe: RequestObserver,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: Random,
        ids: Ids,
    ) -> None:
        self.in_force: InForce  # set before the first request, and at each reload
        self._settings = settings
        self._identifier = identifier
        self._admission = admission
        self._fleet = fleet
        self._forwarder = forwarder
        self._local = local
        self._observe = observe
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._ids = ids
        self.inflight = 0
        self.draining = False
        self.keeps_connections = True  # False: memory is short
        self.takes_requests = True  # False: the process has too much to do already
        self._log = structlog.get_logger()

    async def handle(self, call: Call) -> bool:
        """Serve one request and tell what became of it. The answer has gone out when this returns.

        True: the connection may carry another request.
        """
        in_force = self.in_force
        trail = Trail(self._clock, self._wall(), in_force.policy.version, in_force.line)
        trail.call = call
        self.inflight += 1
        try:
            refusal = await self._serve(call, trail, in_force)
            if refusal is not None:
                self._refuse(refusal, trail, call)
        except errors.Refusal as refusal:
            self._refuse(refusal, trail, call)
        except asyncio.CancelledError:
            if not trail.bytes_out:  # else the answer has ended, or knows why it did not
                trail.end_reason = "client_abort"
            raise
        except Exception:  # noqa: BLE001  a bug of ours must cost one request and be seen
            self._log.exception("request failed", request_id=call.request_id)
            trail.end_reason = "internal"
            self._refuse(errors.InternalError("Something went wrong in the gateway."), trail, call)
        finally:
            self.inflight -= 1
            if trail.reservation is not None:
                trail.reservation.settle(trail)
            trail.end()
            self._observe(trail)
        return call.keep_alive and not self.draining

    async def _serve(self, call: Call, trail: Trail, in_force: InForce) -> errors.Refusal | None:
        """The sentence. A refusal is raised, but for the limit of requests: whoever is over it must cost little."""
        settings, connection = self._settings, call.connection

        # Accept: a head that two readers could not understand differently.
        self._ids.give(call, settings.sample)
        accept(call)
        if self.draining or not self.keeps_connections:
            call.keep_alive = False
        if call.method != "POST" and self._local.answers_anybody(call):
            self._local.answer(call, trail)
            return None
        if not self.takes_requests:
            raise errors.Overloaded("The gateway has more to do than it can; it takes on nothing new.", retry_after=2.0)

        # Identify: whose token is this? Remembered until it expires, so mostly a lookup.
        entry = connection.caller  # whoever sent the same header lines last
        if entry is None or not self._identifier.still_holds(entry, trail.started_at):
            authorization = call.head.authorization
            entry = self._identifier.identify_nowait(authorization, trail.started_at)
            if entry is None:
                entry = await self._identifier.identify(authorization, trail.started_at)
            connection.caller = entry
        consumer = entry.principal.consumer
        account = trail.payer = self._admission.account(entry.plan, consumer)
        trail.consumer, trail.plan = consumer, account.plan.name
        trail.auth = trail.lap()

        # Admit: one request of the consumer's plan, and a place among its concurrent ones.
        seconds = account.take_nowait(trail.mark)
        if seconds == UNKNOWN:
            seconds = await account.take(trail.mark)
        if seconds:
            return account.refusal_at_once(seconds)
        with account:
            trail.limit = trail.lap()
            trail.limit_lines = account.headers(trail.mark)

            # Read what is asked for. Only now: who may not send makes us read nothing.
            if not is_at_hand(call, settings.body_bytes):
                try:
                    await connection.read(call, settings.body_bytes, settings.body_timeout)
                except errors.ClientTimeout:
                    account.refund()
                    raise
            trail.body = trail.lap()
            if call.method == "GET" and self._local.answers_caller(call):
                self._local.answer_caller(call, trail, in_force, entry.principal)
                return None

            # Route: the first one that matches, and the caller must be allowed on it.
            asked, resource = peek(call), call.resource
            call.model, call.stream = asked.model, asked.stream is True
            trail.model = self._fleet.known_model(call.model)
            route = in_force.router.route(resource.path, call.model, call.header)
            trail.route, trail.path = route.name, resource.shown
            access.check(route, entry.principal, call.model)

            # Admit, once more: the tokens that it may come to, settled with what it came to when it has ended.
            if account.tokens is not None:
                trail.reservation = await account.reserve(call, trail)

            # Balance, guard, forward: choose a backend that its breaker lets through, relay its answer, or try another.
            try:
                await self._forwarder.forward(call, trail, route, consumer)
            except (errors.NoBackend, errors.BackendsBusy):
                if not had_work(trail.attempts):
                    account.refund()
                raise
            return None

    def reject(self, connection: Client, refusal: errors.Refusal) -> None:
        """Answer what never became a request."""
        in_force = self.in_force
        trail = Trail(self._clock, self._wall(), in_force.policy.version, in_force.line)
        request_id = self._ids.trace()
        self._tell(refusal, trail, connection, "openai", request_id, close=True, head_only=False)
        trail.end_reason = "client_slow" if refusal.status == 408 else "parse_error"
        trail.end(request_id)
        self._observe(trail)

    def _refuse(self, refusal: errors.Refusal, trail: Trail, call: Call) -> None:
        if trail.bytes_out:  # an answer is half out: all that is left is to end it as broken
            call.connection.abort()
            return
        trail.end_phase()
        if trail.payer is not None:  # how far over the limit, too
            trail.limit_lines = trail.payer.headers(trail.mark)
        in_doubt = isinstance(refusal, errors.BadRequest) and not trail.consumer  # where does the next request begin?
        if in_doubt or not call.is_whole:
            call.keep_alive = False
        self._tell(
            refusal,
            trail,
            call.connection,
            call.resource.protocol,
            call.request_id,
            close=not call.keep_alive,
            head_only=call.method == "HEAD",
        )
        if trail.end_reason in ("internal", "client_abort", "ok"):
            trail.end_reason = end_reason_of(refusal)

    def _tell(
        self,
        refusal: errors.Refusal,
        trail: Trail,
        connection: Client,
        protocol: str,
        request_id: str,
        *,
        close: bool,
        head_only: bool,
    ) -> None:
        trail.status, trail.code, trail.rule = refusal.status, refusal.code, refusal.rule or refusal.check
        trail.bytes_out = connection.refuse(
            refusal, trail, protocol, request_id, self._rng, close=close, head_only=head_only
        )
