from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from discovery.endpoint import Endpoint
from discovery.store import DAMPING_SECONDS, GRACE_SECONDS, PACE_SECONDS, Statistics, Store


def backend(key, **fields):
    service, _, name = key.partition("/")
    return Endpoint(key=key, service=service, id=name, scheme="http", host="h", port=1, address="10.0.0.1", **fields)


class Registry:
    """A store, who passes their checks, and every snapshot it published."""

    def __init__(self, *keys, passing=True):
        self.passing = set(keys) if passing else set()
        self.store = Store(lambda key: key in self.passing)
        self.published = []
        self.store.subscribe(self.published.append)
        self.put(*map(backend, keys), now=0.0)

    def put(self, *endpoints, now):
        self.store.apply(endpoints, (), (), now)

    def delete(self, *keys, now):
        self.store.apply((), keys, (), now)

    @property
    def keys(self):
        return set(self.store.snapshot.endpoints)


def test_one_listing_is_one_snapshot():
    registry = Registry("a/1", "a/2", "b/1")
    assert len(registry.published) == 1
    assert registry.published[0] is registry.store.snapshot
    assert {name: [each.id for each in members] for name, members in registry.store.snapshot.services.items()} == {
        "a": ["1", "2"],
        "b": ["1"],
    }


def test_a_snapshot_never_changes_and_what_did_not_change_is_the_same_object():
    registry = Registry("a/1", "a/2", "b/1")
    before = registry.store.snapshot
    registry.put(backend("a/1"), replace(backend("a/2"), weight=5), now=10.0)
    after = registry.store.snapshot
    assert before.endpoints["a/2"].weight == 1
    assert after.endpoints["a/2"].weight == 5
    assert after.endpoints["a/1"] is before.endpoints["a/1"]
    assert after.services["b"] is before.services["b"]
    with pytest.raises(TypeError):
        after.endpoints["x"] = None


def test_nothing_new_is_not_told():
    registry = Registry("a/1")
    registry.put(backend("a/1"), now=10.0)
    registry.delete("never/there", now=11.0)
    registry.store.advance(12.0)
    assert len(registry.published) == 1


def test_a_subscriber_may_leave_and_a_failing_one_keeps_nothing_from_the_others(caplog):
    registry = Registry("a/1")
    leave = registry.store.subscribe(lambda _: 1 / 0)
    later = []
    registry.store.subscribe(later.append)
    registry.put(backend("a/2"), now=5.0)
    leave()
    registry.put(backend("a/3"), now=6.0)
    assert len(later) == 2
    assert [record.message for record in caplog.records] == ["a subscriber of discovery failed"]


def test_a_flapping_backend_changes_once_in_two_seconds_and_the_newest_wins():
    registry = Registry("a/1", "a/2", "a/3")
    for i in range(101):  # ten times a second for ten seconds
        now = 10 + i / 10
        registry.store.advance(now)
        if i % 2:
            registry.put(backend("a/1"), now=now)
        else:
            registry.delete("a/1", now=now)
    assert len(registry.published) - 1 <= 6
    registry.store.advance(30.0)
    assert registry.keys == {"a/2", "a/3"}  # the hundredth change, and the last


def test_a_change_back_within_the_time_is_no_change():
    registry = Registry("a/1", "a/2", "a/3")
    registry.put(replace(backend("a/1"), draining=True), now=1.0)
    assert registry.store.next_due() == DAMPING_SECONDS
    registry.put(backend("a/1"), now=1.5)
    assert registry.store.next_due() is None
    registry.store.advance(3.0)
    assert len(registry.published) == 1


def test_up_to_half_may_leave_at_once():
    registry = Registry("a/1", "a/2", "a/3", "a/4")
    registry.delete("a/1", "a/2", now=10.0)
    assert registry.keys == {"a/3", "a/4"}


def test_a_mass_loss_is_held_while_checks_pass_and_then_believed():
    registry = Registry("a/1", "a/2", "a/3")
    registry.delete("a/1", "a/2", "a/3", now=10.0)
    assert registry.keys == {"a/1", "a/2", "a/3"}
    assert registry.store.statistics() == Statistics(endpoints=3, held=3, damped=0)
    registry.passing.discard("a/2")
    registry.store.advance(11.0)
    assert registry.keys == {"a/1", "a/3"}
    assert registry.store.next_due() == 10.0 + GRACE_SECONDS
    registry.put(backend("a/3"), now=12.0)
    registry.store.advance(10.0 + GRACE_SECONDS)
    assert registry.keys == {"a/3"}
    assert repr(registry.store) == "<Store v3: 1 endpoints, 0 held, 0 damped>"


def test_backends_that_are_held_and_come_back_were_never_gone():
    registry = Registry("a/1", "a/2", "a/3")
    registry.delete("a/1", "a/2", "a/3", now=10.0)
    registry.put(backend("a/1"), backend("a/2"), backend("a/3"), now=13.0)
    registry.store.advance(60.0)
    assert len(registry.published) == 1


def test_a_slow_trickle_of_sudden_losses_is_held_from_the_half_on():
    registry = Registry(*(f"a/{i}" for i in range(10)))
    for i in range(10):
        registry.delete(f"a/{i}", now=10.0 + i)
    assert registry.keys == {f"a/{i}" for i in range(5, 10)}


def test_losses_far_apart_are_no_mass_loss():
    registry = Registry(*(f"a/{i}" for i in range(3)))
    registry.delete("a/0", now=100.0)
    registry.delete("a/1", now=200.0)
    assert registry.keys == {"a/2"}


def test_a_dead_backend_is_not_held():
    registry = Registry("a/1", passing=False)
    registry.delete("a/1", now=10.0)
    assert registry.keys == set()


def test_whoever_said_draining_leaves_at_once():
    registry = Registry("a/1")
    registry.put(replace(backend("a/1"), draining=True), now=10.0)
    registry.delete("a/1", now=13.0)
    assert registry.keys == set()


def test_a_rejected_registration_is_dropped_at_once_whatever_waits():
    registry = Registry("a/1", "a/2")
    registry.put(replace(backend("a/1"), weight=9), now=0.5)
    registry.delete("a/1", "a/2", now=1.0)
    registry.store.apply((), (), ("a/1", "a/2", "never/there"), 1.0)
    assert registry.keys == set()
    registry.store.advance(100.0)
    assert registry.keys == set()


def test_of_a_burst_the_first_is_told_at_once_and_the_rest_together():
    registry = Registry()
    for i in range(1000):
        registry.put(backend(f"a/{i}"), now=10 + i / 10_000)
    assert len(registry.published) == 1
    assert registry.store.next_due() == 10 + PACE_SECONDS
    assert registry.store.is_behind
    registry.store.advance(10 + PACE_SECONDS)
    assert not registry.store.is_behind
    assert len(registry.published) == 2
    assert len(registry.keys) == 1000


KEYS = [f"{service}/{i}" for service in "ab" for i in range(3)]


class StoreMachine(RuleBasedStateMachine):
    """Whatever the news: whole snapshots, damped, never half empty by deletes alone, right in the end."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.passing = set()
        self.truth = {}
        self.rejected_at = {}
        self.changed_at = {}
        self.store = Store(lambda key: key in self.passing)
        self.last = self.store.snapshot
        self.told = []
        self.store.subscribe(lambda snapshot: self.told.append((self.now, snapshot)))

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1), weight=st.integers(1, 3), draining=st.booleans())
    def put(self, keys, weight, draining):
        endpoints = [replace(backend(key), weight=weight, draining=draining) for key in sorted(keys)]
        self.truth.update((each.key, each) for each in endpoints)
        self.store.apply(endpoints, (), (), self.now)

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def delete(self, data):
        keys = data.draw(st.sets(st.sampled_from(sorted(self.truth)), min_size=1))
        for key in keys:
            del self.truth[key]
        self.store.apply((), sorted(keys), (), self.now)

    @rule(key=st.sampled_from(KEYS))
    def reject(self, key):
        self.truth.pop(key, None)
        self.rejected_at[key] = self.now
        self.store.apply((), (), (key,), self.now)
        self.wait(PACE_SECONDS)
        assert key not in self.store.snapshot.endpoints

    @rule(key=st.sampled_from(KEYS), passes=st.booleans())
    def check(self, key, passes):
        (self.passing.add if passes else self.passing.discard)(key)

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 7.0, 15.0]))
    def wait(self, seconds):
        end = self.now + seconds
        while (due := self.store.next_due()) is not None and due <= end:
            self.now = max(self.now, due)
            self.store.advance(self.now)
        self.now = end
        self.store.advance(self.now)

    @invariant()
    def each_snapshot_follows_from_the_last(self):
        for now, snapshot in self.told:
            assert snapshot.version == self.last.version + 1
            for key in KEYS:
                old, new = self.last.endpoints.get(key), snapshot.endpoints.get(key)
                if old == new:
                    assert old is new
                    continue
                if now - self.rejected_at.get(key, -10.0) > 2 * PACE_SECONDS:
                    assert now >= self.changed_at.get(key, -10.0) + DAMPING_SECONDS - 2 * PACE_SECONDS
                self.changed_at[key] = now
            self.last = snapshot
        self.told.clear()
        assert self.store.snapshot is self.last

    @invariant()
    def both_views_are_one(self):
        snapshot = self.store.snapshot
        by_service = {each.key: each for members in snapshot.services.values() for each in members}
        assert by_service == dict(snapshot.endpoints)
        assert all(snapshot.services.values())

    def teardown(self):
        self.wait(GRACE_SECONDS + 2 * DAMPING_SECONDS)
        assert dict(self.store.snapshot.endpoints) == self.truth
        assert self.store.next_due() is None


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
