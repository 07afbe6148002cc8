"""The optimiser against torch's own, which does the same in bfloat16."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.training.muon import MOMENTUM, WEIGHT_DECAY, Muon, orthogonal  # noqa: E402


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_steps_are_those_of_torch_within_its_rounding(shape):
    torch.manual_seed(1)
    ours = torch.randn(shape, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [
        Muon([ours], 0.02),
        torch.optim.Muon([theirs], lr=0.02, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
    ]
    before = ours.detach().clone()
    for _ in range(3):
        gradient = torch.randn(shape)
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    assert (ours - before).norm() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.004)


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
def test_an_update_turns_every_direction_about_equally(shape):
    torch.manual_seed(2)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3
