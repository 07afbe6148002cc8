import asyncio
from contextlib import asynccontextmanager
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.source import Changes, Compacted, Deleted, KeyValue, Resynced, StateChanged, SyncState, Unavailable
from discovery.watch import Stream, Watch
from tests.support.scripted_source import ScriptedSource
from tests.support.virtual_clock import run, virtual_time


class Follower:
    """A watch, the mirror that its deltas make, and all it said."""

    def __init__(self, source, seed=0):
        self.source = source
        self.mirror = {}
        self.deltas = []
        self.events = []
        self.watch = Watch(source, self.apply, self.events.append, Random(seed))

    def apply(self, delta):
        assert delta.puts or delta.deletes
        self.deltas.append(delta)
        for key in delta.deletes:
            del self.mirror[key]  # nothing is deleted that was not there
        self.mirror.update((item.key, item.value) for item in delta.puts)

    @property
    def resyncs(self):
        return [event.reason for event in self.events if isinstance(event, Resynced)]

    @property
    def states(self):
        return [event.state.value for event in self.events if isinstance(event, StateChanged)]


@asynccontextmanager
async def following(source):
    follower = Follower(source)
    task = asyncio.create_task(follower.watch.run())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert source.open_watches == 0


async def settle():
    """Lets everything happen that needs no time to pass."""
    await asyncio.sleep(0.001)


@virtual_time
async def test_lists_then_watches():
    source = ScriptedSource()
    await source.put("a", b"1")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        assert follower.mirror == {"a": b"1"}
        await source.put("b", b"2")
        await source.put("a", b"3")
        await settle()
        assert follower.mirror == {"a": b"3", "b": b"2"}
        await source.delete("a")
        await settle()
        assert follower.mirror == {"b": b"2"}
        assert (follower.resyncs, follower.states, source.lists) == (["start"], ["watching"], 1)
        assert repr(follower.watch) == "<Watch watching revision=5 keys=1>"


@virtual_time
async def test_an_empty_source_is_listed_too():
    async with following(ScriptedSource()) as follower:
        await follower.watch.wait_listed()
        assert (follower.mirror, follower.deltas) == ({}, [])


@virtual_time
async def test_nothing_to_list_from_at_start_is_cold_and_tried_again_without_haste():
    source = ScriptedSource()
    source.is_away = True
    async with following(source) as follower:
        await asyncio.sleep(120)
        assert follower.watch.state is SyncState.COLD
        assert follower.watch.seconds_since_contact is None
        assert 12 <= source.lists <= 60
        source.is_away = False
        await asyncio.wait_for(follower.watch.wait_listed(), 10)
        await settle()
        assert (follower.resyncs, follower.states) == (["start"], ["cold", "watching"])


@virtual_time
async def test_what_was_known_stays_however_long_the_source_is_away():
    source = ScriptedSource()
    await source.put("a")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        source.is_away = True
        await source.break_watches()
        await asyncio.sleep(3600)
        assert follower.watch.state is SyncState.STALE
        assert follower.watch.seconds_since_contact > 3500
        assert follower.mirror == {"a": b"v"}
        source.is_away = False
        await asyncio.sleep(10.1)
        assert (follower.watch.state, follower.states) == (SyncState.WATCHING, ["watching", "stale", "watching"])


@virtual_time
async def test_deletes_while_it_was_away_are_found_by_the_next_listing():
    source = ScriptedSource()
    await source.put("a")
    await source.put("b")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        source.is_away = True
        await source.break_watches()
        await source.delete("a")
        await source.put("c")
        await source.compact()
        source.is_away = False
        await asyncio.sleep(1)
        assert follower.mirror == source.keys
        assert follower.resyncs == ["start", "lost"]
        assert [delta.deletes for delta in follower.deltas] == [(), ("a",)]


@virtual_time
async def test_history_compacted_between_listing_and_watch_is_listed_again():
    source = ScriptedSource()

    class Slow(ScriptedSource):
        async def list(self):
            listing = await super().list()
            if self.lists == 1:
                await self.put("late")
                await self.compact()
            return listing

    source = Slow()
    async with following(source) as follower:
        await asyncio.sleep(1)
        assert follower.mirror == {"late": b"v"}
        assert follower.resyncs == ["start", "compacted"]


@virtual_time
async def test_a_lagging_watch_that_is_compacted_away_lists_again():
    source = ScriptedSource()
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        await source.break_watches(Compacted("too slow"))
        await asyncio.sleep(1)
        assert follower.resyncs == ["start", "compacted"]


@virtual_time
async def test_a_frozen_source_is_noticed_within_30_s():
    source = ScriptedSource()
    await source.put("a")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        source.is_frozen = True
        await asyncio.sleep(30.1)
        assert follower.watch.state is SyncState.STALE
        assert follower.mirror == {"a": b"v"}
        source.is_frozen = False
        await source.delete("a")
        await asyncio.sleep(41)
        assert (follower.mirror, follower.resyncs[:2]) == ({}, ["start", "frozen"])


@virtual_time
async def test_a_watch_that_does_not_say_what_a_ping_finds_is_reopened():
    source = ScriptedSource()
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        source.is_deaf = True
        await source.put("a")
        await asyncio.sleep(26)
        assert (follower.mirror, follower.resyncs) == ({"a": b"v"}, ["start", "frozen"])


@virtual_time
async def test_deletes_that_the_watch_never_tells_are_found_within_66_s():
    source = ScriptedSource()
    await source.put("a")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        source.is_deaf = True
        await source.delete("a")
        await asyncio.sleep(66.1)
        assert (follower.mirror, follower.resyncs) == ({}, ["start", "periodic"])
        assert source.watches == 2  # such a watch is not trusted any further


@virtual_time
async def test_silence_with_an_answer_to_the_ping_is_peace():
    source = ScriptedSource()
    await source.put("a")
    async with following(source) as follower:
        await asyncio.sleep(600)
        assert follower.states == ["watching"]
        assert source.watches == 1
        assert 9 <= source.lists <= 12
        assert source.pings >= 15
        assert len(follower.deltas) == 1
        assert follower.watch.seconds_since_contact <= 25


@virtual_time
async def test_a_wiped_cluster_is_told_and_everything_in_it_is_news():
    source = ScriptedSource()
    for key in "abc":
        await source.put(key, b"old")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        await source.wipe()
        await source.put("b", b"new")
        await asyncio.sleep(1)
        assert follower.mirror == {"b": b"new"}
        assert "cluster_changed" in follower.resyncs


@virtual_time
async def test_a_revision_that_went_back_is_another_history_too():
    source = ScriptedSource()
    await source.put("a", b"old")
    await source.put("b")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        cluster_id = source.cluster_id
        await source.wipe()
        source.cluster_id = cluster_id
        await source.put("a", b"restored")
        await asyncio.sleep(1)
        assert follower.mirror == {"a": b"restored"}
        assert follower.resyncs == ["start", "cluster_changed"]


@virtual_time
async def test_old_and_repeated_news_changes_nothing():
    source = ScriptedSource()
    await source.put("a", b"1")  # 2
    await source.put("a", b"2")  # 3
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await source.tell(KeyValue("a", b"1", 2), Deleted("a", 2), KeyValue("a", b"2", 3))
        await source.put("b", b"1")  # 4
        await source.delete("b")  # 5
        await settle()
        await source.tell(KeyValue("b", b"1", 4), Deleted("b", 5), Deleted("never", 5))
        await settle()
        assert follower.mirror == {"a": b"2"}
        assert sum(len(delta.puts) + len(delta.deletes) for delta in follower.deltas) <= 3


@virtual_time
async def test_of_many_changes_at_once_the_newest_of_each_key_is_handed_on():
    source = ScriptedSource()
    async with following(source) as follower:
        await follower.watch.wait_listed()
        await settle()
        await source.tell(
            KeyValue("a", b"1", 2),
            KeyValue("b", b"1", 2),
            KeyValue("a", b"2", 3),
            Deleted("b", 4),
            KeyValue("c", b"1", 5),
        )
        await settle()
        assert follower.mirror == {"a": b"2", "c": b"1"}
        assert [item.value for item in follower.deltas[0].puts] == [b"2", b"1"]


@virtual_time
async def test_a_forgotten_key_comes_again_with_the_next_listing():
    source = ScriptedSource()
    await source.put("a")
    async with following(source) as follower:
        await follower.watch.wait_listed()
        follower.watch.forget("a")
        await asyncio.sleep(67)
        assert [item.key for delta in follower.deltas for item in delta.puts] == ["a", "a"]


@virtual_time
async def test_a_watch_that_breaks_as_soon_as_it_stands_is_no_tight_loop():
    class Brittle(ScriptedSource):
        async def watch(self, revision):
            self.watches += 1
            yield Changes()
            raise Unavailable("permission denied")

    source = Brittle()
    async with following(source):
        await asyncio.sleep(600)
        assert source.watches < 200


@virtual_time
async def test_after_a_watch_that_stood_the_first_retry_is_quick():
    source = ScriptedSource()
    async with following(source) as follower:
        for _ in range(20):
            await asyncio.sleep(11)
            assert follower.watch.state is SyncState.WATCHING
            await source.break_watches()
            await asyncio.sleep(0.2)
            assert follower.watch.state is SyncState.WATCHING


@pytest.mark.parametrize("seconds", [0, 0.0001, 0.5, 26, 59, 70])
@pytest.mark.parametrize("trouble", ["is_away", "is_frozen", "is_deaf", None])
@virtual_time
async def test_it_can_be_ended_anywhere(seconds, trouble):
    source = ScriptedSource()
    await source.put("a")
    async with following(source):
        if trouble:
            await asyncio.sleep(seconds / 2)
            setattr(source, trouble, True)
        await asyncio.sleep(seconds)


@virtual_time
async def test_a_stream_keeps_what_comes_after_the_limit():
    async def slow():
        await asyncio.sleep(1)
        yield Changes((Deleted("a", 1),))

    stream = Stream(slow())
    assert await stream.next(0.4) is None
    assert await stream.next(0.4) is None
    assert (await stream.next(0.4)).events == (Deleted("a", 1),)
    with pytest.raises(Unavailable, match="ended"):
        await stream.next(1)
    await stream.aclose()


keys = st.sampled_from("abcd")
acts = st.one_of(
    st.tuples(st.just("put"), keys, st.binary(max_size=1)),
    st.tuples(st.just("delete"), keys),
    st.tuples(st.just("break_watches")),
    st.tuples(st.just("compact")),
    st.tuples(st.just("wipe")),
    st.tuples(st.sampled_from(["is_away", "is_frozen", "is_deaf"]), st.booleans()),
    st.tuples(st.just("pass"), st.sampled_from([0.001, 0.3, 7.0, 40.0])),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(acts, max_size=25))
def test_whatever_happens_the_mirror_is_right_in_the_end(story):
    async def live():
        source = ScriptedSource()
        async with following(source) as follower:
            for verb, *values in story:
                if verb == "pass":
                    await asyncio.sleep(values[0])
                elif verb.startswith("is_"):
                    setattr(source, verb, values[0])
                else:
                    await getattr(source, verb)(*values)
            source.is_away = source.is_frozen = source.is_deaf = False
            await asyncio.sleep(150)
            assert follower.mirror == source.keys
            assert follower.watch.state is SyncState.WATCHING

    run(live())
