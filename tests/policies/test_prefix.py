import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.balance import Candidate, Chooser
from policies.policy import Balance, BalanceKind
from policies.prefix import CHUNK_BYTES, MOST_CHUNKS, PrefixIndex, chain_of

PREFIX, LEAST_LOAD = Balance(BalanceKind.PREFIX), Balance(BalanceKind.LEAST_LOAD)
NOW = 1000.0


def body(*texts: str, **more) -> bytes:
    return json.dumps({**more, "messages": [{"role": "user", "content": text} for text in texts]}).encode()


# Chains


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (body("x" * 1000), body("x" * 1000), "all"),
        (body("x" * 1000), body("x" * 1000, temperature=1), "all"),  # what stands before the prompt does not matter
        (body("x" * 1000), body("x" * 1000, "and then?"), "most"),  # the next turn
        (body("x" * 1000), body("y" * 1000), "none"),
        (body("x" * 1000), body("y" + "x" * 999), "none"),  # equal chunks behind another beginning are not equal
        (b'{"prompt": "%b"}' % (b"x" * 1000), b'{"n": 1, "prompt": "%b"}' % (b"x" * 1000), "all"),
        (b"x" * 1000, b"x" * 1000, "all"),  # no JSON at all
        (body("x"), body("x"), "all"),
        (b"", b"", "all"),
    ],
)
def test_what_begins_alike_has_the_beginning_of_its_chain_in_common(one, other, shared) -> None:
    first, second = chain_of(one, "tiny"), chain_of(other, "tiny")
    alike = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert {
        "all": alike == len(first) == len(second),
        "most": 0.9 <= alike / max(1, len(first)) <= 1,
        "none": alike < 2,
    }[shared]


def test_another_model_shares_nothing() -> None:
    assert not set(chain_of(body("x" * 1000), "tiny")) & set(chain_of(body("x" * 1000), "small"))


def test_a_chain_is_bounded_and_a_chunk_that_is_not_full_has_no_name() -> None:
    assert len(chain_of(b"x" * (CHUNK_BYTES * MOST_CHUNKS * 3), "")) == MOST_CHUNKS
    assert [len(chain_of(b"x" * size, "")) for size in (0, 63, 64, 127, 128)] == [0, 0, 1, 1, 2]


# The index


def test_a_prompt_is_known_when_sent_and_confirmed_when_answered() -> None:
    index, chain = PrefixIndex(), chain_of(b"x" * 640, "")
    assert (index.matched(chain), index.note(chain)) == (0, 0)
    assert (index.matched(chain), index.note(chain)) == (10, 0)  # the first is not answered yet
    index.learn(chain, 0.0, 0.0)
    assert (index.matched(chain), index.note(chain)) == (10, 10)
    longer = chain_of(b"x" * 640 + b"y" * 128, "")
    assert (index.matched(longer), index.note(longer)) == (10, 10)


def test_what_was_used_last_is_kept_and_the_ends_of_the_others_go_first() -> None:
    index = PrefixIndex(cache_tokens=64 * 16)  # 64 chunks
    first, second, third = (chain_of(bytes([letter]) * 64 * 30, "") for letter in b"abc")
    index.note(first)
    index.note(second)
    index.note(first)
    index.note(third)
    assert (len(index), index.matched(first), index.matched(second), index.matched(third)) == (64, 30, 4, 30)


@pytest.mark.parametrize(("cache_tokens", "capacity"), [(0, 8192), (1, 64), (16_000, 1000), (10**8, 65_536)])
def test_its_size_follows_from_the_cache_within_bounds(cache_tokens, capacity) -> None:
    index = PrefixIndex()
    index.fit(cache_tokens)
    assert repr(index) == f"<PrefixIndex 0 of {capacity} chunks, at most {capacity}>"


def test_it_learns_that_the_cache_forgets_sooner_and_that_it_holds_more_again() -> None:
    index = PrefixIndex(cache_tokens=16_000)
    chain = chain_of(b"x" * 64 * 100, "")
    index.note(chain)
    for _ in range(100):
        index.learn(chain, expected=0.9, found=0.1)
    assert (repr(index), len(index)) == ("<PrefixIndex 64 of 64 chunks, at most 1000>", 64)
    for _ in range(1000):
        index.learn(chain, expected=0.9, found=0.8)
    assert repr(index).endswith("of 1000 chunks, at most 1000>")


@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=12), st.sampled_from(["note", "learn", "miss", "fit"])),
        max_size=40,
    )
)
def test_whatever_happens_a_known_chunk_has_known_chunks_before_it(steps) -> None:
    index = PrefixIndex(cache_tokens=64 * 16)
    for text, what in steps:
        chain = chain_of(b"".join(letter.encode() * 64 * 8 for letter in text), "")
        if what == "note":
            confirmed = index.note(chain)
            assert confirmed <= index.matched(chain)
        elif what == "fit":
            index.fit(64 * 16)
        else:
            index.learn(chain, 1.0, 1.0 if what == "learn" else 0.0)
        known = [name in index._known for name in chain]
        assert known == sorted(known, reverse=True)
        assert index.matched(chain) == sum(known)
        confirmed = [index._known.get(name, False) for name in chain]
        assert confirmed == sorted(confirmed, reverse=True)
        assert len(index) <= 64


# Choosing by it


def backends(count: int, **loads: int) -> tuple[Candidate, ...]:
    made = tuple(Candidate("abcdefghij"[number], 1, None, 0.0) for number in range(count))
    for candidate in made:
        candidate.inflight = loads.get(candidate.key, 0)
    return made


def choose(candidates, chain, seed=1, **more):
    return Chooser(candidates).choose(PREFIX, Random(seed), NOW, chain=chain, **more)


def seen(candidate, *texts: bytes) -> None:
    candidate.prefixes = candidate.prefixes or PrefixIndex()
    for text in texts:
        candidate.prefixes.note(chain_of(text, ""))


LONG, LONGER = b"x" * 640, b"x" * 1280


@pytest.mark.parametrize(
    ("loads", "has_seen", "chosen"),
    [
        ({}, {"b": LONG}, "b"),
        ({}, {"b": LONG, "c": LONGER}, "c"),
        ({"b": 1}, {"b": LONGER, "c": LONGER}, "c"),  # of equals the less loaded
        ({"c": 3, "a": 1}, {"b": LONG, "c": LONGER}, "c"),
        ({"c": 9}, {"b": LONG, "c": LONGER}, "b"),  # too loaded: the next best
        ({"b": 7, "c": 7, "a": 6}, {"c": LONGER}, "c"),  # all are loaded alike
        ({"c": 9, "b": 9}, {"c": b"y" * 640}, "a"),  # nobody has seen it: least_load
        ({"c": 9, "b": 9}, {}, "a"),
    ],
)
def test_who_has_seen_most_of_it_unless_too_loaded(loads, has_seen, chosen) -> None:
    candidates = backends(3, **loads)
    for candidate in candidates:
        if candidate.key in has_seen:
            seen(candidate, has_seen[candidate.key])
    drawn = {choose(candidates, chain_of(LONGER, ""), seed).key for seed in range(20)}
    assert chosen in drawn
    assert len(drawn) == 1 or not has_seen or chosen == "a"


def test_the_refused_the_full_and_the_weightless_are_passed_over() -> None:
    candidates = a, b, c, d = backends(4)
    for one in (a, b, c):
        seen(one, LONGER)
    seen(d, LONG)
    b.max_concurrency, b.inflight = 1, 1
    c.weight = 0
    assert choose(candidates, chain_of(LONGER, ""), refused=(a,)) is d


def test_a_prompt_without_chunks_goes_by_load() -> None:
    candidates = backends(2, a=5)
    seen(candidates[0], LONG)
    assert {choose(candidates, (), seed).key for seed in range(10)} == {"b"}


def simulated(balance: Balance, ask, *, hold: int, rounds: int = 3000, count: int = 8):
    """Each request stays for the next `hold`. Returns requests by backend, the most that one had at a time, hit share."""
    candidates, rng, chooser_rng = backends(count), Random(3), Random(4)
    chooser, under_way, most, hits, chunks, got = Chooser(candidates), [], 0, 0, 0, Counter()
    for candidate in candidates:
        candidate.prefixes = PrefixIndex(64 * 1024)
    for _ in range(rounds):
        chain = chain_of(ask(rng), "")
        chosen = chooser.choose(balance, chooser_rng, NOW, chain=chain)
        hits += chosen.prefixes.matched(chain)
        chunks += len(chain)
        chosen.prefixes.note(chain)
        chosen.inflight += 1
        got[chosen.key] += 1
        most = max(most, chosen.inflight)
        under_way.append(chosen)
        if len(under_way) > hold:
            under_way.pop(0).inflight -= 1
    return got, most, hits / chunks


def sessions(rng: Random) -> bytes:
    """One of 80 conversations goes on: 40 chunks of its own."""
    return bytes([33 + rng.randrange(80)]) * 64 * 40


def one_prompt(_rng: Random) -> bytes:
    return b"x" * 64 * 40


def test_conversations_stay_where_they_are_cached_and_all_backends_work() -> None:
    _, _, blind = simulated(LEAST_LOAD, sessions, hold=32)
    got, most, hits = simulated(PREFIX, sessions, hold=32)
    assert blind < 0.8 < 0.9 < hits
    assert len(got) == 8
    assert most <= 8  # twice the mean: new conversations go to the less loaded of two


@pytest.mark.parametrize(("hold", "working"), [(8, 3), (32, 7), (200, 7)])
def test_a_prompt_that_everybody_sends_does_not_herd(hold, working) -> None:
    """A few go where it is cached; of many none has more than a quarter above the mean, so nearly all work."""
    got, most, hits = simulated(PREFIX, one_prompt, hold=hold)
    assert most <= max(3, 1.25 * (hold + 1) / 8) + 1
    assert len(got) >= working
    assert hits > 0.95
