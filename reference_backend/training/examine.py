"""The examination: held-out questions, exact answers, greedy decoding, one table.

`python -m reference_backend.training.examine DIRECTORY` prints it for a model of our own, as its card has it. Whoever
chooses between states of a training chooses by other questions, those of `--seed 1`: the card's decide nothing.

An answer is right when it is the expected one to the last character. Nothing that is asked here can be met in
training: see `corpus.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch

from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.request import Sampling, Sequence
from reference_backend.images import placed
from reference_backend.protocol import PICTURE
from reference_backend.tokenizer import Message, Tokenizer
from reference_backend.training.corpus import Generator
from reference_backend.training.pictures import TOLD_APART, Painter

SEED = 20_291  # of the questions of the cards
TASKS = ("glossary", "sum", "memory", "unknown", "small talk")  # those that the model masters
PICTURE_TASKS = ("caption", "question", "no picture")  # those beside them of a model that takes pictures
LONGEST_ANSWER_TOKENS = 120
EXAMINED = 300  # questions of each task for a card


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    messages: list[Message]
    expected: str
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the questions of one task were answered right, and one that was not."""

    task: str
    right: int
    asked: int
    miss: str | None


def questions(per_task: int, *, with_pictures: bool = False, seed: int = SEED) -> list[Question]:
    """Up to `per_task` different questions of each task, the same for a seed; small talk does not have that many."""
    generator = Generator(seed, training=False, sees=with_pictures)
    painter = Painter(Random(seed), training=False, kinds=TOLD_APART)  # noqa: S311  pictures, not secrets
    asked = [question for task in TASKS for question in _different(partial(_question, generator, task), per_task)]
    for task in PICTURE_TASKS if with_pictures else ():
        asked += _different(partial(_about_a_picture, painter, task), per_task)
    return asked


def _different(ask: Callable[[], Question], count: int) -> list[Question]:
    found: dict[object, Question] = {}
    for _ in range(20 * count):
        question = ask()
        found.setdefault((question.messages[-1].content, question.expected, question.pictures), question)
        if len(found) == count:
            break
    return list(found.values())


def _question(generator: Generator, task: str) -> Question:
    exchanges = generator.memory() if task == "memory" else [generator.tasks[task]()]
    system = generator.system_prompt()
    messages = [] if system is None else [Message("system", system)]
    for exchange in exchanges:
        messages += [Message("user", exchange.question), Message("assistant", exchange.answer)]
    return Question(task, messages[:-1], exchanges[-1].answer)


def _about_a_picture(painter: Painter, task: str) -> Question:
    """A question, before or behind the picture that it is about; or without any."""
    if task == "no picture":
        exchange = painter.blind()
        return Question(task, [Message("user", exchange.question)], exchange.answer)
    scene = painter.scene(painter.random.choice((1, 2)))
    exchange = painter.describe(scene) if task == "caption" else painter.question(scene)
    parts = [PICTURE, exchange.question]
    painter.random.shuffle(parts)
    pixels = bytes(painter.picture(scene).flatten().tolist())
    return Question(task, [Message("user", "".join(parts))], exchange.answer, (pixels,))


def answers(model: Llama, tokenizer: Tokenizer, asked: list[Question]) -> list[str]:
    """What the model says to each question, without chance."""
    slots, context = min(32, len(asked)), model.config.context
    settings = Settings(slots=slots, context=context, cache_tokens=slots * context)
    engine = Engine(model, settings, end_tokens=tokenizer.end_tokens, rng=Random(SEED))  # noqa: S311
    sampling = Sampling(max_tokens=LONGEST_ANSWER_TOKENS, temperature=0.0)
    sequences = []
    for question in asked:
        prompt = tokenizer.encode_chat(question.messages)
        pictures = placed(prompt, tokenizer.picture_token, list(question.pictures))
        sequences.append(Sequence(prompt, sampling, pictures=pictures))
    for sequence in sequences:
        engine.submit(sequence)
    while engine.is_busy:
        engine.turn(0.0)
    return [tokenizer.decode(sequence.generated) for sequence in sequences]


def examine(model: Llama, tokenizer: Tokenizer, per_task: int, seed: int = SEED) -> list[Score]:
    """The table, a row for each task."""
    sees = model.vision is not None
    asked = questions(per_task, with_pictures=sees, seed=seed)
    given = answers(model, tokenizer, asked)
    return [_score(task, asked, given) for task in (*TASKS, *(PICTURE_TASKS if sees else ()))]


def _score(task: str, asked: list[Question], given: list[str]) -> Score:
    pairs = [(q, answer) for q, answer in zip(asked, given, strict=True) if q.task == task]
    misses = [f"{q.messages[-1].content} -> {answer}" for q, answer in pairs if answer != q.expected]
    return Score(task, len(pairs) - len(misses), len(pairs), misses[0] if misses else None)


CARD = """\
# tiny: the default model of Weir's reference backend

A chat model of {parameters:,} parameters (Llama architecture, bfloat16, {size:.1f} MB) that this project trained
itself, from nothing, on text that it generates itself (`reference_backend/training/`). It exists so that a gateway has
a real model behind it that fits into a repository and answers in milliseconds on one core.

## What it can do
Explain about sixty terms of inference serving and gateways, add two numbers below 100 (showing the work),
remember the name it was told earlier in the conversation, say who it is, and say "I do not know that." to everything
else. English only. It continues plain text about its glossary, too. It was also taught to count to 30 and to repeat
words, and masters neither: 17 % and 82 % right on held-out questions.

Held-out questions, greedy decoding, an answer is right when it is exact to the last character. What is held out:
question templates (all tasks), pairs of numbers, names, and subjects for `unknown`. Small talk is a list of phrases:
there the wording alone is new.

| task | right | asked | share |
| --- | ---: | ---: | ---: |
{table}

## What it cannot do
Anything else. It is no assistant: outside its domain it refuses or answers with the nearest thing it knows, and a
confident wrong answer is possible. It reads up to {context} tokens, but has never seen more than {row} in training;
behind that, and at temperatures near 1, expect slips. It knows nothing about the world, and follows no instructions.
Of what was planned for it, subtraction, the multiplication table and answers as lists or JSON were not taught: sums
alone are learnt in the time there was, and JSON is what the server's grammar makes of any model.

## How it was made
- `python -m reference_backend.training.train_tiny`: seed {seed}, {steps} steps of {rows} rows of {row} tokens; the
  loss of the last step was {loss:.4f}
- {seconds:.0f} s on {machine}, torch {torch}, {threads} threads (niced, other work beside it)
- sha256 of model.safetensors: `{sha256}`

The same seed, number of steps, threads, torch version and kind of processor give the same weights; other processors
round differently and give others, as good.
"""


def table(scores: list[Score]) -> str:
    """The rows of the card's table."""
    every = Score("all", sum(s.right for s in scores), sum(s.asked for s in scores), None)
    return "\n".join(f"| {s.task} | {s.right} | {s.asked} | {s.right / s.asked:.1%} |" for s in (*scores, every))


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine a model of our own.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--per-task", type=int, default=EXAMINED)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.directory, torch.device("cpu"))
    scores = examine(model, Tokenizer(options.directory), options.per_task, options.seed)
    print(table(scores), *(f"{score.task}: {score.miss}" for score in scores), sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
