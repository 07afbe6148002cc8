"""Admission: each consumer's account under its plan, found and asked once per request.

    account = admission.account(plan, consumer)
    seconds = account.take_nowait(now)    # 0.0: admitted; more: refused for so long
    if seconds == UNKNOWN:
        seconds = await account.take(now) # the shared bucket must be asked: at most 25 ms
    if seconds:
        return account.refusal_at_once(seconds)
    with account:                         # the concurrency slot, held to the last streamed byte
        ...

Invariants:
- There is one account per (plan, consumer) in this process for as long as a request is under way in it, so there is one
  lease and one count of requests in flight. It outlives policy reloads: a changed plan changes its numbers, not its
  fill level.
- What is remembered is bounded; forgotten first are accounts that have been idle long enough to be full again.
- Who gets no slot gets the token back.

The slots (`plans.*.concurrency`) are counted by each replica for itself.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING

from gateway.allowance import Allowance
from gateway.limit_headers import LimitHeaders, told
from gateway.meter import LeasedMeter, LeaseStore, LocalMeter, Unmetered
from policies import errors
from policies.lease import Limit
from policies.policy import Plan

if TYPE_CHECKING:
    from gateway.allowance import Reservation
    from gateway.call import Call
    from gateway.trail import Trail

MOST_ACCOUNTS = 100_000
"""Accounts kept while no request is under way in them."""

IDLE_SECONDS = 60.0
"""An account unused for this long, and for as long as its bucket takes to fill, may be forgotten at no loss."""

SLOT_RETRY_SECONDS = 1.0
"""When a slot will be free depends on answers that are still being written: a guess."""

Meter = Unmetered | LocalMeter | LeasedMeter


def request_limit(plan: Plan) -> Limit | None:
    return None if plan.requests is None else Limit(plan.burst, plan.requests)


def token_limit(plan: Plan) -> Limit | None:
    return None if plan.tokens is None else Limit(plan.token_burst, plan.tokens)


class Account:
    """What one consumer may still send under one plan. Its `with` is the concurrency slot."""

    __slots__ = ("_headers", "_most", "_now", "_refusal", "in_flight", "meter", "plan", "tokens", "used_at")

    def __init__(self, plan: Plan, meter: Meter, tokens: Allowance | None, now: Callable[[], float]) -> None:
        self._now = now
        self.in_flight = 0
        self.used_at = now()
        self.fit(plan, meter, tokens)

    def fit(self, plan: Plan, meter: Meter, tokens: Allowance | None) -> None:
        """Go on under `plan`; requests in flight keep their slots, and settle where they reserved."""
        self.plan = plan
        self.meter = meter
        self.tokens = tokens
        self._most = plan.concurrency if plan.concurrency is not None else inf
        limit = request_limit(plan)
        self._headers = LimitHeaders(plan.name, "requests", limit)
        message = "" if limit is None else f"The request limit of this plan is reached: {told(limit)}."
        self._refusal = errors.RateLimited(message, rule=f"plans.{plan.name}.requests")

    def take_nowait(self, now: float) -> float:
        """Take one request token, and return 0.0; or return the seconds until there will be one, or UNKNOWN.

        UNKNOWN: only the shared bucket knows, `await take()`. Raises errors.StoreUnavailable where the plan says so.
        """
        self.used_at = now
        return self.meter.take_nowait(now)

    async def take(self, now: float) -> float:
        """As `take_nowait`, asking the shared bucket for at most 25 ms. Cancelled, it has taken nothing."""
        self.used_at = now
        return await self.meter.take()

    def refund(self) -> None:
        """The admitted request did no work: its token may be used again."""
        self.meter.put_back(self._now())

    async def reserve(self, call: Call, trail: Trail) -> Reservation | None:
        """Of a plan with `tokens`: set aside what a request may come to. Raises a Refusal.

        Who must wait gets the token of the request back.
        """
        assert self.tokens is not None  # noqa: S101  the plan says so
        try:
            reservation = await self.tokens.reserve(call, trail)
        except (errors.RateLimited, errors.StoreUnavailable):
            self.refund()
            raise
        finally:
            trail.limit += trail.lap()
        trail.limit_lines = self.headers(trail.mark)
        return reservation

    def __enter__(self) -> None:
        if self.in_flight >= self._most:
            self.refund()
            raise errors.ConcurrencyExceeded(
                f"This plan allows {self._most} requests at a time.",
                rule=f"plans.{self.plan.name}.concurrency",
                retry_after=SLOT_RETRY_SECONDS,
            )
        self.in_flight += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.in_flight -= 1

    def headers(self, now: float) -> bytes:
        """The header lines that tell the limits in force, each ended by CRLF; none where there is no limit."""
        lines = self._headers.lines(self.meter.remaining(now))
        return lines if self.tokens is None else lines + self.tokens.lines(now)

    def is_idle(self, now: float) -> bool:
        """Whether a new account would be the same as this one."""
        idle = now - self.used_at
        if self.in_flight or idle < IDLE_SECONDS or (self.tokens is not None and not self.tokens.is_full(idle)):
            return False
        return self.plan.requests is None or idle >= self.plan.burst / self.plan.requests.per_second

    def refusal(self, seconds: float) -> errors.RateLimited:
        """What a request is told for which there was no token."""
        return errors.RateLimited(self._refusal.message, rule=self._refusal.rule, retry_after=seconds)

    def refusal_at_once(self, seconds: float) -> errors.RateLimited:
        """As `refusal`, neither to be raised nor to be kept: the next one is told by the same object.

        To make one was a tenth of what a refusal cost.
        """
        self._refusal.retry_after = seconds
        return self._refusal

    def __repr__(self) -> str:
        return f"<Account plan {self.plan.name}, {self.in_flight} in flight, {self.meter!r}>"


UNLIMITED = Account(Plan(name=""), Unmetered(), None, lambda: 0.0)
"""The account of everybody who has no plan."""


class Admission:
    """All accounts of this process. Without a store its limits are this process's own."""

    def __init__(self, store: LeaseStore | None, live_gateways: Callable[[], int], now: Callable[[], float]) -> None:
        self._store = store
        self._live_gateways = live_gateways
        self._now = now
        self._accounts: OrderedDict[tuple[str, str], Account] = OrderedDict()  # those just made or looked at last

    def account(self, plan: Plan | None, consumer: str) -> Account:
        """The account of `consumer` under `plan`, which is the newest form of the plan of that name."""
        if plan is None:
            return UNLIMITED
        key = (plan.name, consumer)
        account = self._accounts.get(key)
        if account is None:
            self._forget()
            account = self._accounts[key] = Account(
                plan, self._request_meter(plan, consumer), self._allowance(plan, consumer), self._now
            )
        elif account.plan is not plan:
            self._refit(account, plan, consumer)
        return account

    def _request_meter(self, plan: Plan, consumer: str) -> Meter:
        limit = request_limit(plan)
        return Unmetered() if limit is None else self._meter(plan, limit, bucket_key(plan.name, consumer))

    def _allowance(self, plan: Plan, consumer: str) -> Allowance | None:
        limit = token_limit(plan)
        if limit is None:
            return None
        return Allowance(plan.name, limit, self._meter(plan, limit, bucket_key(plan.name, consumer, "tokens|")))

    def _meter(self, plan: Plan, limit: Limit, key: bytes) -> LocalMeter | LeasedMeter:
        if self._store is None:
            return LocalMeter(limit, self._now)
        return LeasedMeter(self._store, key, plan, limit, live_gateways=self._live_gateways, now=self._now)

    def _refit(self, account: Account, plan: Plan, consumer: str) -> None:
        if account.plan == plan:  # a reload that changed other things
            account.plan = plan
            return
        meter, limit = account.meter, request_limit(plan)
        if limit is None or isinstance(meter, Unmetered):
            meter = self._request_meter(plan, consumer)
        else:
            meter.reconfigure(plan, limit)
        tokens, limit = account.tokens, token_limit(plan)
        if limit is None or tokens is None:
            tokens = self._allowance(plan, consumer)
        else:
            tokens.meter.reconfigure(plan, limit)
            tokens = Allowance(plan.name, limit, tokens.meter)
        account.fit(plan, meter, tokens)

    def _forget(self) -> None:
        """Make room for one: looks at the two oldest, so each account that comes lets two idle ones go."""
        accounts, now = self._accounts, self._now()
        for key in list(islice(accounts, 2)):
            if accounts[key].is_idle(now):
                del accounts[key]
            else:
                accounts.move_to_end(key)
        if len(accounts) >= MOST_ACCOUNTS:
            unused = next((key for key, account in accounts.items() if not account.in_flight), None)
            if unused is not None:
                del accounts[unused]

    def __repr__(self) -> str:
        return f"<Admission {len(self._accounts)} accounts, {self._store!r}>"


def bucket_key(plan: str, consumer: str, unit: str = "") -> bytes:
    """Where the store keeps the bucket: of requests, or of another `unit`, which begins with a letter.

    Names are hashed: they are private, of any length, and chosen by others. The braces make Redis Cluster hash the
    digest alone.
    """
    name = f"{unit}{len(plan)}|{plan}|{consumer}".encode("utf-8", "surrogatepass")
    return b"weir:v1:bucket:{%b}" % hashlib.sha256(name).hexdigest()[:32].encode()
