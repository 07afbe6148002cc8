"""Who goes next, as stories; and that no tenant's share depends on how much it sends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_backend import admission
from reference_backend.admission import OUTPUT_WEIGHT, FairQueue, has_room
from reference_backend.engine.request import Priority, Sampling, Sequence

ARRIVALS = iter(range(1 << 30))


def request(tenant="", priority=Priority.NORMAL, *, at=0.0, tokens=10):
    made = Sequence([0] * tokens, Sampling(max_tokens=1), None, priority, tenant)
    made.arrival, made.arrived_at = next(ARRIVALS), at
    return made


def queue_of(*requests, age_seconds=10.0):
    queue = FairQueue(age_seconds)
    for each in requests:
        queue.push(each)
    return queue


def take(queue, now=0.0):
    head = queue.head(now)
    queue.remove(head)
    queue.charge(head.tenant, read=len(head.prompt))
    return head


def drained(queue, now=0.0):
    return [take(queue, now) for _ in range(len(queue))]


def test_one_tenant_is_served_in_order_of_arrival():
    requests = [request() for _ in range(5)]
    assert drained(queue_of(*requests)) == requests
    assert FairQueue(1.0).head(0.0) is None


def test_a_better_class_goes_first():
    low, normal, high = request(priority=Priority.LOW), request(), request(priority=Priority.HIGH)
    assert drained(queue_of(low, normal, high)) == [high, normal, low]


def test_waiting_makes_up_for_class():
    low, high = request(priority=Priority.LOW, at=0.0), request(priority=Priority.HIGH, at=19.0)
    queue = queue_of(low, high)
    assert queue.head(19.9) is high
    assert queue.head(20.0) is low  # two classes risen, and it was there first


def test_a_flood_does_not_stand_before_another_tenant():
    flood = [request("a") for _ in range(6)]
    light = request("b")
    assert drained(queue_of(*flood, light)).index(light) == 1


def test_who_sends_long_prompts_gets_fewer_of_them():
    queue = queue_of(*[request("long", tokens=30) for _ in range(3)], *[request("short") for _ in range(6)])
    order = [each.tenant for each in drained(queue)]
    assert [order[:4].count("long"), order[:8].count("long")] == [1, 2]


def test_generated_tokens_count_more():
    queue = queue_of(request("a"), request("b"))
    queue.charge("a", generated=2)
    queue.charge("b", read=2 * int(OUTPUT_WEIGHT) - 1)
    assert [each.tenant for each in drained(queue)] == ["b", "a"]


def test_who_has_a_handicap_goes_after_others_of_the_class():
    first, second, urgent = request("a"), request("b"), request("a", Priority.HIGH)
    queue = queue_of(first, second, urgent)
    order = []
    while (head := queue.head(0.0, handicap={"a": 1, "b": 0}.__getitem__)) is not None:
        queue.remove(head)
        order.append(head)
    assert order == [urgent, second, first]


def test_nobody_saves_up_by_pausing():
    queue = queue_of(request("busy"))
    queue.charge("busy", read=1000)
    queue.push(request("back"))
    assert queue.served("back") == queue.served("busy") == 1000
    take(queue)
    take(queue)
    queue.push(request("later"))  # nobody waits: it begins where the last one left
    assert queue.served("later") == 1010


def test_one_taken_out_leaves_the_others_in_order():
    first, second, third = request(), request(), request()
    queue = queue_of(first, second, third)
    queue.remove(second)
    assert list(queue) == drained(queue) == [first, third]
    assert len(queue) == 0


def test_tenants_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(admission, "REMEMBERED", 8)
    queue = queue_of(request("stays"))
    queue.charge("much", read=10_000)
    for number in range(50):
        passing = request(f"tenant {number}")
        queue.push(passing)
        queue.remove(passing)
    assert len(queue._served) <= 9
    assert queue.served("much") == 10_000
    assert "stays" in queue._served


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=60, max_size=60),
    flood=st.integers(1, 5),
)
def test_two_tenants_that_always_wait_get_equal_service(costs, flood):
    """The gap is bounded by the largest request, whoever sends more (VTC's theorem, for one request at a time)."""
    queue = queue_of(*[request("many") for _ in range(1 + flood)], *[request("one") for _ in range(2)])
    served = {"many": 0.0, "one": 0.0}
    largest = max(read + OUTPUT_WEIGHT * generated for read, generated in costs)
    for read, generated in costs:
        head = take(queue)
        queue.charge(head.tenant, generated=generated)
        served[head.tenant] += len(head.prompt) + OUTPUT_WEIGHT * generated
        queue.push(request(head.tenant, tokens=read))  # it always has something waiting
        assert abs(served["many"] - served["one"]) <= largest + 60


@pytest.mark.parametrize("priority", list(Priority))
def test_a_class_is_never_starved(priority):
    """One request of each class waits, while better ones keep coming."""
    queue = queue_of(request("poor", priority, at=0.0), age_seconds=1.0)
    for second in range(10):
        queue.push(request("rich", Priority.HIGH, at=float(second)))
        if take(queue, float(second)).tenant == "poor":
            return
    raise AssertionError("never served")


MADE_UP = [f"name {number}" for number in range(8)]


@pytest.mark.parametrize(
    ("in_flight", "consumer", "is_taken"),
    [
        ([], "light", True),
        (["flood"] * 7, "flood", True),  # alone it may have all
        (["flood"] * 8, "flood", False),
        (["flood"] * 8, "light", True),
        (["flood"] * 8 + ["light"], "light", True),
        (["flood"] * 8 + ["light"], "third", True),
        (["flood"] * 8 + ["light"] * 2, "third", False),  # nobody passes the last bound
        (["flood"] * 5 + ["light"] * 3, "light", True),
        (["flood"] * 5 + ["light"] * 3, "flood", False),
        (["flood"] * 4 + ["light"] * 4, "light", False),  # even shares
        (["flood"] * 4 + ["light"] * 4, "third", True),
        (MADE_UP, "name 0", False),
        (MADE_UP, "another", True),  # a name that nobody knows: as far as the reserve goes
        ([*MADE_UP, "another", "one more"], "the next", False),
        (["flood"] * 8, "", True),
        ([""] * 8, "", False),
    ],
)
def test_who_fills_the_bound_leaves_room_for_who_has_less(in_flight, consumer, is_taken):
    assert has_room(consumer, in_flight, bound=8) is is_taken


@pytest.mark.parametrize(("bound", "most"), [(1, 2), (2, 3), (4, 5), (5, 7), (32, 40)])
def test_names_that_are_made_up_are_taken_up_to_a_bound(bound, most):
    taken = []
    while has_room(f"name {len(taken)}", taken, bound):
        taken.append(f"name {len(taken)}")
    assert len(taken) == most


def test_beside_a_flood_that_never_ends_each_comes_to_its_even_share():
    in_flight = ["flood"] * 32
    for turn in range(200):
        for consumer in ("flood", "light", "other"):
            while has_room(consumer, in_flight, 32):
                in_flight.append(consumer)
        in_flight.pop(turn * 7 % len(in_flight))
    assert [in_flight.count(consumer) >= 9 for consumer in ("flood", "light", "other")] == [True] * 3
