"""Narrower forms of a model of `torch.nn.Linear`s: what each does to answers and to time is in docs/backend.md.

The 8-bit forms are torchao's. torch.ao.quantization.quantize_dynamic, which many pages still name, is not used: torch
calls it deprecated and points to torchao, and its kernels are for CPUs alone.

Pruning is structured: whole channels between two layers go, or heads of attention, so that what is left is a smaller
model of the same kind, faster everywhere, and needs a short distillation from the whole one. 2:4 sparsity keeps the
shape, and two of each four weights; only GPUs from Ampere on have instructions for it, elsewhere it costs accuracy and
gains nothing.

Sources: LLM.int8() (arXiv 2208.07339) for scales per row; FP8 formats (2209.05433); 2:4 (2104.08378); channels by
weight and activation as in Wanda (2306.11695), summed over a channel or a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerTensor,
    quantize_,
)

Run = Callable[[nn.Module], object]  # has a model compute on samples


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers, by name, and what is between them: groups of `width` channels (a head, or one channel alone).

    The first one gives each group `parts` times: three where it makes queries, keys and values.
    """

    first: str
    second: str
    width: int = 1
    parts: int = 1


def bfloat16(model: nn.Module) -> nn.Module:
    """Every weight in half the bytes."""
    return copy.deepcopy(model).to(torch.bfloat16)


def int8_dynamic(model: nn.Module) -> nn.Module:
    """Matrices in int8, a scale for each row; activations too, by a scale that is found anew for each token."""
    return _by_torchao(model, lambda _: Int8DynamicActivationInt8WeightConfig())


def int8_static(model: nn.Module, run: Run) -> nn.Module:
    """The same with one scale for all activations of a layer, which is what `run` has them reach at most."""
    reached = {name: seen.abs().max() for name, seen in inputs(model, run)}
    return _by_torchao(
        model,
        lambda name: Int8StaticActivationInt8WeightConfig(
            act_quant_scale=(reached[name] / 127.0).reshape(1, 1), granularity=PerTensor()
        ),
    )


def fp8(model: nn.Module) -> nn.Module:
    """Matrices in e4m3, widened for each product."""
    return _by_torchao(model, lambda _: Float8WeightOnlyConfig())


def two_of_four(model: nn.Module) -> nn.Module:
    """The two smaller of each four weights of a row are zero."""
    model = copy.deepcopy(model)
    for _, layer in linears(model):
        groups = layer.weight.data.view(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    return model


def pruned(model: nn.Module, pairs: Sequence[Pair], share: float, run: Run) -> nn.Module:
    """Of each pair of layers only this share of the groups between them.

    Those are kept whose weights in the second layer, times what comes into it when `run` runs, are largest.
    """
    norms = {name: seen.flatten(0, -2).norm(dim=0) for name, seen in inputs(model, run)}
    model = copy.deepcopy(model)
    for pair in pairs:
        first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
        groups = torch.arange(second.in_features).view(-1, pair.width)
        score = (norms[pair.second] * second.weight.norm(dim=0))[groups].sum(-1)
        kept = groups[score.topk(round(share * len(score))).indices.sort().values].flatten()
        given = torch.cat([kept + part * second.in_features for part in range(pair.parts)])
        first.weight, first.bias = _fixed(first.weight[given]), _fixed(first.bias[given])
        second.weight = _fixed(second.weight[:, kept])
        first.out_features, second.in_features = len(given), len(kept)
    return model


def distilled(
    student: nn.Module, teacher: nn.Module, batches: Sequence[tuple[object, ...]], rate: float = 3e-4
) -> nn.Module:
    """The student, taught in place to give what the teacher gives, one step for each batch of arguments.

    What is zero in its matrices stays zero.
    """
    student.train().requires_grad_()
    holds = [
        layer.weight.register_hook(lambda slope, kept=layer.weight != 0: slope * kept) for _, layer in linears(student)
    ]
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    for arguments in batches:
        with torch.no_grad():
            wanted = teacher(*arguments)
        optimizer.zero_grad()
        functional.mse_loss(student(*arguments), wanted).backward()
        optimizer.step()
        schedule.step()
    for hold in holds:
        hold.remove()
    return student.eval().requires_grad_(requires_grad=False)


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))


def inputs(model: nn.Module, run: Run) -> Iterator[tuple[str, Tensor]]:
    """What comes into each linear layer when `run` runs the model once, by name."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0].detach()))
        for name, layer in linears(model)
    ]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return iter(seen.items())


def _by_torchao(model: nn.Module, config: Callable[[str], object]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in linears(model):
        quantize_(layer, config(name), filter_fn=lambda module, _, layer=layer: module is layer)
    return model
