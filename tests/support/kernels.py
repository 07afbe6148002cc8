"""The device that Triton's kernels are tested on: a GPU if torch sees one, else this CPU, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = (
        "1"  # as conftest.py says it, but for a torch that does not see the GPU that is there
    )
pytest.importorskip("triton", reason="triton is not installed: it has no wheel for this platform")

torch.set_num_threads(1)
# The interpreter computes with NumPy, which has no bfloat16: its products there are of the bits.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers around 0, always the same, on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
