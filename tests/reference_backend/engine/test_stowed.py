"""Memory that goes and comes back under tensors. What is copied is the same wherever it lies: here, on a CPU."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.stowed import Stowed  # noqa: E402


def test_what_shares_memory_shares_it_again():
    matrix, bias = torch.randn(64, 32), torch.randn(5, dtype=torch.bfloat16)
    tensors = [matrix, matrix.t(), matrix[3:9], bias, torch.empty(0)]
    before = [each.clone() for each in tensors]
    stowed = Stowed(tensors)
    assert [each.untyped_storage().nbytes() for each in tensors] == [0] * 5
    stowed.bring_back()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    matrix[4, 0] = 7.0
    assert (tensors[1][0, 4], tensors[2][1, 0]) == (7.0, 7.0)
