"""An executor as anyone may write it: `sum` = `left` + `right`, row by row, and `words` given back reversed.

Settings, all optional: `slow` (seconds that a run takes), `broken` (it raises), `exits` (the process ends in a run), `raises`
(in opening), `counts` (a `left` of zeros takes for ever; of others `words` tells how many requests there are).
"""

from __future__ import annotations

import asyncio
import contextlib
import os

import numpy as np

from reference_backend.engine.config import ModelError
from reference_backend.tensors import BadTensor, TensorSpec

INPUTS = (
    TensorSpec("left", "FP32", (-1, 3)),
    TensorSpec("right", "FP32", (-1, 3)),
    TensorSpec("words", "BYTES", (-1,)),
)
OUTPUTS = (TensorSpec("sum", "FP32", (-1, 3)), TensorSpec("words", "BYTES", (-1,)))


class Adder:
    inputs = INPUTS
    outputs = OUTPUTS

    def __init__(self, settings):
        self.settings = settings
        self.under_way = 0

    async def infer(self, inputs, terms):
        self.under_way += 1
        try:
            return await self.run(inputs)
        finally:
            self.under_way -= 1

    async def run(self, inputs):
        if self.settings.get("counts"):
            while not inputs["left"].any():
                await asyncio.sleep(3600)
            return {"sum": inputs["left"], "words": np.array([b"%d" % self.under_way], dtype=np.object_)}
        await asyncio.sleep(self.settings.get("slow", 0))
        if self.settings.get("exits"):
            os._exit(9)
        if self.settings.get("broken"):
            raise RuntimeError("a bug of the model's")
        if len(inputs["left"]) != len(inputs["right"]):
            raise BadTensor("left and right differ in rows")
        words = np.array([word[::-1] for word in inputs["words"].ravel()], dtype=np.object_)
        return {"sum": inputs["left"] + inputs["right"], "words": words}


@contextlib.asynccontextmanager
async def opened(directory, card):
    if card.settings.get("raises"):
        raise RuntimeError("a bug of the executor's")
    if "refuse" in card.settings:
        raise ModelError(f"{directory}: {card.settings['refuse']}")
    yield Adder(card.settings)
