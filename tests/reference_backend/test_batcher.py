"""Who goes in which batch and when, as stories; and what holds for any arrivals, in virtual time."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_backend.batcher import UNDER_WAY, Batcher, Batches, Limits, Request
from reference_backend.tensors import Lost, Terms
from tests.support.virtual_clock import run, virtual_time


def batches(size=4, **limits):
    return Batches(Limits(size, **limits))


def added(room, *names, now=0.0, key=None, **terms):
    """A request for each name, of one part."""
    requests = [Request([(name, 1)], key, Terms(**terms)) for name in names]
    for request in requests:
        room.add(request, now)
    return requests


def names(batch):
    return "".join(each.payload for each in batch)


def test_an_idle_runner_takes_whatever_there_is_at_once():
    room = batches()
    added(room, "a")
    assert names(room.next(0.0)) == "a"
    assert repr(room) == "<Batches 1 under way, 0 waiting>"
    assert room.next(0.0) == []


def test_a_busy_one_lets_them_gather_and_the_end_of_its_batch_takes_all():
    room = batches()
    added(room, "a")
    room.next(0.0)
    added(room, "b", "c", now=1.0)
    assert room.next(1.0) == []
    room.over()
    assert names(room.next(2.0)) == "bc"


def test_a_full_batch_is_made_while_another_runs_and_no_third():
    room = batches(size=2)
    added(room, "a")
    room.next(0.0)
    added(room, "b", "c", "d", "e")
    assert [names(room.next(0.0)) for _ in range(2)] == ["bc", ""]
    room.over()
    assert names(room.next(0.0)) == "de"


def test_sizes_are_summed_and_a_larger_item_goes_alone():
    room = batches(size=10)
    room.add(Request([("a", 6), ("b", 5), ("c", 5), ("d", 99), ("e", 1)]), 0.0)
    made = []
    while room.waiting:
        made.append(names(room.next(0.0)))
        room.over()
    assert made == ["a", "bc", "d", "e"]


def test_what_has_no_size_is_run_like_any():
    room = batches()
    room.add(Request([("a", 0)]), 0.0)
    assert names(room.next(0.0)) == "a"


def test_what_cannot_lie_together_goes_apart_and_nobody_passes_his_own():
    room = batches(size=9)
    added(room, "a", key="small")
    added(room, "b", key="large")
    added(room, "c", key="small")
    added(room, "x", "y", key="small", tenant="other")
    made = []
    while room.waiting:
        made.append(names(room.next(0.0)))
        room.over()
    assert made == ["axy", "b", "c"]


def test_tenants_take_turns_however_much_one_sends():
    room = batches(size=2)
    added(room, *"abcdef", tenant="flood")
    added(room, *"xy", tenant="light")
    made = []
    while room.waiting:
        made.append(names(room.next(0.0)))
        room.over()
    assert made == ["ax", "by", "cd", "ef"]


def test_classes_come_before_that():
    room = batches(size=1)
    added(room, "l", priority=2)
    added(room, "h", priority=0)
    assert names(room.next(0.0)) == "h"


def test_the_parts_of_one_request_take_turns_with_those_of_others():
    room = batches(size=2)
    room.add(Request([(name, 1) for name in "abcd"], terms=Terms(tenant="flood")), 0.0)
    room.add(Request([("x", 1), ("y", 1)], terms=Terms(tenant="light")), 0.0)
    made = []
    while room.waiting:
        made.append(names(room.next(0.0)))
        room.over()
    assert made == ["ax", "by", "cd"]


def test_what_is_withdrawn_takes_no_place():
    room = batches(size=2)
    first, *_ = added(room, "a", "b", "c")
    room.withdraw(first)
    room.withdraw(first)
    assert names(room.next(0.0)) == "bc"
    room.over()
    begun = Request([(name, 1) for name in "xyz"])
    room.add(begun, 0.0)
    assert names(room.next(0.0)) == "xy"
    room.withdraw(begun)
    room.over()
    [last] = added(room, "d")
    room.withdraw(last)
    assert room.next(0.0) == []
    assert (room.waiting, room.under_way) == (0, 0)


def test_with_a_delay_an_idle_runner_waits_for_company_but_not_for_long():
    room = batches(size=2, delay=0.5)
    added(room, "a", now=1.0)
    assert room.next(1.4) == []
    assert room.due() == 1.5
    assert names(room.next(1.5)) == "a"
    room.over()
    added(room, "b", "c", now=2.0)
    assert names(room.next(2.0)) == "bc"  # full: there is nobody to wait for


@dataclass
class Runner:
    """Runs one batch after another, in the order in which they came, each for as long as it is told."""

    seconds: float = 1.0
    poison: str = ""
    made: list[str] = field(default_factory=list)
    ran: list[tuple[float, float]] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, payloads):
        self.made.append("".join(map(str, payloads)))
        async with self.turn:
            began = now()
            await asyncio.sleep(self.seconds)
            self.ran.append((began, now()))
        if self.poison and self.poison in payloads:
            raise ValueError(self.poison)
        return [f"{payload}!" for payload in payloads]


def now():
    return asyncio.get_running_loop().time()


def batcher(runner, size=4, **limits):
    return Batcher(runner, Limits(size, **limits), now)


async def ask(subject, *payloads, **kwargs):
    return await subject.ask([(payload, 1) for payload in payloads], **kwargs)


@virtual_time
async def test_answers_come_in_the_order_of_the_parts_from_as_many_batches_as_it_takes():
    runner = Runner()
    async with batcher(runner, size=2) as subject:
        assert await ask(subject, *"abcde") == ["a!", "b!", "c!", "d!", "e!"]
        assert await ask(subject) == []
    assert runner.made == ["ab", "cd", "e"]
    assert now() == 3.0


@virtual_time
async def test_a_client_that_leaves_takes_no_place():
    runner = Runner()
    async with batcher(runner) as subject, asyncio.TaskGroup() as group:
        group.create_task(ask(subject, "a"))
        await asyncio.sleep(0)
        leaves = group.create_task(ask(subject, *"bc"))
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.sleep(0.5)
        assert await ask(subject, "d") == ["d!"]
    assert runner.made == ["a", "d"]


@virtual_time
async def test_only_what_is_at_fault_fails():
    runner = Runner(poison="b")
    async with batcher(runner) as subject, asyncio.TaskGroup() as group:
        group.create_task(ask(subject, "x"))
        await asyncio.sleep(0)
        tasks = [group.create_task(ask(subject, name)) for name in "ac"]
        with pytest.raises(ValueError, match="b"):
            await ask(subject, "b")
        assert [await task for task in tasks] == [["a!"], ["c!"]]
    assert runner.made == ["x", "bac", "b", "a", "c"]


@virtual_time
async def test_of_a_request_that_fails_nothing_more_is_run():
    runner = Runner(poison="a")
    async with batcher(runner, size=2) as subject:
        with pytest.raises(ValueError, match="a"):
            await ask(subject, *"abcdefgh")
        assert subject.batches.waiting == 0
    assert runner.made == ["ab", "cd", "a", "ef"]  # two batches are under way


@virtual_time
async def test_who_waits_when_it_closes_is_told():
    subject = batcher(Runner(seconds=100.0), delay=50.0, size=2)
    async with subject:
        tasks = [asyncio.create_task(ask(subject, *names)) for names in ("ab", "c", "d")]
        await asyncio.sleep(1.0)
    for task in tasks:
        with pytest.raises(Lost):
            await task
    assert (subject.batches.waiting, subject.batches.under_way) == (0, 0)


@virtual_time
async def test_a_delay_gathers_what_comes_meanwhile():
    runner = Runner()
    async with batcher(runner, delay=0.5) as subject, asyncio.TaskGroup() as group:
        group.create_task(ask(subject, "a"))
        await asyncio.sleep(0.3)
        assert await ask(subject, "b") == ["b!"]
    assert runner.made == ["ab"]
    assert runner.ran == [(0.5, 1.5)]


arrivals = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.5, 3.0]),  # seconds after the one before
        st.lists(st.integers(1, 4), min_size=1, max_size=3),  # sizes of the parts
        st.sampled_from("ab"),  # tenant
        st.sampled_from("xy"),  # key
        st.none() | st.floats(0, 4),  # seconds until its client leaves
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(arrivals=arrivals, seconds=st.floats(0.2, 3), size=st.integers(2, 16))
def test_for_any_arrivals(arrivals, seconds, size):
    run(_check(arrivals, seconds, size))


async def _check(arrivals, seconds, size):
    made, running, answered = [], 0, []

    async def carry_out(payloads):
        nonlocal running
        made.append(payloads)
        running += 1
        assert running <= UNDER_WAY
        await asyncio.sleep(seconds)
        running -= 1
        return [number for number, *_ in payloads]

    async def client(numbers, sizes, tenant, key, leaves):
        parts = [((number, part, tenant, key), part) for number, part in zip(numbers, sizes, strict=True)]
        try:
            async with asyncio.timeout(leaves):
                answers = await subject.ask(parts, key, Terms(tenant=tenant))
                assert answers == list(numbers)
        except TimeoutError:
            pass
        finally:
            answered.append(numbers)

    async def watch():
        while True:
            await asyncio.sleep(0.05)
            assert subject.batches.under_way or not subject.batches.waiting, "something waits while nothing runs"

    async with Batcher(carry_out, Limits(size), now) as subject:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            clients = []
            first = 0
            for pause, sizes, *rest in arrivals:
                await asyncio.sleep(pause)
                numbers = range(first, first := first + len(sizes))
                clients.append(group.create_task(client(numbers, sizes, *rest)))
            await asyncio.wait(clients)
            watcher.cancel()
        while subject.batches.under_way:  # of clients that left
            await asyncio.sleep(seconds)
    assert len(answered) == len(arrivals)
    assert subject.batches.waiting == 0
    assert subject._answered == {}
    for batch in made:
        assert len({key for *_, key in batch}) == 1
        assert len(batch) == 1 or sum(part for _, part, *_ in batch) <= size
    for tenant in "ab":
        order = [number for batch in made for number, _, owner, _ in batch if owner == tenant]
        assert order == sorted(set(order)), "passed, or run twice"
