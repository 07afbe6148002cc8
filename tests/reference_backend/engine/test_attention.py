"""Paged attention against dense attention, for drawn shapes; and that nothing but one's own past is seen."""

from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from torch.nn import functional  # noqa: E402

from reference_backend.engine.attention import Group, PagedCache, attend, by_length  # noqa: E402
from reference_backend.engine.config import ModelConfig  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")


def config(heads, kv_heads, head_dim, layers=1):
    return ModelConfig(
        "LlamaForCausalLM", 8, 8, 8, layers, heads, kv_heads, head_dim, 64, 1e-5, 1e4, None, False, False, False, False, True
    )  # fmt: skip


def dense(q, keys, values):
    """The last queries of a text against all of it."""
    mask = torch.ones(q.shape[0], keys.shape[0], dtype=torch.bool).tril(keys.shape[0] - q.shape[0])
    q, keys, values = (each.transpose(0, 1)[None] for each in (q, keys, values))
    seen = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return seen[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("seed", range(12))
def test_paged_is_dense(seed):
    """Sequences of drawn lengths in scattered blocks; some have one new token, some several, in one step."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, shared, size = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([1, 4, 16])
    heads, head_dim = kv_heads * shared, rng.choice([2, 8, 32])
    lengths = [rng.randrange(1, 80) for _ in range(6)]
    fresh = [1, 1, 1, 1, *(rng.randrange(1, length + 1) for length in lengths[4:])]
    lengths[:4] = sorted(lengths[:4])
    counts = [-(-length // size) for length in lengths]
    blocks = list(range(1, sum(counts) + 1))
    rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    q = [torch.randn(length, heads, head_dim, generator=generator) for length in lengths]
    keys_values = [torch.randn(length, 2 * kv_heads, head_dim, generator=generator) for length in lengths]
    cache = PagedCache(config(heads, kv_heads, head_dim), sum(counts) + 1, size, CPU, torch.float32)

    def places(sequence, start):
        return torch.tensor([tables[sequence][p // size] * size + p % size for p in range(start, lengths[sequence])])

    for sequence, new in enumerate(fresh):  # what earlier steps have written
        cache.write(0, places(sequence, 0)[: lengths[sequence] - new], keys_values[sequence][: lengths[sequence] - new])

    def group(first, sequences):
        width = max(len(tables[s]) for s in sequences)
        table = torch.tensor([tables[s] + [0] * (width - len(tables[s])) for s in sequences])
        positions = torch.stack([torch.arange(lengths[s] - fresh[s], lengths[s]) for s in sequences])
        return Group.of(first, table, positions, size, shared, torch.float32)

    groups = [group(start, range(start, end)) for start, end in by_length(counts[:4])]
    groups += [group(4, [4]), group(4 + fresh[4], [5])]
    found = attend(
        cache,
        groups,
        torch.cat([places(s, lengths[s] - fresh[s]) for s in range(6)]),
        0,
        torch.cat([q[s][-fresh[s] :] for s in range(6)]),
        torch.cat([keys_values[s][-fresh[s] :] for s in range(6)]),
    )
    expected = [dense(q[s][-fresh[s] :], *keys_values[s].chunk(2, dim=1)) for s in range(6)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_what_others_left_behind_is_not_seen():
    """Blocks full of large numbers, of which a sequence has overwritten the beginning."""
    cache = PagedCache(config(2, 1, 4), 4, 4, CPU, torch.float32)
    cache._pages[:, :, 1:] = 1e4
    q, keys_values = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    group = Group.of(0, torch.tensor([[3, 2]]), torch.tensor([[0]]), 4, 2, torch.float32)
    found = attend(cache, [group], torch.tensor([12]), 0, q, keys_values)
    torch.testing.assert_close(found, keys_values[:, 1:].expand(1, 2, 4).flatten(1))


def test_layers_are_apart_and_blocks_can_be_cleared():
    cache = PagedCache(config(1, 1, 2, layers=2), 3, 2, CPU, torch.float32)
    cache.write(1, torch.tensor([2, 5]), torch.full((2, 2, 2), 7.0))
    assert cache.gather(0, torch.tensor([1, 2]), 1).abs().sum() == 0
    assert cache.gather(1, torch.tensor([1, 2]), 2)[:, 0, :, 0].tolist() == [[7, 0], [0, 7]]
    cache.clear([2])
    assert cache.gather(1, torch.tensor([1, 2]), 2)[:, 0, :, 0].tolist() == [[7, 0], [0, 0]]


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ([], []),
        ([1], [(0, 1)]),
        ([1, 5, 16], [(0, 3)]),
        ([1, 5, 17], [(0, 2), (2, 3)]),
        ([10, 20, 21, 42, 43], [(0, 2), (2, 4), (4, 5)]),
    ],
)
def test_long_and_short_are_told_apart(blocks, runs):
    assert by_length(blocks) == runs
