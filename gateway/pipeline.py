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

from gateway.attempts import Forwarder
from gateway.body import body_at_hand, read_body
from gateway.call import Ids, accept, begin, peek
from gateway.rescue import refusal_bytes
from gateway.server import ClientConnection, Incoming
from gateway.trail import Trail
from policies import access, errors
from policies.routing import Router

if TYPE_CHECKING:
    from gateway.admission import Account
    from gateway.identify import Entry, Identifier
    from gateway.local_answers import LocalAnswers
    from gateway.upstream.fleet import Fleet
    from observability.events import Observer
    from policies.policy import Policy

_END_REASONS: Final = {
    401: "auth", 403: "policy", 404: "policy", 408: "client_slow", 429: "rate_limited", 500: "internal",
}  # fmt: skip
_END_REASONS_BY_CODE: Final = {
    "keys_unavailable": "auth", "no_backend": "no_backend", "circuit_open": "breaker_open", "overloaded": "shed",
    "draining": "drain", "model_not_found": "policy", "upstream_failed": "upstream_error",
    "upstream_timeout": "upstream_timeout", "deadline": "upstream_timeout", "queue_full": "shed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy with what is made of it. A request keeps the one it began with."""

    policy: Policy
    router: Router


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
        identifier: Identifier[Account],
        fleet: Fleet,
        forwarder: Forwarder,
        local: LocalAnswers,
        observe: Observer,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: Random,
        ids: Ids,
    ) -> None:
        self.in_force: InForce  # set before the first request, and at each reload
        self._settings = settings
        self._identifier = identifier
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
        self._log = structlog.get_logger()

    async def handle(self, incoming: Incoming) -> bool:
        """Serve one request and tell what became of it. The answer has gone out when this returns.

        True: the connection may carry another request.
        """
        in_force = self.in_force
        trail = Trail(self._clock, self._wall(), in_force.policy.version)
        self.inflight += 1
        try:
            await self._serve(incoming, trail, in_force)
        except errors.Refusal as refusal:
            self._refuse(refusal, trail, incoming)
        except asyncio.CancelledError:
            if not trail.bytes_out:  # else the answer has ended, or knows why it did not
                trail.end_reason = "client_abort"
            raise
        except Exception:  # noqa: BLE001  a bug of ours must cost one request and be seen
            self._log.exception("request failed", request_id=trail.call.request_id if trail.call else "")
            self._refuse(errors.InternalError("Something went wrong in the gateway."), trail, incoming)
        finally:
            self.inflight -= 1
            self._observe(trail.ended(""))
        call = trail.call
        return call is not None and call.keep_alive and not self.draining

    async def _serve(self, incoming: Incoming, trail: Trail, in_force: InForce) -> None:
        settings = self._settings

        # Accept: a head that two readers could not understand differently.
        call = trail.call = begin(incoming.message, self._ids, settings.sample)
        accept(call, incoming.message)
        if self.draining:
            call.keep_alive = False
        if call.method != "POST" and self._local.answers_anybody(call):
            self._local.answer(call, trail, incoming.connection)
            return

        # Identify: whose token is this? Remembered until it expires, so mostly a lookup.
        entry = self._known_caller(incoming.connection, call.authorization, trail.started_at)
        if entry is None:
            entry = await self._identifier.identify(call.authorization, trail.started_at)
        principal, account = entry.principal, entry.account
        trail.consumer, trail.plan, trail.payer = principal.consumer, account.plan.name, account
        trail.auth = trail.lap()

        # Admit: one request of the consumer's plan, and a place among its concurrent ones.
        if not account.admit_nowait(trail.mark):
            await account.admit(trail.mark)
        with account:
            trail.limit = trail.lap()
            trail.account = account.headers(trail.mark)

            # Read what is asked for. Only now: who may not send makes us read nothing.
            body = body_at_hand(incoming, call, settings.body_bytes)
            if body is None:
                try:
                    body = await read_body(incoming, call, settings.body_bytes, settings.body_timeout)
                except errors.ClientTimeout:
                    account.refund()
                    raise
            call.body = body
            trail.body = trail.lap()
            if call.method == "GET" and self._local.answers_caller(call):
                self._local.answer_caller(call, trail, incoming.connection, in_force, principal)
                return

            # Route: the first one that matches, and the caller must be allowed on it.
            call.model, call.stream = peek(call)
            trail.model = self._fleet.known_model(call.model)
            route = in_force.router.route(call.path, call.model, call.header)
            trail.route, trail.path = route.name, call.path if call.protocol != "http" else "other"
            access.check(route, principal, call.model)

            # Balance, guard, forward: choose a backend that its breaker lets through, relay its answer, or try another.
            await self._forwarder.forward(call, trail, route, principal.consumer, incoming.connection)

    def _known_caller(
        self, client: ClientConnection, authorization: bytes | None, wall: float
    ) -> Entry[Account] | None:
        """Who calls, if that is known without verifying: most often whoever called last on this connection."""
        caller = client.caller
        if caller is not None and client.authorization == authorization and self._identifier.still_holds(caller, wall):
            return caller
        entry = self._identifier.identify_nowait(authorization, wall)
        if authorization is not None:
            client.authorization, client.caller = authorization, entry
        return entry

    def reject(self, connection: ClientConnection, refusal: errors.Refusal) -> None:
        """Answer what never became a request."""
        trail = Trail(self._clock, self._wall(), self.in_force.policy.version)
        request_id = f"{self._ids.trace():032x}"
        self._write_refusal(refusal, trail, connection, request_id, close=True)
        trail.end_reason = "client_slow" if refusal.status == 408 else "parse_error"
        self._observe(trail.ended(request_id))

    def _refuse(self, refusal: errors.Refusal, trail: Trail, incoming: Incoming) -> None:
        call = trail.call
        if trail.bytes_out:  # an answer is half out: all that is left is to end it as broken
            incoming.connection.abort()
            return
        trail.end_phase()
        if trail.payer is not None:  # how far over the limit, too
            trail.account = trail.payer.headers(trail.mark)
        unread = not incoming.payload.is_eof()
        in_doubt = isinstance(refusal, errors.BadRequest) and not trail.consumer  # where does the next request begin?
        if call is not None and (unread or in_doubt):
            call.keep_alive = False
        request_id = call.request_id if call is not None else ""
        close = call is None or not call.keep_alive
        self._write_refusal(refusal, trail, incoming.connection, request_id, close=close)
        if trail.end_reason in ("internal", "client_abort", "ok"):
            trail.end_reason = _END_REASONS_BY_CODE.get(refusal.code) or _END_REASONS.get(refusal.status, "parse_error")

    def _write_refusal(
        self, refusal: errors.Refusal, trail: Trail, connection: ClientConnection, request_id: str, *, close: bool
    ) -> None:
        call = trail.call
        lines = b"x-request-id: %b\r\nx-weir-policy: %b\r\n%b%b" % (
            request_id.encode(),
            trail.policy.encode(),
            trail.account,
            trail.server_timing(),
        )
        protocol = call.protocol if call is not None else "openai"
        answer = refusal_bytes(
            protocol,
            refusal,
            request_id,
            lines,
            self._rng,
            close=close,
            head_only=call is not None and call.method == "HEAD",
        )
        trail.status, trail.code, trail.rule = refusal.status, refusal.code, refusal.rule or ""
        trail.bytes_out = len(answer)
        connection.write(answer)
