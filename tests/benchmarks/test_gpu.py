"""The run for a GPU, dry: every part computes, and the workloads are those that others measure."""

import json
import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
import tests.support.kernels  # noqa: E402, F401  skips without Triton, and has it interpreted
from benchmarks import gpu  # noqa: E402


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, float) else []


@pytest.mark.slow
def test_a_dry_run_goes_through(tmp_path):
    gpu.main(["--dry", "--json", str(tmp_path / "figures.json")])
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told["gpu"].startswith("none: a dry run")
    figures = told["figures"]
    assert {"ceilings", "attention", "products"} < set(figures)
    for kind in ("plain", "int8", "fp8"):
        assert [each["batch"] for each in figures[f"tiny {kind}: decoding"]] == [1, 3]
    assert figures["tiny plain: nano-vllm's bench"]["requests"] == 8
    assert figures["tiny plain: shared beginning"]["hits"] > 0.4
    assert {"reading", "gaps", "long answers", "server"} < {name.rpartition(": ")[2] for name in figures}
    assert figures["tiny: server"]["streams"] == 3
    assert figures["tiny: server"]["tokens_s"] > 0
    assert all(math.isfinite(number) and number >= 0 for number in numbers(figures))


def test_the_requests_are_those_of_nano_vllm():
    """As counted from its bench.py, whose seed is 0."""
    asked = gpu.nano_requests(1, 151_936)
    assert len(asked) == 256
    assert sum(len(each.prompt) for each in asked) == 142_827
    assert sum(each.sampling.max_tokens for each in asked) == 133_966


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: it would be measured")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "torch sees no GPU; --dry" in capsys.readouterr().err
