"""Each kernel beside the same in torch's own operations; and that a real compiler takes them, for a GPU that is not here."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.kernels import DEVICE, HALF, random, torch

from reference_backend.engine import kernels  # noqa: E402  isort:skip
from reference_backend.engine.operations import Rotary  # noqa: E402  isort:skip
from reference_backend.engine.quant import narrowed  # noqa: E402  isort:skip

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, HALF: {"rtol": 2e-2, "atol": 2e-2}}


def over_norm(x, epsilon):
    return x / (x.square().sum(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 40), (5, 129)])
def test_norm(rows, width):
    x = random(1, rows, width)
    torch.testing.assert_close(kernels.norm(x, 0.3), over_norm(x, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_parts_are_added_and_normalised(dtype, splits, has_bias):
    residual, parts = random(1, 3, 40, dtype=dtype), random(2, splits, 3, 40)
    bias = random(3, 40, dtype=dtype) if has_bias else None
    total, normed = kernels.add_and_norm(residual, parts, bias, 0.3)
    expected = residual.float() + parts.sum(0) + (0 if bias is None else bias.float())
    torch.testing.assert_close(total, expected.to(dtype), **CLOSE[dtype])
    torch.testing.assert_close(normed, over_norm(expected, 0.3).to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_silu_times(dtype):
    gate_up = random(1, 3, 2 * 1100, dtype=dtype)  # more than one block of columns
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    torch.testing.assert_close(kernels.silu_times(gate_up), expected, **CLOSE[dtype])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_gains", "dtype"),
    [
        (4, 2, 8, False, torch.float32),
        (3, 1, 64, True, torch.float32),
        (2, 2, 6, True, HALF),
        (1, 1, 16, False, HALF),
    ],
)
def test_queries_are_turned_and_keys_and_values_kept(heads, kv_heads, head_dim, has_gains, dtype):
    tokens, blocks, size = 5, 4, 2
    qkv = random(1, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    gains = random(2, heads + kv_heads, head_dim, dtype=dtype) if has_gains else None
    angles = random(3, 50, head_dim // 2)
    table = torch.polar(torch.ones_like(angles), angles)
    positions = torch.tensor([0, 7, 49, 3, 3], device=DEVICE)
    places = torch.tensor([6, 2, 3, 0, 5], device=DEVICE)
    pages = torch.zeros(2 * kv_heads, blocks, size, head_dim, device=DEVICE, dtype=dtype)
    rotary = Rotary(table, table[positions][:, None], positions, heads, kv_heads, 0.2, torch.tensor(0.2**0.5))
    q, keys_values = rotary.split(qkv.clone(), gains)

    kernels.rotate_and_store(qkv, gains, table, positions, places, pages, 0.2)
    torch.testing.assert_close(qkv[:, :heads], q, **CLOSE[dtype])
    expected = torch.zeros_like(pages).flatten(1, 2)
    expected[:, places] = keys_values.transpose(0, 1)
    torch.testing.assert_close(pages.flatten(1, 2), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (4, 129)])
def test_rows_are_narrowed_as_those_of_a_matrix_are(rows, width, dtype):
    x = random(1, rows, width, dtype=dtype) * torch.logspace(-3, 2, rows, device=DEVICE, dtype=dtype)[:, None]
    x[-1, 1:] = 0.0
    expected, scales = narrowed(x, "fp8")
    found, found_scales = kernels.narrow(x)
    torch.testing.assert_close(found_scales, scales)
    found, expected = found.float(), expected.float()
    if DEVICE.type == "cpu":  # the interpreter loses the carry where a number is rounded up to a power of two
        found = torch.where(found == expected / 2, expected, found)
    torch.testing.assert_close(found, expected, rtol=0.13, atol=0.0)  # half way a step to either side
    assert (found == expected).float().mean() > 0.99


NARROW = [None, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 16, 16), (5, 50, 300), (17, 33, 70)])
def test_product(rows, columns, inner, dtype, narrow):
    x, weight = random(1, rows, inner, dtype=dtype), random(2, columns, inner, dtype=dtype)
    scale, bias = None, random(3, columns, dtype=dtype)
    exact = weight.float()
    if narrow is not None:
        weight, scale = (20 * weight.float()).to(narrow), random(4, columns).abs() / 20
        exact = weight.float() * scale[:, None]
    expected = (x.float() @ exact.t() + bias.float()).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(kernels.product(x, weight, scale, bias), expected, **close)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize(("splits", "inner"), [(2, 64), (4, 1100), (8, 40)])  # the last leaves splits nothing to do
def test_splits_of_a_product_add_up(splits, inner, narrow):
    x, weight = random(1, 3, inner), random(2, 20, inner)
    scale = None if narrow is None else random(3, 20).abs()
    kept = weight if narrow is None else (20 * weight).to(narrow)
    parts = kernels.product(x, kept, scale, None, splits=splits)
    assert parts.shape == (splits, 3, 20)
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum(0), kernels.product(x, kept, scale, None), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("columns", "inner", "splits"),
    [
        (4096, 14336, 2),  # down of an 8B model: 256 programs are nearly enough
        (1024, 3072, 8),  # of a 0.6B one
        (28672, 4096, 1),
        (64, 256, 1),
        (64, 1024, 4),
    ],
)  # fmt: skip
def test_a_product_is_split_while_programs_are_few(columns, inner, splits):
    assert kernels.splits_for(columns, inner) == splits


COMPILE = """
    import sys
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from reference_backend.engine import kernels, paged_kernels, sampler_kernels

    def tried(kernel, types, **constants):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        assert {name for name in names if name not in types} == set(constants), kernel
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, of in types.items() if of[0] == "*"}
        values = {(names.index(name),): value for name, value in constants.items()}
        made = compile(ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]
        print(kernel.__name__, made.metadata.shared)

    half = "*bf16"
    tried(kernels._add_and_norm, {"residual": half, "parts": "*fp32", "bias": half, "total": half, "normed": half,
        "rows": "i32", "epsilon": "fp32"}, WIDTH=1024, PARTS=2, HAS_BIAS=True, BLOCK=1024)
    tried(kernels._rotate_and_store, {"qkv": half, "gains": half, "turns": "*fp32", "positions": "*i64",
        "places": "*i64", "pages": half, "head_stride": "i64", "epsilon": "fp32"},
        HEADS=32, KV_HEADS=8, HALF=64, HAS_GAINS=True, BLOCK=64)
    tried(kernels._silu_times, {"gate_up": half, "out": half, "width": "i32"}, BLOCK=1024)
    tried(kernels._narrow, {"x": half, "out": "*fp8e4nv", "scales": "*fp32"}, WIDTH=14_336, BLOCK=16_384)
    for weight in ("*i8", "*fp8e4nv"):
        tried(kernels._product, {"x": half, "weight": weight, "scale": "*fp32", "bias": half, "out": half,
            "rows": "i32"}, COLUMNS=4096, INNER=14336, HAS_SCALE=True, HAS_BIAS=True, SPLITS=1,
            BLOCK_M=16, BLOCK_N=16, BLOCK_K=256)
    tried(paged_kernels._look, {"q": half, "pages": half, "tables": "*i64", "slots": "*i64", "positions": "*i64",
        "firsts": "*i64", "counts": "*i64", "out": "*fp32", "sizes": "*fp32", "q_stride": "i32",
        "head_stride": "i64", "table_stride": "i32", "tokens": "i32", "scale": "fp32"}, PAGE=16, SHARED=4,
        KV_HEADS=8, HEAD_DIM=64, BLOCK_D=64, BLOCK_M=16, BLOCK_N=64, SPLITS=8)
    tried(sampler_kernels._draw, {"scores": "*fp32", "slots": "*i64", "lengths": "*i64", "floats": "*fp32",
        "ints": "*i32", "tokens": "*i64"}, VOCABULARY=151_936, BLOCK=8192)
    tried(paged_kernels._join, {"parts": "*fp32", "sizes": "*fp32", "out": half, "rows": "i32"},
        HEAD_DIM=128, BLOCK_D=128, SPLITS=8)
"""


@pytest.mark.slow
def test_they_compile_for_an_h200(tmp_path):
    """Types, layouts and shared memory, as Triton's compiler and the assembler judge them; no GPU is needed for that."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(COMPILE))
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 9
    assert max(shared) <= 227 * 1024  # bytes that a program may have on sm_90
