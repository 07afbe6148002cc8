"""Train a model that reads text and pictures: `python -m reference_backend.training.train_vlm`.

Everything follows from the seed, the number of steps and the weights to begin with. What a step learns from is drawn
from a seed of its own, so that a run that was stopped goes on from its last checkpoint as if nothing had been. The
learning rate warms up and then falls on a cosine; only what the assistant says is learnt. The matrices inside the
layers are trained by Muon, the rest by AdamW.

Beginning with the weights of a model of text alone saves most of the work: it speaks already, and has only to learn
to see. Where those have more layers than are asked for, layers are left out evenly.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from reference_backend.engine.config import read_config
from reference_backend.engine.request import PICTURE_SIDE, PICTURE_TOKENS
from reference_backend.engine.vision import Vision
from reference_backend.tokenizer import PICTURE_TOKEN
from reference_backend.training.corpus import GLOSSARY, Exchange, Generator
from reference_backend.training.muon import Muon
from reference_backend.training.network import Llama
from reference_backend.training.pictures import COLOURS, PLACES, SIZES, TOLD_APART, Painter, Scene
from reference_backend.training.train_tiny import (
    CONFIG,
    END,
    END_OF_TEXT,
    START,
    save_weights,
    schedule,
    write_settings,
)

SEED = 20_271
TALKS, VIEWS = (8, 256), (32, 76)  # rows of a step, tokens in a row
PEAK_RATE, PEAK_EYE_RATE, PEAK_MUON_RATE, WARM_UP_STEPS = 4e-3, 1e-3, 0.02, 30
EYE_STEPS, EYE_PICTURES, EYE_RATE = 300, 128, 3e-3
EYE_AGAIN = 0.3  # share of that rate for an eye that is read already
CHECKPOINT_STEPS = 50


class Batch(NamedTuple):
    """Rows of token ids, the same shifted by one where they are to be learnt (else -100), and the pictures in order."""

    ids: Tensor
    targets: Tensor
    pictures: Tensor  # uint8 [pictures, 32, 32, 3]


class Row(NamedTuple):
    ids: list[int]
    learnt: list[int]  # 1 where the assistant speaks
    pictures: list[Tensor]


class Rows:
    """The training rows of one step."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.generator = Generator(seed, training=True, sees=True)
        self.random = self.generator.random
        self.painter = Painter(self.random, training=True, kinds=TOLD_APART)
        self.image_token = tokenizer.token_to_id(PICTURE_TOKEN)

    def talks(self) -> Batch:
        """Long conversations; in one of three a picture is shown. Now and then plain text instead."""
        count, size = TALKS
        return _batch(
            [self._text(size) if self.random.random() < 0.05 else self._talk(size) for _ in range(count)], size
        )

    def views(self) -> Batch:
        """Short conversations about a picture: seeing is learnt from many of them."""
        count, size = VIEWS
        return _batch([self._row(*self._shown(3), size) for _ in range(count)], size)

    def _talk(self, size: int) -> Row:
        talk = self.generator.conversation(24, told=0.2, asked=0.35)
        if self.random.random() < 0.66:
            blind = [self.painter.blind() if self.random.random() < 0.06 else exchange for exchange in talk]
            return self._row(blind, [], size)
        shown, pictures = self._shown(16)
        about = [exchange if self.random.random() < 0.6 else talk.pop() for exchange in shown[1:]]
        return self._row([*talk[: self.random.randrange(3)], shown[0], *about], pictures, size)

    def _shown(self, questions: int) -> tuple[list[Exchange], list[Tensor]]:
        """A picture is shown with a question before or behind it; then come as many more. None comes twice."""
        scene = self.painter.scene(self.random.choice((1, 2, 2)))
        asked: dict[str, Exchange] = {}
        for _ in range(questions + 2):
            exchange = self.painter.exchange(scene)
            asked.setdefault(exchange.answer, exchange)
        first, *others = asked.values()
        others.sort(key=lambda exchange: len(exchange.question + exchange.answer))  # so that more fit into a row
        image = PICTURE_TOKEN * PICTURE_TOKENS
        question = f"{image}{first.question}" if self.random.random() < 0.5 else f"{first.question}{image}"
        return [Exchange(first.task, question, first.answer), *others], [self.painter.picture(scene)]

    def _row(self, exchanges: list[Exchange], pictures: list[Tensor], size: int) -> Row:
        """As many exchanges as fit."""
        system = self.generator.system_prompt() if size > VIEWS[1] else None
        ids = [] if system is None else self._encode(f"{START}system\n{system}{END}\n")
        learnt = [0] * len(ids)
        for exchange in exchanges:
            question = self._encode(f"{START}user\n{exchange.question}{END}\n{START}assistant\n")
            answer = self._encode(f"{exchange.answer}{END}\n")
            if len(ids) + len(question) + len(answer) > size:
                break
            ids += question + answer
            learnt += [0] * len(question) + [1] * (len(answer) - 1) + [0]
        is_shown = self.image_token in ids
        return Row(ids, learnt, pictures if is_shown else [])

    def _text(self, size: int) -> Row:
        """Bare sentences, for the endpoint that completes text without a chat around it."""
        ids: list[int] = []
        while len(ids) < size:
            ids += self._encode(self.random.choice(tuple(GLOSSARY.values())) + END_OF_TEXT)
        return Row(ids[:size], [1] * size, [])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids


def _batch(rows: list[Row], size: int) -> Batch:
    ids = torch.tensor([row.ids + [0] * (size - len(row.ids)) for row in rows])
    learnt = torch.tensor([row.learnt + [0] * (size - len(row.ids)) for row in rows]).bool()
    pictures = [picture for row in rows for picture in row.pictures]
    seen = torch.stack(pictures) if pictures else torch.empty(0, PICTURE_SIDE, PICTURE_SIDE, 3, dtype=torch.uint8)
    return Batch(ids[:, :-1], torch.where(learnt, ids, -100)[:, 1:], seen)


def open_eyes(vision: Vision, steps: int, *, still: int = 0) -> float:
    """Teach an eye alone what is where, without words: hundreds of pictures in the time of ten with them.

    It learns with one matrix that reads each piece by itself, and is thrown away: so whatever lies in a piece is
    written there in the same way, wherever it is, and is easily found by who reads it later. For the first `still`
    steps only that matrix learns: an eye that somebody reads already goes on in the same writing. Returns the last
    loss.
    """
    traits = [len(SIZES), len(COLOURS), len(TOLD_APART), len(PLACES) + 1]  # the last: where it is, or nothing
    reader = nn.Linear(vision.row.shape[1], sum(traits))
    adam = torch.optim.AdamW(
        [{"params": [*vision.parameters()]}, {"params": [*reader.parameters()]}], lr=EYE_RATE, betas=(0.9, 0.98)
    )
    loss = torch.zeros(())
    for step in range(steps):
        painter = Painter(random.Random(f"{SEED} eye {step}"), training=True, kinds=TOLD_APART)  # noqa: S311
        scenes = [painter.scene(painter.random.choice((1, 2))) for _ in range(EYE_PICTURES)]
        pictures = torch.stack([painter.picture(scene) for scene in scenes])
        seen = reader(vision(pictures)).flatten(0, 1)
        truth = torch.tensor([piece for scene in scenes for piece in _truth(scene)])
        each = zip(seen.split(traits, dim=-1), truth.unbind(-1), strict=True)
        loss = sum((functional.cross_entropy(said, true) for said, true in each), torch.zeros(()))
        eye, matrix = adam.param_groups
        matrix["lr"] = EYE_RATE * schedule(step, steps, WARM_UP_STEPS)
        eye["lr"] = matrix["lr"] * (step >= still) * (EYE_AGAIN if still else 1.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 50 == 0:
            print(f"eye step {step} loss {loss.item():.4f}", flush=True)  # noqa: T201
    return loss.item()


def _truth(scene: Scene) -> list[list[int]]:
    """For each of the 4 x 4 pieces: size, colour, kind and place of what lies in it; -100 where that is not clear."""
    columns = {name: index for names in (SIZES, COLOURS, TOLD_APART, PLACES) for index, name in enumerate(names)}
    pieces = [[-100, -100, -100, len(PLACES)] for _ in range(PICTURE_TOKENS)]
    for shape in scene:
        left, top = (centre // 8 - 1 for centre in PLACES[shape.place])
        for piece in (4 * row + column for row in (top, top + 1) for column in (left, left + 1)):
            told = [columns[trait] for trait in (shape.size, shape.colour, shape.kind, shape.place)]
            pieces[piece] = told if pieces[piece][3] == len(PLACES) else [-100] * 4
    return pieces


def with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a token for pieces of pictures, in the place of the one it learnt last."""
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    if any(token["content"] == PICTURE_TOKEN for token in content["added_tokens"]):
        return tokenizer
    last = max(vocabulary, key=vocabulary.__getitem__)
    assert "".join(merges[-1]) == last  # noqa: S101  else other tokens are made of it
    del vocabulary[last], merges[-1]
    fewer = Tokenizer.from_str(json.dumps(content))
    fewer.add_special_tokens([AddedToken(PICTURE_TOKEN, normalized=False, special=True)])
    return fewer


class Run:
    """A training as far as it has come: the model, its optimisers, the losses of the steps taken."""

    def __init__(self, directory: Path, steps: int, tokenizer: Tokenizer, rate: float = 1.0, seed: int = SEED) -> None:
        self.directory, self.steps, self.tokenizer, self.rate, self.seed = directory, steps, tokenizer, rate, seed
        self.losses: list[list[float]] = []  # of the talks and the views of each step
        self.seconds = 0.0
        torch.manual_seed(seed)
        self.model = Llama(read_config(directory))
        self.vision = Vision(self.model.config.hidden_size)
        self.image_token = tokenizer.token_to_id(PICTURE_TOKEN)
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "layers" in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() == 1 or "layers" not in name]
        adam = {"params": others, "peak": PEAK_RATE}
        eye = {"params": list(self.vision.parameters()), "peak": PEAK_EYE_RATE}
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, PEAK_MUON_RATE),
            torch.optim.AdamW([adam, eye], lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def begin_with(self, directory: Path) -> None:
        """Take over weights, and of the layers as many as there are here, evenly."""
        weights = load_file(directory / "model.safetensors")
        layers = self.model.config.layers
        theirs = read_config(directory).layers
        for layer in range(layers):
            source = round(layer * (theirs - 1) / max(layers - 1, 1))
            prefix, wanted = f"model.layers.{source}.", f"model.layers.{layer}."
            taken = {name: value for name, value in weights.items() if name.startswith(prefix)}
            weights |= {f"_{wanted}{name.removeprefix(prefix)}": value for name, value in taken.items()}
        kept = {name: value.float() for name, value in weights.items() if not name.startswith("model.layers.")}
        self.model.load_state_dict({name.removeprefix("_"): value for name, value in kept.items()}, strict=False)
        vision = directory / "vision.safetensors"
        if vision.exists():
            self.vision.load_state_dict({name: value.float() for name, value in load_file(vision).items()})
            open_eyes(self.vision, EYE_STEPS, still=EYE_STEPS // 4)
        else:
            open_eyes(self.vision, EYE_STEPS)

    def step(self) -> list[float]:
        """One step. Returns its losses."""
        number = len(self.losses)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * group["peak"] * schedule(number, self.steps, WARM_UP_STEPS)
        rows = Rows(self.tokenizer, random.Random(f"{self.seed} {number}").randrange(2**62))  # noqa: S311
        losses = [self._loss(batch) for batch in (rows.talks(), rows.views())]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *self.vision.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append([loss.item() for loss in losses])
        return self.losses[-1]

    def _loss(self, batch: Batch) -> Tensor:
        learnt = batch.targets != -100
        pieces = self.vision(batch.pictures).flatten(0, 1)
        hidden = self.model(batch.ids, (batch.ids == self.image_token, pieces))
        return functional.cross_entropy(self.model.logits(hidden[learnt]), batch.targets[learnt])

    def save(self, checkpoint: Path) -> None:
        """All that the run needs to go on."""
        parts = [self.model.state_dict(), self.vision.state_dict(), *(o.state_dict() for o in self.optimizers)]
        torch.save([parts, self.losses, self.seconds], checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        parts, self.losses, self.seconds = torch.load(checkpoint)
        for part, state in zip([self.model, self.vision, *self.optimizers], parts, strict=True):
            part.load_state_dict(state)

    def finish(self) -> None:
        """Weights in bfloat16: of the text in model.safetensors as everyone reads it, of the eye beside it."""
        save_weights(self.model, self.directory)
        vision = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.vision.state_dict().items()}
        save_file(vision, self.directory / "vision.safetensors", metadata={"format": "pt"})


def train(out: Path, begin_with: Path, *, layers: int, steps: int, rate: float = 1.0, seed: int = SEED) -> Run:
    """Train, from the last checkpoint if there is one, and leave a complete model directory behind."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = with_image_token(Tokenizer.from_file(str(begin_with / "tokenizer.json")))
    write_settings(out, tokenizer)
    config = CONFIG | {"num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    run, checkpoint = Run(out, steps, tokenizer, rate, seed), out / "checkpoint.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    else:
        run.begin_with(begin_with)
        run.save(checkpoint)
    while len(run.losses) < steps:
        started = time.perf_counter()
        losses = run.step()
        run.seconds += time.perf_counter() - started
        if len(run.losses) % CHECKPOINT_STEPS == 0 or len(run.losses) == steps:
            run.save(checkpoint)
            run.finish()
        if len(run.losses) % 10 == 0:
            print(f"step {len(run.losses)} losses {losses} seconds {run.seconds:.0f}", flush=True)  # noqa: T201
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of text and pictures.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begin-with", type=Path, required=True, help="a model directory: tokenizer and weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, default=1.0, help="share of the usual rate: less to improve what is good")
    parser.add_argument("--seed", type=int, default=SEED, help="another one for each further run: what it sees is new")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    train(
        options.out,
        options.begin_with,
        layers=options.layers,
        steps=options.steps,
        rate=options.rate,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
