"""Blocks taken, shared, named and given back."""

import pytest

from reference_backend.engine.kv_cache import BlockPool, block_name
from reference_backend.engine.request import Sampling, Sequence
from tests.support.integrity import pool_faults


def sequence(tokens, salt=b""):
    return Sequence(list(tokens), Sampling(max_tokens=1), None, salt=salt)


def filled(pool, tokens, salt=b""):
    """A sequence whose tokens are all computed, in blocks of its own."""
    made = sequence(tokens, salt)
    made.blocks = pool.take(pool.blocks_for(len(tokens)))
    made.computed = len(tokens)
    pool.index(made)
    return made


TEXT = list(range(100, 112))


def test_blocks_are_taken_all_or_none():
    pool = BlockPool(5, 4)
    assert pool.take(5) is None
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(2) is None
    assert (pool.held, pool.free_without([])) == (3, 1)
    assert pool.take(0) == []
    assert repr(pool) == "<BlockPool 3 of 4 held, 0 named>"


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (TEXT, 2),  # the last token is always computed, and with it its block
        ([*TEXT, 5], 3),
        ([*TEXT[:8], 1, 2, 3, 4, 5], 2),
        ([*TEXT[:7], 1, 2], 1),
        ([1, *TEXT], 0),
        (TEXT[:4], 0),
        (TEXT[:1], 0),
    ],
)
def test_a_beginning_that_is_known_is_found(tokens, found):
    pool = BlockPool(10, 4)
    owner = filled(pool, TEXT)
    blocks = pool.match(sequence(tokens))
    assert blocks == owner.blocks[:found]
    assert pool_faults(pool, [owner.blocks, blocks]) == []


def test_names_depend_on_all_that_comes_before():
    assert block_name(b"", [1, 2]) != block_name(b"", [2, 1])
    assert block_name(block_name(b"", [1]), [2]) != block_name(block_name(b"", [3]), [2])
    assert block_name(b"a", [1]) != block_name(b"b", [1])
    assert block_name(b"", [2**40]) != block_name(b"", [2**40 + 1])


def test_another_salt_shares_nothing():
    pool = BlockPool(10, 4)
    filled(pool, TEXT, b"mine")
    assert pool.match(sequence([*TEXT, 1], b"yours")) == []
    assert len(pool.match(sequence([*TEXT, 1], b"mine"))) == 3


def test_released_blocks_are_found_until_they_are_needed():
    pool = BlockPool(5, 4)
    owner = filled(pool, TEXT)
    pool.release(owner.blocks)
    assert (pool.held, pool.free_without([])) == (0, 4)
    found = pool.match(sequence([*TEXT, 1]))
    assert found == owner.blocks
    pool.release(found)
    # Block 4 was never used; then the end of the text goes before its beginning.
    assert pool.take(2) == [4, 3]
    assert pool.match(sequence([*TEXT, 1])) == [1, 2]


def test_a_block_is_free_when_all_who_share_it_give_it_back():
    pool = BlockPool(6, 4)
    first = filled(pool, TEXT)
    second = pool.match(sequence([*TEXT[:8], 1, 2, 3])) + pool.take(1)
    assert pool.free_without([first.blocks]) == 1 + 1
    assert pool.free_without([second]) == 1 + 1
    assert pool.free_without([first.blocks, second]) == 5
    assert pool.free_without([]) == 1


def test_a_text_that_two_computed_at_once_is_named_once():
    pool = BlockPool(10, 4)
    first, second = filled(pool, TEXT[:4]), filled(pool, TEXT[:4])
    assert pool.match(sequence(TEXT[:5])) == first.blocks
    pool.release(first.blocks)
    assert pool_faults(pool, [second.blocks, first.blocks]) == []


def test_only_full_blocks_of_known_tokens_are_named():
    pool = BlockPool(10, 4)
    growing = sequence(TEXT[:6])
    growing.blocks = pool.take(3)
    for computed, named in [(3, 0), (4, 1), (6, 1), (7, 1)]:  # with 7, a pending token is computed that nobody knows
        growing.computed = computed
        pool.index(growing)
        assert growing.indexed == named
    growing.tokens += TEXT[6:8]
    growing.computed = 8
    pool.index(growing)
    assert pool.match(sequence([*TEXT[:8], 1])) == growing.blocks[:2]


def test_what_is_no_good_is_forgotten():
    pool = BlockPool(10, 4)
    owner = filled(pool, TEXT)
    shared = pool.match(sequence([*TEXT[:4], 1]))
    assert pool.forget(owner.blocks) == owner.blocks[1:]
    assert pool.match(sequence([*TEXT, 1])) == []
    assert pool_faults(pool, [owner.blocks, shared]) == []


def test_faults_are_told():
    pool = BlockPool(4, 4)
    taken = pool.take(2)
    assert pool_faults(pool, [taken]) == []
    assert pool_faults(pool, []) == [
        "block 1 has 1 holders, not 0",
        "block 2 has 1 holders, not 0",
        "block 1 is lost",
        "block 2 is lost",
    ]
    assert "block 3 is free and held" in pool_faults(pool, [[1, 2, 3]])
    assert "block 0 is somebody's" in pool_faults(pool, [[0, 1, 2]])
    pool._name_of[1] = b"x"
    assert pool_faults(pool, [taken]) == ["names and blocks do not belong together"]
