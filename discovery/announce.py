"""The side of whoever is to be found: a key under a lease, kept alive, put again when lost, taken back at the end.

    Lost => Held     a lease was granted and the key put under it
    Held => Held     each third of the time to live the lease was renewed
    Held => Lost     etcd said that it does not know the lease, or nothing was renewed within the time to live by our
                     own clock: the lease may then be gone, whatever the connection looks like

Nothing that etcd does reaches the one that is announced: `async with` enters at once, loss is repaired behind it with
full-jitter delays for ever, and the exit waits for etcd for 2 s at most (the lease then ends by itself).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Final, NoReturn, Protocol, Self

from discovery.endpoint import DEFAULT_PREFIX, Registration, decode, encode
from discovery.source import LeaseLost, SourceFailure
from policies.backoff import Backoff

LEASE_SECONDS: Final = 10
GOODBYE_SECONDS: Final = 2.0
RETRY_CAP_SECONDS: Final = 5.0


class Leases(Protocol):
    """What an announcement needs of etcd. Every method raises SourceFailure alone, LeaseLost where that is known."""

    async def grant(self, ttl: int) -> int: ...

    async def put(self, key: str, value: bytes, lease: int) -> int: ...

    async def keep_alive(self, lease: int) -> float: ...

    async def revoke(self, lease: int) -> None: ...


class Announcement:
    """Holds `key` in etcd while entered. `value_when_draining` is what `drain` puts in place of `value`."""

    def __init__(
        self,
        leases: Leases,
        key: str,
        value: bytes,
        *,
        rng: Random,
        value_when_draining: bytes | None = None,
        ttl: int = LEASE_SECONDS,
    ) -> None:
        self._leases = leases
        self._key = key
        self._value = value
        self._value_when_draining = value_when_draining
        self._ttl = ttl
        self._backoff = Backoff(0.1, RETRY_CAP_SECONDS, rng)
        self._lease: int | None = None  # the last one granted
        self._held = asyncio.Event()  # etcd has the present value, as far as we can know
        self._changed = asyncio.Event()  # there is another value to put
        self._keeper: asyncio.Task[NoReturn] | None = None

    def __repr__(self) -> str:
        return f"<Announcement {self._key} {'held' if self.is_held else 'lost'}>"

    @property
    def is_held(self) -> bool:
        return self._held.is_set()

    async def wait_held(self) -> None:
        """Until etcd has the key with its present value."""
        await self._held.wait()

    async def drain(self) -> None:
        """Tells that no new requests are wanted; waits 2 s at most until etcd knows."""
        if self._value_when_draining is None:
            raise ValueError(f"{self._key} was announced without a value for draining")
        self._value = self._value_when_draining
        self._held.clear()
        self._changed.set()
        await _within(GOODBYE_SECONDS, self._held.wait())

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep(), name=f"announce {self._key}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        self._held.clear()
        if self._lease is not None:
            await _within(GOODBYE_SECONDS, self._leases.revoke(self._lease))
        if self._keeper is not None and not self._keeper.cancelled():
            self._keeper.result()  # it never ends: only a bug of ours brings us here

    async def _keep(self) -> NoReturn:
        while True:
            with suppress(SourceFailure):
                await self._hold()
            self._held.clear()
            await asyncio.sleep(self._backoff.next_delay())

    async def _hold(self) -> NoReturn:
        """Lost => Held, and on until it is lost: then raises SourceFailure."""
        valid_until = _now() + self._ttl
        lease = self._lease = await self._leases.grant(self._ttl)
        while True:
            if not self._held.is_set():
                await self._put(lease)
            await self._wait_changed(self._ttl / 3)
            valid_until = await self._renew(lease, valid_until)

    async def _put(self, lease: int) -> None:
        value = self._value
        await self._leases.put(self._key, value, lease)
        if value == self._value:  # else it was drained meanwhile, and has to be put again
            self._held.set()
            self._backoff.reset()

    async def _wait_changed(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def _renew(self, lease: int, valid_until: float) -> float:
        """Until when the lease is ours now. Tries again while it may still be; raises LeaseLost after that."""
        while True:
            asked_at = _now()
            try:
                async with asyncio.timeout_at(valid_until):
                    return asked_at + await self._leases.keep_alive(lease)
            except LeaseLost:
                raise
            except (SourceFailure, TimeoutError) as failure:
                if _now() >= valid_until:
                    raise LeaseLost("not renewed in time") from failure
            await asyncio.sleep(self._backoff.next_delay())


def backend_announcement(
    leases: Leases, key: str, registration: Registration, *, rng: Random, prefix: str = DEFAULT_PREFIX
) -> Announcement:
    """Announces a backend as "service/id". Raises InvalidRegistration for what no gateway would take."""
    value = encode(registration)
    decode(key, value)
    return Announcement(
        leases, f"{prefix}/backends/{key}", value, rng=rng, value_when_draining=encode(registration.drained())
    )


async def _within(seconds: float, act: Awaitable[object]) -> None:
    """Waits for it that long; whether it worked is not of interest any more."""
    with suppress(TimeoutError, SourceFailure):
        async with asyncio.timeout(seconds):
            await act


def _now() -> float:
    return asyncio.get_running_loop().time()
