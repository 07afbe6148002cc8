"""Pictures of 32 x 32 pixels with one or two shapes, what there is to say about them, and questions, from a seed.

Held out by content: one in ten of the things that can be seen (size, colour, shape and place together). No picture of
the training side has one of them, every picture of the examination has at least one. Templates are held out, too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_backend.training.corpus import Exchange, is_held_out

SIDE = 32  # pixels
SIZES = {"small": 4.0, "big": 6.0}  # half the width
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (240, 135, 30),
    "white": (235, 235, 235),
    "cyan": (60, 210, 220),
}
KINDS = ("circle", "square", "triangle", "cross")
TOLD_APART = KINDS[1:]  # by the model that sees: small circles and squares look too much alike to it
PLACES = {  # in the order in which they are told
    "at the top left": (8, 8),
    "at the top right": (24, 8),
    "in the centre": (16, 16),
    "at the bottom left": (8, 24),
    "at the bottom right": (24, 24),
}
DARKEST, LIGHTEST = 0, 48  # of the background
NOISE, TINT, SHIFT, STRETCH = 16, 14, 1.5, 0.1  # how far pixels, colours, places (pixels) and sizes (share) vary
NO_PICTURE = "I see no picture."

# The last ones of each are the examination's.
CAPTION_TEMPLATES = (
    "What is in the picture?", "Describe the picture.", "What do you see?", "Describe this image.", "What is this?",
    "Caption this picture.", "What does the picture show?", "What can you see in this image?", "describe the image",
    "Please describe the image.", "What is on the picture?", "Tell me what you see.", "What is in this image?",
    # held out:
    "What do you see in the picture?", "Please describe this picture.",
)  # fmt: skip
COLOUR_TEMPLATES = (
    "What colour is the {}?", "Which colour does the {} have?", "What color is the {}?",
    "Tell me the colour of the {}.", "what colour is the {}", "Which colour is the {}?",
    "What is the colour of the {}?",
    # held out:
    "Which color is the {}?", "What is the color of the {}?",
)  # fmt: skip
SIZE_TEMPLATES = (
    "How big is the {}?", "What size is the {}?", "Is the {} big or small?", "how big is the {}",
    "Which size has the {}?", "Is the {} small or big?", "Tell me how big the {} is.", "what size is the {}",
    # held out:
    "Tell me the size of the {}.", "What is the size of the {}?",
)  # fmt: skip
COUNT_TEMPLATES = (
    "How many shapes are there?", "How many shapes do you see?", "Count the shapes.", "how many shapes are there",
    "How many things are there?", "How many shapes does the picture have?", "How many things can you see?",
    "How many shapes can you see?", "Tell me how many shapes there are.", "How many things does the picture show?",
    # held out:
    "How many things do you see?", "How many shapes are in the picture?",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    size: str
    colour: str
    kind: str
    place: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.kind} {self.place}"


Scene = tuple[Shape, ...]  # one or two, in the order of their places; kinds and colours differ


def caption(scene: Scene) -> str:
    """All that is to be said of it."""
    return " and ".join(map(str, scene))


class Painter:
    """Draws scenes from one side of the held-out line, and questions about them."""

    def __init__(self, rng: random.Random, *, training: bool, kinds: Sequence[str] = KINDS) -> None:
        self.random = rng
        self.kinds = kinds
        self.training = training

    def scene(self, shapes: int) -> Scene:
        """So many shapes, 1 or 2."""
        names = tuple(PLACES)
        while True:
            colours, kinds = self.random.sample(tuple(COLOURS), shapes), self.random.sample(self.kinds, shapes)
            places = self.random.sample(range(len(PLACES)), shapes)
            sizes = self.random.choices(tuple(SIZES), k=shapes)
            found = zip(sizes, sorted(zip(places, colours, kinds, strict=True)), strict=True)
            scene = tuple(Shape(size, colour, kind, names[place]) for size, (place, colour, kind) in found)
            if any(is_held_out(str(shape)) for shape in scene) != self.training:
                return scene

    def picture(self, scene: Scene) -> Tensor:
        """Its pixels, uint8 [32, 32, 3]; no two are alike."""
        vary = self.random.uniform
        noise = torch.frombuffer(bytearray(self.random.randbytes(SIDE * SIDE * 3)), dtype=torch.uint8)
        canvas = (noise % NOISE).float().view(SIDE, SIDE, 3) + self.random.randrange(DARKEST, LIGHTEST)
        centres = torch.arange(SIDE) + 0.5
        for shape in scene:
            left, top = PLACES[shape.place]
            x = (centres - left - vary(-SHIFT, SHIFT))[None, :]
            y = (centres - top - vary(-SHIFT, SHIFT))[:, None]
            inside = _inside(shape.kind, x, y, SIZES[shape.size] * vary(1 - STRETCH, 1 + STRETCH))
            tint = [channel + vary(-TINT, TINT) for channel in COLOURS[shape.colour]]
            canvas[inside] = torch.tensor(tint) + canvas[inside] % NOISE - NOISE / 2
        return canvas.clamp(0, 255).to(torch.uint8)

    def exchange(self, scene: Scene) -> Exchange:
        """One question about it, and the answer."""
        ask = self.random.choices((self.describe, self._colour, self._size, self._count), (55, 20, 15, 10))[0]
        return ask(scene)

    def question(self, scene: Scene) -> Exchange:
        """One about a part of it."""
        ask = self.random.choice((self._colour, self._size, self._count))
        return ask(scene)

    def describe(self, scene: Scene) -> Exchange:
        answer = caption(scene)
        return Exchange("caption", self._template(CAPTION_TEMPLATES), answer[0].upper() + answer[1:] + ".")

    def blind(self) -> Exchange:
        """A question about a picture where there is none."""
        ask = self.random.choice((CAPTION_TEMPLATES, COLOUR_TEMPLATES, SIZE_TEMPLATES))
        question = self._template(ask).format(self.random.choice(self.kinds))
        return Exchange("no picture", question, NO_PICTURE)

    def _template(self, templates: tuple[str, ...]) -> str:
        return self.random.choice(templates[:-2] if self.training else templates[-2:])

    def _colour(self, scene: Scene) -> Exchange:
        shape = self.random.choice(scene)
        question = self._template(COLOUR_TEMPLATES).format(shape.kind)
        return Exchange("question", question, f"The {shape.kind} is {shape.colour}.")

    def _size(self, scene: Scene) -> Exchange:
        shape = self.random.choice(scene)
        question = self._template(SIZE_TEMPLATES).format(shape.kind)
        return Exchange("question", question, f"The {shape.kind} is {shape.size}.")

    def _count(self, scene: Scene) -> Exchange:
        said = "There is one shape." if len(scene) == 1 else "There are two shapes."
        return Exchange("question", self._template(COUNT_TEMPLATES), said)


def _inside(kind: str, x: Tensor, y: Tensor, half: float) -> Tensor:
    """Which pixels, bool [32, 32], of a shape around the origin."""
    if kind == "circle":
        return x**2 + y**2 <= half**2
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.95 * half
    if kind == "triangle":
        return (y.abs() <= half) & (x.abs() <= (y + half) / 1.8)
    return (torch.minimum(x.abs(), y.abs()) <= 0.36 * half) & (torch.maximum(x.abs(), y.abs()) <= half)
