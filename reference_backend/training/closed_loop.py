"""Does a picture show what was asked for? A model that sees is asked, which never saw a painted one.

`python -m reference_backend.training.closed_loop PAINTER SEER` prints how often what it says is what was asked for, to
the last letter: all of it, and all but the kind of shape. What is asked for is held out: neither of the two has met
such a shape in training.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path
from random import Random

import numpy as np
import torch

from reference_backend.engine.model import load_model
from reference_backend.executors.rectified_flow import opened
from reference_backend.protocol import PICTURE
from reference_backend.repository import Card
from reference_backend.tokenizer import Message, Tokenizer
from reference_backend.training.examine import Question, answers
from reference_backend.training.pictures import KINDS, TOLD_APART, Painter, Scene, caption

SEED = 11
EXAMINED = 300
AT_ONCE = 32


async def paint(directory: Path, scenes: list[Scene]) -> list[bytes]:
    """A picture of each, as pixels."""
    card = Card(kind="image", executor="rectified_flow", max_batch=AT_ONCE)
    prompts = np.array([caption(scene).encode() for scene in scenes], object)
    async with opened(directory, card) as studio:
        painted = await studio.infer({"prompt": prompts, "seed": np.arange(len(scenes))})
    return [picture.tobytes() for picture in painted["image"]]


def loop(painter: Path, seer: Path, count: int) -> list[tuple[str, str]]:
    """What was asked for and what is seen, for so many pictures of one shape."""
    drawn = Painter(Random(SEED), training=False, kinds=TOLD_APART)  # noqa: S311  pictures, not secrets
    scenes = [drawn.scene(1) for _ in range(count)]
    pictures = asyncio.run(paint(painter, scenes))
    asked = [
        Question(
            "caption", [Message("user", f"{PICTURE}Describe the picture.")], drawn.describe(scene).answer, (pixels,)
        )
        for scene, pixels in zip(scenes, pictures, strict=True)
    ]
    given = answers(load_model(seer, torch.device("cpu")), Tokenizer(seer), asked)
    return [(question.expected, said) for question, said in zip(asked, given, strict=True)]


def without_kind(said: str) -> str:
    """What is said of size, colour and place alone."""
    return re.sub("|".join(KINDS), "shape", said)


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine a model that paints by one that sees.")
    parser.add_argument("painter", type=Path)
    parser.add_argument("seer", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = loop(options.painter, options.seer, EXAMINED)
    exact = sum(asked == seen for asked, seen in pairs)
    but_for_kind = sum(without_kind(asked) == without_kind(seen) for asked, seen in pairs)
    print(f"of {len(pairs)}: {exact} exact, {but_for_kind} but for the kind")  # noqa: T201


if __name__ == "__main__":
    main()
