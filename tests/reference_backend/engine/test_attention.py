"""Paged attention against dense attention, for drawn shapes; and that nothing but one's own past is seen."""

import mmap
import os
import shutil
from functools import partial
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from torch.nn import functional  # noqa: E402

from reference_backend.engine import attention  # noqa: E402
from reference_backend.engine.attention import Chunk, PagedCache, Step, by_length, fused, gathered, in_c  # noqa: E402
from reference_backend.engine.native import native  # noqa: E402
from reference_backend.engine.operations import Rotary  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")


def cache_of(kv_heads, head_dim, *, blocks, block_size, layers=1, device=CPU):
    return PagedCache(
        layers, kv_heads, head_dim, blocks=blocks, block_size=block_size, like=torch.empty(0, device=device)
    )


def unturned(heads, kv_heads, head_dim, positions, device=CPU):
    """Positions that turn nothing: what attention sees is what it was given."""
    table = torch.ones(100, head_dim // 2, dtype=torch.complex64, device=device)
    return Rotary(table, table[positions][:, None], positions, heads, kv_heads, 0.0, torch.tensor(0.0))


def dense(q, keys, values):
    """The last queries of a text against all of it."""
    mask = torch.ones(q.shape[0], keys.shape[0], dtype=torch.bool).tril(keys.shape[0] - q.shape[0])
    q, keys, values = (each.transpose(0, 1)[None] for each in (q, keys, values))
    seen = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return seen[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("seed", range(12))
def test_paged_is_dense(seed):
    """Sequences of drawn lengths in scattered blocks; some have one new token, some several, in one step."""
    found, expected = looked_both_ways(seed, gathered, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler is installed")
@pytest.mark.parametrize("little", [0, attention.LITTLE_WORK], ids=["gathered", "alone"])
@pytest.mark.parametrize("seed", range(12))
def test_paged_is_dense_in_c_too(seed, little, monkeypatch):
    monkeypatch.setattr(attention, "LITTLE_WORK", little)  # up to there prompts look for themselves
    found, expected = looked_both_ways(seed, partial(in_c, native()), CPU)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_paged_is_dense_in_kernels_too():
    from tests.support.kernels import DEVICE  # noqa: PLC0415  skips without Triton

    found, expected = looked_both_ways(1, fused, DEVICE)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def looked_both_ways(seed, look, device):
    """What is seen by a way to look at a paged cache, and in dense attention."""
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
    cache = cache_of(kv_heads, head_dim, blocks=sum(counts) + 1, block_size=size, device=device)

    def places(sequence, start):
        found = [tables[sequence][p // size] * size + p % size for p in range(start, lengths[sequence])]
        return torch.tensor(found, device=device)

    for sequence, new in enumerate(fresh):  # what earlier steps have written
        old = keys_values[sequence][: lengths[sequence] - new]
        cache.write(0, places(sequence, 0)[: lengths[sequence] - new], old.to(device))

    rows = torch.tensor([table + [0] * (max(counts) - len(table)) for table in tables], device=device)
    positions = [p for s in range(6) for p in range(lengths[s] - fresh[s], lengths[s])]
    chunks = [Chunk(4, fresh[4], 4, lengths[4] - fresh[4]), Chunk(4 + fresh[4], fresh[5], 5, lengths[5] - fresh[5])]
    slots = torch.tensor([s for s in range(6) for _ in range(fresh[s])], device=device)
    step = Step(slots, torch.tensor(positions, device=device), counts[:4], chunks)
    new = [torch.cat([q[s], keys_values[s]], dim=1)[-fresh[s] :] for s in range(6)]
    rotary = unturned(heads, kv_heads, head_dim, step.positions, device)
    found = look(cache, rows, step, shared)(0, torch.cat(new).to(device), None, rotary)
    expected = [dense(q[s][-fresh[s] :], *keys_values[s].chunk(2, dim=1)) for s in range(6)]
    return found, torch.cat(expected)


def test_what_others_left_behind_is_not_seen():
    """Blocks full of large numbers, of which a sequence has overwritten the beginning."""
    cache = cache_of(1, 4, blocks=4, block_size=4)
    cache._pages[:, :, 1:] = 1e4
    qkv, start = torch.randn(1, 4, 4), torch.tensor([0])
    step = Step(torch.tensor([0]), start, [2], [])
    found = gathered(cache, torch.tensor([[3, 2]]), step, 2)(0, qkv.clone(), None, unturned(2, 1, 4, start))
    torch.testing.assert_close(found, qkv[:, 3:].expand(1, 2, 4).flatten(1))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells what memory is taken")
def test_memory_is_taken_when_it_is_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    cache = cache_of(8, 128, blocks=4096, block_size=16, layers=2)
    assert cache.bytes == 1 << 30
    cache.clear([1, 2, 3])
    assert resident() - before < cache.bytes / 4
    assert not cache.layer(1)[:, 4000:].any()


def test_layers_are_apart_and_blocks_can_be_cleared():
    cache = cache_of(1, 2, blocks=3, block_size=2, layers=2)
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
