import asyncio
from random import Random

import pytest

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import InvalidRegistration, Registration, decode
from discovery.source import LeaseLost, Unavailable
from tests.support.virtual_clock import virtual_time


class Ledger:
    """Leases in memory, with etcd's rules: a lease that is not renewed takes its keys with it."""

    def __init__(self):
        self.is_away = self.is_frozen = False
        self.calls = []
        self._leases = {}  # id -> until when
        self._keys = {}  # key -> (value, lease)

    @property
    def keys(self):
        return {key: value for key, (value, lease) in self._keys.items() if self._leases.get(lease, 0) > now()}

    def forget_all(self):
        self._leases.clear()

    def seconds_left(self):
        return max(self._leases.values()) - now()

    async def grant(self, ttl):
        await self._answer("grant")
        self._leases[len(self.calls)] = now() + ttl
        self.ttl = ttl
        return len(self.calls)

    async def put(self, key, value, lease):
        await self._answer("put")
        self._demand(lease)
        self._keys[key] = (value, lease)
        return 1

    async def keep_alive(self, lease):
        await self._answer("keep_alive")
        self._demand(lease)
        self._leases[lease] = now() + self.ttl
        return float(self.ttl)

    async def revoke(self, lease):
        await self._answer("revoke")
        self._demand(lease)
        del self._leases[lease]

    def _demand(self, lease):
        if self._leases.get(lease, 0) <= now():
            raise LeaseLost("unknown")

    async def _answer(self, call):
        self.calls.append(call)
        if self.is_frozen:
            await asyncio.sleep(5)  # the client's own deadline
            raise Unavailable("no answer")
        if self.is_away:
            raise Unavailable("away")


def now():
    return asyncio.get_running_loop().time()


def announcement(ledger, **options):
    return Announcement(ledger, "/k", b"serving", rng=Random(0), value_when_draining=b"draining", **options)


async def settle():
    await asyncio.sleep(0.001)


@virtual_time
async def test_there_while_entered_and_gone_after():
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        assert ledger.keys == {"/k": b"serving"}
        assert repr(held) == "<Announcement /k held>"
        await asyncio.sleep(60)
        assert ledger.keys == {"/k": b"serving"}
        assert 17 <= ledger.calls.count("keep_alive") <= 18
        assert ledger.calls.count("put") == 1
    assert ledger.keys == {}
    assert repr(held) == "<Announcement /k lost>"


@virtual_time
async def test_a_lease_that_etcd_does_not_know_is_replaced():
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        ledger.forget_all()
        await asyncio.sleep(10 / 3 + 0.2)
        assert ledger.keys == {"/k": b"serving"}
        assert held.is_held


@virtual_time
async def test_silence_for_the_time_to_live_is_loss_by_our_own_clock():
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        ledger.is_frozen = True
        await asyncio.sleep(9.9)
        assert held.is_held
        await asyncio.sleep(0.2)
        assert not held.is_held
        ledger.is_frozen = False
        await asyncio.sleep(10.1)
        assert held.is_held
        assert ledger.keys == {"/k": b"serving"}


@virtual_time
async def test_a_short_absence_of_etcd_loses_nothing():
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        await asyncio.sleep(3)
        ledger.is_away = True
        await asyncio.sleep(4)
        assert held.is_held
        ledger.is_away = False
        await asyncio.sleep(4)
        assert ledger.calls.count("grant") == 1
        assert ledger.seconds_left() > 3


@virtual_time
async def test_etcd_away_for_an_hour_is_tried_again_without_haste_and_blocks_nothing():
    ledger = Ledger()
    ledger.is_away = True
    async with announcement(ledger) as held:
        await asyncio.sleep(3_600)
        assert not held.is_held
        assert 700 < len(ledger.calls) < 3_000
        ledger.is_away = False
        await asyncio.wait_for(held.wait_held(), 5.1)


@virtual_time
async def test_draining_is_told_before_the_end():
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        await held.drain()
        assert ledger.keys == {"/k": b"draining"}
        ledger.forget_all()
        await asyncio.sleep(10)
        assert ledger.keys == {"/k": b"draining"}  # also what is put again


@virtual_time
async def test_draining_while_the_first_put_is_under_way():
    class Slow(Ledger):
        async def put(self, key, value, lease):
            await asyncio.sleep(0.5)
            return await super().put(key, value, lease)

    ledger = Slow()
    async with announcement(ledger) as held:
        await asyncio.sleep(0.1)
        await held.drain()
        assert ledger.keys == {"/k": b"draining"}


@pytest.mark.parametrize("trouble", ["is_away", "is_frozen"])
@virtual_time
async def test_neither_draining_nor_the_end_waits_long_for_etcd(trouble):
    ledger = Ledger()
    async with announcement(ledger) as held:
        await held.wait_held()
        setattr(ledger, trouble, True)
        started = now()
        await held.drain()
        assert now() - started <= 2.01
        started = now()
    assert now() - started <= 2.01


@pytest.mark.parametrize("seconds", [0, 0.25, 0.75, 1.25, 4])
@virtual_time
async def test_it_can_be_ended_anywhere(seconds):
    class Slow(Ledger):
        async def _answer(self, call):
            await asyncio.sleep(0.5)
            await super()._answer(call)

    ledger = Slow()
    async with announcement(ledger):
        await asyncio.sleep(seconds)
    await asyncio.sleep(11)
    assert ledger.keys == {}
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_what_has_no_value_for_draining_cannot_drain():
    async with Announcement(Ledger(), "/gateways/g", b"{}", rng=Random(0)) as held:
        with pytest.raises(ValueError, match="without a value for draining"):
            await held.drain()


@virtual_time
async def test_a_bug_is_not_swallowed():
    class Broken(Ledger):
        async def grant(self, ttl):
            raise KeyError(ttl)

    with pytest.raises(KeyError):
        async with announcement(Broken()):
            await settle()


@virtual_time
async def test_a_backend_is_vetted_before_it_is_announced():
    ledger = Ledger()
    with pytest.raises(InvalidRegistration, match="url"):
        backend_announcement(ledger, "s/1", Registration(url="http://2130706433"), rng=Random(0))
    async with backend_announcement(ledger, "s/1", Registration(url="http://10.0.0.1"), rng=Random(0)) as held:
        await held.wait_held()
        (key, value), *_ = ledger.keys.items()
        assert key == "/weir/v1/backends/s/1"
        assert not decode("s/1", value).at("10.0.0.1").draining
        await held.drain()
        assert decode("s/1", ledger.keys[key]).at("10.0.0.1").draining
