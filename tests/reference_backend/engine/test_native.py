"""What is written in C, beside the same in torch's own operations."""

import copy
import math
import os
import shutil
import subprocess

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from torch.nn import functional  # noqa: E402

from reference_backend.engine.native import NativeError, built, native  # noqa: E402
from reference_backend.engine.operations import Rotary  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler is installed")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 32), (3, 40), (5, 129)])
def test_norm(rows, width):
    x = drawn(1, rows, width)
    torch.testing.assert_close(native().norm(x, 0.3), x / (x.square().sum(-1, keepdim=True) + 0.3).sqrt(), **CLOSE)


@pytest.mark.parametrize("ids", [[], [0], [63, 7, 32, 7]])
def test_rows(ids):
    matrix, ids = drawn(1, 64, 5), torch.tensor(ids, dtype=torch.int64)
    panels = matrix.unflatten(0, (-1, 32)).transpose(1, 2).contiguous()
    torch.testing.assert_close(native().rows(panels, ids), matrix[ids], rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 3), (3, 1100)])
def test_silu_times(rows, width):
    gate, up = 30 * drawn(1, rows, width), drawn(2, rows, width)
    found = native().silu_times(torch.cat([gate, up], dim=1))
    torch.testing.assert_close(found, functional.silu(gate) * up, **CLOSE)


def test_silu_of_the_farthest():
    """To where e to the x is no number any more; and what is no number stays none."""
    gate = torch.tensor([[-1e30, -200.0, -88.0, -86.0, 0.0, 86.0, 200.0, 1e30, math.inf, math.nan]])
    found = native().silu_times(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(found[:, :-1], functional.silu(gate)[:, :-1], **CLOSE)
    assert found[0, -1].isnan()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "has_gains"), [(4, 2, 8, False), (3, 1, 64, True), (2, 2, 6, True)]
)
def test_queries_are_turned_and_keys_and_values_kept(heads, kv_heads, width, has_gains):
    rows, blocks, size = 3, 4, 2
    positions, slots = torch.tensor([3, 0, 2]), torch.tensor([1, 0, 1])
    tables = torch.tensor([[2, 0], [3, 1]])
    table = torch.polar(torch.ones(8, width // 2), drawn(3, 8, width // 2))
    rotary = Rotary(table, table[positions][:, None], positions, heads, kv_heads, 0.3, torch.tensor(math.sqrt(0.3)))
    qkv, gains = drawn(1, rows, heads + 2 * kv_heads, width), drawn(2, heads + kv_heads, width) if has_gains else None
    q, keys_values = rotary.split(qkv.clone(), gains)
    pages = torch.zeros(2 * kv_heads, blocks, size, width)
    expected = pages.clone()
    for row, (block, offset) in enumerate([(1, 1), (2, 0), (1, 0)]):
        expected[:, block, offset] = keys_values[row]
    native().attend(qkv, gains, table, positions, pages, tables, slots, generating=0, heads=heads, epsilon=0.3)
    torch.testing.assert_close(qkv[:, :heads], q, **CLOSE)
    torch.testing.assert_close(pages, expected, **CLOSE)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])  # the query, its key, its value
def test_what_is_no_number_is_seen_by_its_own_sequence_alone(where, spoilt):
    qkv, pages = drawn(1, 2, 3, 4), torch.zeros(2, 3, 2, 4)
    qkv[0, where, 1] = spoilt
    turns, positions = torch.ones(4, 2, dtype=torch.complex64), torch.tensor([0, 0])
    tables, slots = torch.tensor([[1], [2]]), torch.tensor([0, 1])
    seen = native().attend(qkv, None, turns, positions, pages, tables, slots, generating=2, heads=1, epsilon=0.0)
    assert not seen[0].isfinite().all()
    torch.testing.assert_close(seen[1], qkv[1, 2])


def test_no_rows_may_be_no_memory():
    nothing = torch.empty(0, dtype=torch.int64)
    turns, pages, tables = torch.ones(4, 2, dtype=torch.complex64), torch.zeros(2, 3, 2, 4), torch.tensor([[1]])
    qkv = torch.empty(0, 3, 4)
    seen = native().attend(qkv, None, turns, nothing, pages, tables, nothing, generating=0, heads=1, epsilon=0.0)
    assert seen.shape == (0, 4)


def test_a_head_may_be_wider_than_the_stack():
    """A config.json says how wide it is."""
    width = 1 << 21
    qkv, pages = torch.ones(1, 3, width), torch.zeros(2, 1, 1, width)
    turns, zero = torch.ones(1, width // 2, dtype=torch.complex64), torch.tensor([0])
    seen = native().attend(qkv, None, turns, zero, pages, zero[None], zero, generating=1, heads=1, epsilon=0.0)
    assert bool((seen == 1.0).all())


def test_it_is_built_once(tmp_path, monkeypatch):
    made = built(tmp_path / "new")
    assert [each.name for each in made.parent.iterdir()] == [made.name]
    monkeypatch.setattr(subprocess, "run", None)
    assert built(tmp_path / "new") == made


def test_a_compiler_that_refuses_says_why(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'unknown architecture' >&2\necho 'these are known' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.cache_clear()
    with pytest.raises(NativeError, match=r"refuses native.c: unknown architecture$"):
        native()
    assert list((tmp_path / "cache" / "weir").iterdir()) == []


@pytest.mark.parametrize("compiler", ["cc '", "cc -fno-such-option", "true"])
def test_a_compiler_that_is_no_good_is_no_failure(compiler, tmp_path, monkeypatch):
    """Quotes that stay open, an option that is none, and one that makes nothing."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    with pytest.raises(NativeError):
        native()


def test_a_library_that_others_may_have_put_there_is_not_loaded(tmp_path, monkeypatch):
    planted = built(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(NativeError, match="not ours alone to write to"):
        built(tmp_path)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: planted.stat().st_uid + 1)
    with pytest.raises(NativeError, match="not ours alone to write to"):
        built(tmp_path)


def test_a_copy_is_the_same():
    assert copy.deepcopy(native()) is native()
