"""The attention kernel beside dense attention: lengths, pages, shared heads, head sizes, splits, runs of prompts."""

from random import Random

import pytest
from torch.nn import functional

from tests.support.kernels import DEVICE, HALF, random, torch

from reference_backend.engine import paged_kernels  # noqa: E402  isort:skip


def dense(q, keys, values, position):
    """Queries [queries, heads, head_dim] from a position on, against keys and values [keys, kv_heads, head_dim]."""
    hidden = torch.arange(keys.shape[0])[None] > position + torch.arange(q.shape[0])[:, None]
    q, keys, values = (each.float().cpu().transpose(0, 1)[None] for each in (q, keys, values))
    seen = functional.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden, enable_gqa=True)
    return seen[0].transpose(0, 1).flatten(1)


def case(lengths, fresh, *, kv_heads=2, shared=2, head_dim=16, page=4, dtype=torch.float32, seed=0):
    """A cache with sequences of such lengths in scattered blocks, of which the last `fresh` tokens ask."""
    rng = Random(seed)
    counts = [-(-length // page) for length in lengths]
    blocks = list(range(1, sum(counts) + 1))
    rng.shuffle(blocks)
    width = max(counts)
    slots = rng.sample(range(len(lengths) + 2), len(lengths))
    tables = torch.zeros(len(lengths) + 2, width, dtype=torch.int64)
    pages = torch.full(
        (2 * kv_heads, sum(counts) + 1, page, head_dim), torch.nan
    )  # what is not written must not be seen
    rows, expected = [], []
    for number, (length, new, slot) in enumerate(zip(lengths, fresh, slots, strict=True)):
        mine = [blocks.pop() for _ in range(counts[number])]
        tables[slot, : len(mine)] = torch.tensor(mine)
        keys_values = random(seed * 100 + number, length, 2 * kv_heads, head_dim, dtype=dtype).cpu()
        for at in range(length):
            pages[:, mine[at // page], at % page] = keys_values[at].float()
        q = random(seed * 100 + number + 50, new, kv_heads * shared, head_dim, dtype=dtype)
        rows.append((slot, length - new, q))
        expected.append(dense(q, *keys_values.chunk(2, dim=1), length - new))
    return {
        # Rows of queries lie among keys and values, as they come out of the projection.
        "q": functional.pad(torch.cat([q for _, _, q in rows]), (0, 0, 0, 2 * kv_heads))[:, : kv_heads * shared],
        "pages": pages.to(DEVICE, dtype),
        "tables": tables.to(DEVICE),
        "slots": torch.tensor([slot for slot, _, q in rows for _ in range(q.shape[0])], device=DEVICE),
        "positions": torch.tensor([start + n for _, start, q in rows for n in range(q.shape[0])], device=DEVICE),
    }, torch.cat(expected)


def looked(tensors, firsts, counts, **options):
    tokens, heads, head_dim = tensors["q"].shape
    out = tensors["q"].new_empty(tokens, heads * head_dim)
    firsts, counts = torch.tensor(firsts, device=DEVICE), torch.tensor(counts, device=DEVICE)
    paged_kernels.paged_attention(**tensors, firsts=firsts, counts=counts, out=out, **options)
    return out.float().cpu()


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 16},
        {"head_dim": 64, "kv_heads": 1, "shared": 3, "page": 16},
        {"head_dim": 6, "kv_heads": 3, "shared": 1, "page": 1},
        {"head_dim": 128, "kv_heads": 1, "shared": 8, "page": 32},
        {"head_dim": 256, "kv_heads": 1, "shared": 2, "page": 16},
        {"head_dim": 80, "kv_heads": 1, "shared": 7, "page": 8},
    ],
    ids=str,
)
def test_who_generates_sees_all_that_came_before(shape, splits):
    """Ragged lengths, from one key to several tiles; with eight splits most of them have none."""
    lengths = [1, 63, 64, 65, 200]
    tensors, expected = case(lengths, [1] * 5, **shape)
    found = looked(tensors, range(5), [1] * 5, most_queries=1, splits=splits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_half_precision_stays_near(splits):
    tensors, expected = case([5, 130], [1, 1], head_dim=64, page=16, dtype=HALF)
    found = looked(tensors, [0, 1], [1, 1], most_queries=1, splits=splits)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 1, "shared": 3, "page": 16}, {"head_dim": 32, "shared": 1}], ids=str
)
def test_pieces_of_prompts_see_what_stands_before_each_token(shape, most):
    """Prompts from their beginning and from the middle, cut into runs of what a program takes."""
    fresh = [9, 17, 1, 40]
    tensors, expected = case([9, 90, 70, 40], fresh, **shape)
    firsts = [0, 9, 26, 27]
    runs = [(at + n, min(most, new - n)) for at, new in zip(firsts, fresh, strict=True) for n in range(0, new, most)]
    found = looked(tensors, *zip(*runs, strict=True), most_queries=most)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_without_a_run_are_left_alone():
    tensors, expected = case([7, 12], [1, 5])
    found = tensors["q"].new_full((6, 64), 7.0)
    where = {"firsts": torch.tensor([1], device=DEVICE), "counts": torch.tensor([5], device=DEVICE)}
    paged_kernels.paged_attention(**tensors, **where, out=found, most_queries=8)
    assert (found[0] == 7.0).all()
    torch.testing.assert_close(found[1:].cpu(), expected[1:], rtol=1e-5, atol=1e-5)
