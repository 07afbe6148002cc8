"""What counts a consumer's requests against a plan: nothing, a bucket in this process, or a lease of a shared one.

All three answer alike. `take_nowait` takes a token, or `n`, and returns 0.0, or returns the seconds until they will be
there, or `UNKNOWN`: only the store knows, `await take()`. Neither holds anything across an await: tokens are taken when
the call returns 0.0, and `put_back` undoes it. Tokens that are only set aside, because it is not yet known how many
will be used, are held by `hold`, right after they were taken, until `settle`.

LeasedMeter has at most one question to the store under way; all requests that find the lease empty wait for its answer
together, at most `STORE_SECONDS`. Without an answer each is decided alone, as the plan says (`when_store_is_down`):

- share: by a bucket of this replica's part of the limit (limit / live gateways, at least one token), which begins as
  full as the store's bucket was when last heard of, less what is owed to it. What it grants is a debt that the store
  hears of later. A request that needs more than that part ever holds takes all of it, and the rest in advance.
- open: admitted.
- closed: errors.StoreUnavailable.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

from policies import errors
from policies.bucket import Bucket
from policies.lease import RENEW_SECONDS, TELL_SECONDS, Ask, Grant, Limit, Slice
from policies.policy import Plan, WhenStoreIsDown

UNKNOWN: Final = -1.0
STORE_SECONDS = 0.025
"""A request waits no longer than this for the store."""

UNAVAILABLE_RETRY_SECONDS = 1.0


class Borrower(Protocol):
    """Who asks the store for a part of one bucket."""

    key: bytes
    limit: Limit

    def ask(self) -> Ask:
        """The question, put together when it is about to be sent."""

    def answer(self, grant: Grant | None) -> None:
        """The store's answer; None: none came, and none will."""


class LeaseStore(Protocol):
    """Where shared buckets live."""

    @property
    def up(self) -> bool:
        """Whether asking makes sense."""

    def submit(self, borrower: Borrower) -> None:
        """Call `ask` soon (not at all when the store is away), then `answer` once. Does not wait."""


class Unmetered:
    """No limit."""

    __slots__ = ()

    def take_nowait(self, now: float) -> float:  # noqa: ARG002  the meters are called alike
        return 0.0

    async def take(self) -> float:
        return 0.0

    def put_back(self, now: float) -> None:
        """Nothing was taken."""

    def remaining(self, now: float) -> float:  # noqa: ARG002
        return inf

    def __repr__(self) -> str:
        return "<Unmetered>"


class LocalMeter:
    """A bucket in this process: there is no store, this replica is the only one."""

    __slots__ = ("_bucket", "_now", "take_nowait")

    def __init__(self, limit: Limit, now: Callable[[], float]) -> None:
        self._now = now
        self._bucket = Bucket(limit.rate.per_second, limit.capacity, now())
        self.take_nowait = self._bucket.take

    async def take(self, n: int = 1) -> float:
        return self._bucket.take(self._now(), n)

    def put_back(self, now: float) -> None:  # noqa: ARG002
        self._bucket.give(1.0)

    def hold(self, n: int) -> bool:  # noqa: ARG002
        return True

    def settle(self, now: float, reserved: int, used: int) -> None:
        if used <= reserved:
            self._bucket.give(reserved - used)
        else:
            self._bucket.charge(now, used - reserved)

    def remaining(self, now: float) -> float:
        return self._bucket.tokens_at(now)

    def reconfigure(self, plan: Plan, limit: Limit) -> None:  # noqa: ARG002
        self._bucket.reconfigure(limit.rate.per_second, limit.capacity, self._now())

    def __repr__(self) -> str:
        return f"<LocalMeter {self._bucket!r}>"


class LeasedMeter:
    """The part that this replica has of a bucket that all replicas share."""

    __slots__ = (
        "_asking", "_keep_timer", "_live_gateways", "_now", "_plan", "_question", "_returning", "_share", "_share_of",
        "_slice", "_store", "_tell_timer", "_telling", "_tells_soon", "_waiters", "key", "limit",
    )  # fmt: skip

    def __init__(
        self,
        store: LeaseStore,
        key: bytes,
        plan: Plan,
        limit: Limit,
        *,
        live_gateways: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self.key = key
        self.limit = limit
        self._store = store
        self._plan = plan
        self._live_gateways = live_gateways
        self._now = now
        self._slice = Slice(limit, now())
        self._waiters: deque[tuple[asyncio.Future[float], int]] = deque()  # and how many tokens each needs
        self._asking = False
        self._question: Ask | None = None  # as sent
        self._returning = False
        self._telling = False
        self._keep_timer: asyncio.TimerHandle | None = None
        self._tell_timer: asyncio.TimerHandle | None = None
        self._tells_soon = False
        self._share: Bucket | None = None
        self._share_of = 0

    # Taking

    def take_nowait(self, now: float, n: int = 1) -> float:
        lease = self._slice
        if lease.take(now, n):
            if lease.tokens <= lease.low_water:
                self._ask_store()
            return 0.0
        if not self._store.up:
            return self._take_alone(now, n)
        if lease.is_closed(now, n):
            return lease.refusal(now, n)
        return UNKNOWN

    async def take(self, n: int = 1) -> float:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[float] = loop.create_future()
        self._waiters.append((waiter, n))
        self._ask_store()
        timer = loop.call_later(STORE_SECONDS, _settle, waiter, UNKNOWN)
        try:
            seconds = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result() == 0.0:
                self.put_back(self._now(), n)  # granted, and cancelled before it could go on
            raise
        finally:
            timer.cancel()
        return self._take_alone(self._now(), n) if seconds == UNKNOWN else seconds

    def put_back(self, now: float, n: int = 1) -> None:
        if self._share is not None and (forgiven := self._slice.forgive(n)):
            self._share.give(forgiven)
            n -= forgiven
        if n and (self._store.up or self._plan.when_store_is_down is not WhenStoreIsDown.OPEN):
            self._slice.put_back(now, n)
            self._watch_slice()

    def hold(self, n: int) -> bool:
        """Tokens that were taken just now are only set aside. False: nobody counted them, there is none to settle."""
        if not self._store.up and self._plan.when_store_is_down is WhenStoreIsDown.OPEN:
            return False
        self._slice.reserved += n
        if not self._tells_soon:
            self._tells_soon = True
            self._tell_in(TELL_SECONDS)
        return True

    def settle(self, now: float, reserved: int, used: int) -> None:
        self._slice.reserved -= reserved
        if used < reserved:
            self.put_back(now, reserved - used)
        elif used > reserved:
            if self._share is not None:
                self._share.charge(now, used - reserved)
            self._slice.charge(now, used - reserved)
            self._watch_slice()

    def remaining(self, now: float) -> float:
        if self._share is not None:
            return self._share.tokens_at(now) + self._slice.tokens
        return self._slice.remaining(now)

    def reconfigure(self, plan: Plan, limit: Limit) -> None:
        self._plan = plan
        self.limit = limit
        self._slice.reconfigure(limit)
        self._share_of = 0  # the share is fitted when it is next used

    # Asking: at most one question is under way

    def _ask_store(self) -> None:
        if self._asking:
            return
        self._asking = True
        self._store.submit(self)

    def ask(self) -> Ask:
        needs = [n for waiter, n in self._waiters if not waiter.done()]
        need, least = sum(needs), needs[0] if needs else 1
        if self._returning:
            self._question = self._slice.give_back(self._now(), need, least)
        elif self._telling:
            self._question = self._slice.tell(self._now(), need, least)
        else:
            self._question = self._slice.ask(self._now(), need, self._live_gateways(), least)
        return self._question

    def answer(self, grant: Grant | None) -> None:
        question, self._question = self._question, None
        self._asking = self._returning = self._telling = False
        if question is None or grant is None:
            self._slice.lost()
            self._settle_all(UNKNOWN)
            return
        now = self._now()
        self._share = None
        self._serve(self._slice.answered(question, grant, now), now)
        if self._slice.has_news():
            self._watch_slice()

    def _serve(self, going: int, now: float) -> None:
        """Let go who was asked for, then who came since, as far as the tokens reach."""
        lease, waiters = self._slice, self._waiters
        while waiters:
            waiter, n = waiters[0]
            if waiter.done():
                pass
            elif going >= n:
                going -= n
                waiter.set_result(0.0)
            elif lease.take(now, n):
                waiter.set_result(0.0)
            elif lease.is_closed(now, n):
                waiter.set_result(lease.refusal(now, n - going))
            else:
                break
            waiters.popleft()
        if going:
            lease.put_back(now, going)  # who was asked for has left, or needs more than there was
        if waiters:
            self._ask_store()

    def _settle_all(self, seconds: float) -> None:
        while self._waiters:
            _settle(self._waiters.popleft()[0], seconds)

    # Giving back what is not needed

    def _watch_slice(self) -> None:
        if self._keep_timer is None:
            seconds = self._slice.outlasts_need(self._now())
            self._keep_timer = asyncio.get_running_loop().call_later(seconds, self._give_back)

    def _give_back(self) -> None:
        self._keep_timer = None
        if not self._slice.has_news() or self._asking or not self._store.up:
            return  # the next answer watches again
        if self._slice.outlasts_need(self._now()) > 0.0:
            self._watch_slice()
            return
        self._returning = True
        self._ask_store()

    # Telling of what is set aside

    def _tell_in(self, seconds: float) -> None:
        if self._tell_timer is not None:
            self._tell_timer.cancel()
        self._tell_timer = asyncio.get_running_loop().call_later(seconds, self._tell)

    def _tell(self) -> None:
        self._tell_timer, self._tells_soon = None, False
        if self._asking:  # something that may be older
            self._tell_in(TELL_SECONDS)
        elif self._slice.is_reserved():
            self._telling = True
            self._ask_store()
            self._tell_in(RENEW_SECONDS)

    # Without the store

    def _take_alone(self, now: float, n: int) -> float:
        if self._plan.when_store_is_down is WhenStoreIsDown.OPEN:
            return 0.0
        if self._plan.when_store_is_down is WhenStoreIsDown.CLOSED:
            raise errors.StoreUnavailable(
                "The limits of this plan cannot be checked at the moment.",
                rule=f"plans.{self._plan.name}.when_store_is_down",
                retry_after=UNAVAILABLE_RETRY_SECONDS,
            )
        share = self._fitted_share(now)
        seconds = share.take(now, min(n, share.capacity))
        if seconds == 0.0:
            if n > share.capacity:
                share.charge(now, n - share.capacity)
            self._slice.spend_alone(n)
        return seconds

    def _fitted_share(self, now: float) -> Bucket:
        gateways = max(1, self._live_gateways())
        per_second = self.limit.rate.per_second / gateways
        capacity = max(1.0, self.limit.capacity / gateways)
        if self._share is None:
            self._share = Bucket(per_second, capacity, now)
            level = self._slice.bucket_level(now) * capacity / self.limit.capacity - self._slice.owed()
            self._share.take(now, capacity - min(capacity, max(0.0, level)))
        elif self._share_of != gateways:
            self._share.reconfigure(per_second, capacity, now)
        self._share_of = gateways
        return self._share

    def __repr__(self) -> str:
        asking = "asking, " if self._asking else ""
        return f"<LeasedMeter {asking}{len(self._waiters)} waiting, {self._slice!r}, share {self._share!r}>"


def _settle(waiter: asyncio.Future[float], seconds: float) -> None:
    if not waiter.done():
        waiter.set_result(seconds)
