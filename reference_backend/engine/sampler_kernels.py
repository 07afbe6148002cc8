"""The drawing of tokens in Triton, one program for each row. `Sampler.draw` is its twin, and says what it is.

Scores are read once to find the best, once more to find the nearest; rows that keep to top-k or top-p look for how far
their candidates go by halving distances, without sorting anything. A distance is no less than zero, so its bits, taken
for an integer, are in the same order; and each halving goes on to the next distance that occurs, so that it ends where
one is left: after a dozen rounds, most often. All of it is decided by what lies on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference_backend.engine.sampler import FARTHEST, MIX_1, MIX_2, SPREAD

MOST_TOKENS = 8192  # of the vocabulary, to a program at once
_FARTHEST, _SPREAD, _MIX_1, _MIX_2 = (tl.constexpr(each) for each in (FARTHEST, SPREAD, MIX_1, MIX_2))


@triton.jit
def _within(scores, best, limit, coldness, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """What the tokens up to a distance weigh (with no coldness: their number); the last of them, the first beyond."""
    mass, last = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    beyond = tl.full([BLOCK], _FARTHEST, tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        distance = best - tl.load(scores + token, mask=token < VOCABULARY, other=-float("inf"))
        is_near = distance <= limit
        near = tl.where(is_near, distance, 0.0)
        mass += tl.where(is_near, tl.exp(-near * coldness), 0.0)
        last = tl.maximum(last, near)
        beyond = tl.minimum(beyond, tl.where(is_near, _FARTHEST, distance))
    return tl.sum(mass, 0), tl.max(last, 0), tl.min(beyond, 0)


@triton.jit
def _reach(scores, best, wanted, coldness, farthest, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest distance up to which tokens weigh what is wanted, or else `farthest`."""
    short = -1  # as bits: what is not enough, and what is
    enough = farthest.to(tl.int32, bitcast=True)
    while enough - short > 1:
        middle = short + (enough - short) // 2
        mass, last, beyond = _within(scores, best, middle.to(tl.float32, bitcast=True), coldness, VOCABULARY, BLOCK)
        if mass >= wanted:
            enough = last.to(tl.int32, bitcast=True)
        else:
            short = beyond.to(tl.int32, bitcast=True) - 1
    return enough.to(tl.float32, bitcast=True)


@triton.jit
def _log_wait(token, first, second):
    x = (token.to(tl.uint32) * _SPREAD) ^ first
    x = ((x >> 16) ^ x) * _MIX_1 + second
    x = (((x >> 15) ^ x) * _MIX_2) & 0x7FFFFFFF
    chance = x.to(tl.int32, bitcast=True).to(tl.float32) * (2**-31 * (1 - 2**-24)) + 2**-32
    # -log(1 - chance), near 0 by its series: there 1 - chance has lost what tells them apart.
    series = chance * (1.0 + chance * (0.5 + chance * (1 / 3)))
    return tl.log(tl.where(chance < 1 / 64, series, -tl.log(1.0 - chance)))


@triton.jit
def _draw(scores, slots, lengths, floats, ints, tokens, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * VOCABULARY
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    are_numbers = tl.full([BLOCK], 1, tl.int1)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + token, mask=token < VOCABULARY, other=-float("inf"))
        largest = tl.maximum(largest, score)
        are_numbers &= score <= float("inf")
    best = tl.max(largest, 0)
    is_sound = (tl.min(are_numbers.to(tl.int32), 0) == 1) & (tl.abs(best) < float("inf"))

    found = -1
    if is_sound:
        slot = tl.load(slots + row)
        temperature, limit = tl.load(floats + 3 * slot), tl.load(floats + 3 * slot + 1)
        if temperature > 0.0:
            top_p, top_k = tl.load(floats + 3 * slot + 2), tl.load(ints + 3 * slot)
            reach = limit * 0.0 + _FARTHEST
            if top_k < VOCABULARY:
                reach = _reach(scores, best, top_k.to(tl.float32), 0.0, reach, VOCABULARY, BLOCK)
            if top_p < 1.0:
                mass, reach, _ = _within(scores, best, reach, 1.0 / temperature, VOCABULARY, BLOCK)
                reach = _reach(scores, best, top_p * mass, 1.0 / temperature, reach, VOCABULARY, BLOCK)
            limit = tl.minimum(limit, reach)
        position = tl.load(lengths + slot).to(tl.uint32)
        first = tl.load(ints + 3 * slot + 1).to(tl.uint32, bitcast=True) + position
        second = tl.load(ints + 3 * slot + 2).to(tl.uint32, bitcast=True) + position * _SPREAD
        least = tl.full([BLOCK], float("inf"), tl.float32)
        nearest = tl.zeros([BLOCK], tl.int32)
        for start in range(0, VOCABULARY, BLOCK):
            token = start + tl.arange(0, BLOCK)
            distance = best - tl.load(scores + token, mask=token < VOCABULARY, other=-float("inf"))
            drawn = tl.where(distance <= limit, distance + temperature * _log_wait(token, first, second), float("inf"))
            nearest = tl.where(drawn < least, token, nearest)
            least = tl.minimum(least, drawn)
        found = tl.min(tl.where(least == tl.min(least, 0), nearest, VOCABULARY), 0)
    tl.store(tokens + row, found)


def draw(scores: Tensor, slots: Tensor, lengths: Tensor, floats: Tensor, ints: Tensor) -> Tensor:
    """The token of each row of scores [rows, vocabulary] in float32, by the settings of `slots` that `Sampler` keeps.

    -1 where the best score is no finite number.
    """
    rows, vocabulary = scores.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    block = min(MOST_TOKENS, triton.next_power_of_2(vocabulary))
    _draw[rows,](scores, slots, lengths, floats, ints, tokens, vocabulary, block, num_warps=16 if block > 4096 else 4)
    return tokens
