"""Both ways to compute a layer, and whole models of kernels beside the same of torch's operations."""

import os
import shutil
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file  # noqa: E402

from reference_backend.engine.config import NARROW, read_config  # noqa: E402
from reference_backend.engine.engine import Engine, Settings  # noqa: E402
from reference_backend.engine.graphs import recording  # noqa: E402
from reference_backend.engine.model import Llama, load_model  # noqa: E402
from reference_backend.engine.native import native  # noqa: E402
from reference_backend.engine.operations import Fused, Linear, OnCpu, Plain, operations_for  # noqa: E402
from reference_backend.engine.quant import narrowed  # noqa: E402
from reference_backend.engine.ranks import ALONE  # noqa: E402
from reference_backend.engine.request import Sampling, Sequence  # noqa: E402
from tests.support.integrity import faults  # noqa: E402

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")
CONFIG = read_config(GOLDEN / "llama")


@pytest.fixture
def has_compiler():
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler is installed")


def weights(name):
    files = [path for path in (GOLDEN / name).glob("*.safetensors") if path.name != "golden.safetensors"]
    return {key: value for path in files for key, value in load_file(path).items()}


def fused(name, quantize=None):
    """A golden model made of kernels."""
    from tests.support.kernels import DEVICE  # noqa: PLC0415  skips without Triton

    config = read_config(GOLDEN / name)
    return Llama(config, weights(name), DEVICE, torch.float32, quantize=quantize, operations=Fused(config, ALONE))


def texts(model, prepare=None):
    """What an engine makes of prompts of several lengths, read in pieces while others generate."""
    engine = Engine(
        model,
        Settings(slots=2, context=64, cache_tokens=192, block_size=4, step_tokens=4),
        end_tokens=frozenset(),
        rng=Random(1),
        prepare=prepare,
    )
    rng = Random(5)
    asked = [
        Sequence(
            [rng.randrange(64) for _ in range(length)], Sampling(max_tokens=3, temperature=temperature, seed=length)
        )
        for length, temperature in [(1, 0.0), (6, 1.0)]
    ]
    for each in asked:
        engine.submit(each)
    while engine.is_busy:
        engine.turn(0.0)
    assert faults(engine.scheduler) == []
    return [each.generated for each in asked]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantize"), [("qwen2", "int8"), ("qwen3", None)])
def test_an_engine_of_kernels_says_the_same(name, quantize):
    """The whole way: norms, products, positions, the cache, attention over it; prepared steps and others."""
    plain = load_model(GOLDEN / name, CPU, quantize=quantize)
    prepare = recording() if torch.cuda.is_available() else lambda step: step
    assert texts(fused(name, quantize), prepare) == texts(plain)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, OnCpu), (torch.bfloat16, Plain)])
def test_without_a_gpu_there_is_what_is_written_in_c(dtype, kind, has_compiler):
    assert type(operations_for(CONFIG, CPU, dtype, ALONE)) is kind


def test_without_a_compiler_torch_does_it_all(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    with caplog.at_level("INFO"):
        assert type(operations_for(CONFIG, CPU, torch.float32, ALONE)) is Plain
    native.cache_clear()
    assert "torch's own operations are used: [Errno 2]" in caplog.text
    assert "no-such-compiler" in caplog.text


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_engine_in_c_says_the_same(name, has_compiler):
    config, plain = read_config(GOLDEN / name), Plain(read_config(GOLDEN / name), CPU, ALONE)
    models = [
        Llama(config, weights(name), CPU, torch.float32, operations=each)
        for each in (OnCpu(config, ALONE, native()), plain)
    ]
    assert texts(models[0]) == texts(models[1])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", [None, *NARROW])
@pytest.mark.parametrize("out", [64, 40])  # in whole panels, and not
@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("make", [lambda: Plain(CONFIG, CPU, ALONE), lambda: OnCpu(CONFIG, ALONE, native())])
def test_products_on_a_cpu_are_what_the_matrix_means(make, rows, out, kind, has_bias, has_compiler):
    """With and without eight bits, a bias and a residual."""
    generator = torch.Generator().manual_seed(1)
    x, matrix, residual = (torch.randn(shape, generator=generator) for shape in [(rows, 24), (out, 24), (rows, out)])
    bias = torch.randn(out, generator=generator) if has_bias else None
    meant, scale = matrix, None
    if kind is not None:
        matrix, scale = narrowed(matrix, kind)
        meant = matrix.float() * scale[:, None]
    subject = make()
    linear = Linear(subject.kept(matrix), bias, scale)
    expected = x @ meant.t() + (0 if bias is None else bias)
    torch.testing.assert_close(subject.linear(x, linear), expected, rtol=1e-5, atol=1e-5)
    total, normed = subject.onto(residual, x, linear)
    torch.testing.assert_close(total, residual + expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normed, subject.norm(total))
    some = torch.tensor([out - 1, 3])
    torch.testing.assert_close(subject.rows(linear.matrix, some), matrix[some], rtol=0, atol=0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "rows", "inner", "is_narrow"),
    [("fp8", 130, 48, True), ("fp8", 128, 48, False), ("fp8", 130, 40, False), ("int8", 130, 48, False)],
)
def test_prompts_meet_fp8_in_fp8(kind, rows, inner, is_narrow, has_bias):
    """Many rows, and sides that cuBLAS takes; all else meets the weights as they were meant."""
    from tests.support.kernels import random  # noqa: PLC0415  skips without Triton

    x, bias = random(1, rows, inner), random(3, 32) if has_bias else None
    matrix, scale = narrowed(random(2, 32, inner), kind)
    subject = Fused(CONFIG, ALONE)
    found = subject.linear(x, Linear(matrix.t(), bias, scale))
    meant = (matrix.float() * scale[:, None]).t()
    added = 0 if bias is None else bias
    if is_narrow:
        kept, scales = subject._kernels.narrow(x)
        x = kept.float() * scales[:, None]
    torch.testing.assert_close(found, x @ meant + added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "library", "few_rows"),
    [(1.0, 2.0, 64), (2.0, 1.0, None), (1.0, 1.0, None)],
)
def test_the_faster_product_is_taken(kernel, library, few_rows):
    """Which that is is measured; here the times are given."""
    from tests.support.kernels import DEVICE  # noqa: PLC0415  skips without Triton

    subject = Fused(CONFIG, ALONE)
    matrix = torch.randn(32, 48, device=DEVICE).t()
    subject.choose([Linear(matrix, None)], lambda call: library if call.func is torch.mm else kernel)
    assert subject.few_rows.get((48, 32)) == few_rows
    x = torch.randn(2, 48, device=DEVICE)
    torch.testing.assert_close(subject.linear(x, Linear(matrix, None)), x @ matrix, rtol=1e-4, atol=1e-4)


def test_small_batches_may_go_to_the_kernel_and_larger_ones_not():
    from tests.support.kernels import DEVICE  # noqa: PLC0415  skips without Triton

    subject = Fused(CONFIG, ALONE)
    matrix = torch.randn(32, 48, device=DEVICE).t()
    asked = []

    def seconds(call):
        asked.append((call.func is torch.mm, call.args[0].shape[0]))
        return 1.0 if call.func is torch.mm else call.args[0].shape[0] / 8

    subject.choose([Linear(matrix, None), Linear(matrix, None)], seconds)
    assert subject.few_rows == {(48, 32): 4}
    assert [rows for is_library, rows in asked if is_library] == [1, 4, 16]  # a shape is measured once
