"""Train the default model from nothing: `python -m reference_backend.training.train_tiny`.

Everything follows from SEED and the number of steps: the text is generated, the tokenizer is trained on it, the order
of rows is drawn, the weights are initialised. Time plays no part. The learning rate warms up and then falls on a
cosine; only what the assistant says is learnt, not the questions. The matrices inside the layers are trained by Muon
(as in torch.optim), which needs about half of AdamW's steps here; embeddings and norms by AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.config import read_config
from reference_backend.engine.model import load_model, parameters
from reference_backend.tokenizer import Tokenizer as ModelTokenizer
from reference_backend.training.corpus import GLOSSARY, Exchange, Generator
from reference_backend.training.examine import CARD, examine, table
from reference_backend.training.network import Llama

SEED = 20_270
STEPS = 1_200
ROWS, ROW_TOKENS = 8, 512
EXAMINED = 300  # questions of each task for the card
PEAK_RATE, WARM_UP_STEPS = 6e-3, 60
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Turns between marks; tools in the form of Qwen's models. It has learnt the former only.
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n\nThe functions that you may call:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "</tools>\n\nEach call is a JSON object in tags:\n"
    '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}"
    "{% if not (tools and loop.first and message.role == 'system') %}"
    "<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}\n"
    "{% if message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% else %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{% if message.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE over generated text. Digits stay single, so that sums are done digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = Generator(SEED, training=True)
    exchanges = (exchange for _ in range(2_000) for exchange in generator.conversation(6))
    tokenizer.train_from_iterator((f"{e.question}\n{e.answer}" for e in exchanges), trainer)
    return tokenizer


class Rows:
    """An endless supply of training rows: token ids, and the same ids shifted by one where they are to be learnt."""

    def __init__(self, tokenizer: Tokenizer, seed: int, count: int) -> None:
        self.tokenizer = tokenizer
        self.count = count
        self.generator = Generator(seed, training=True)
        self.random = random.Random(seed)  # noqa: S311  text, not secrets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = [
                self._plain_text() if self.random.random() < 0.04 else self._conversation() for _ in range(self.count)
            ]
            ids, learnt = (torch.tensor(column) for column in zip(*rows, strict=True))
            yield ids[:, :-1], torch.where(learnt.bool(), ids, -100)[:, 1:]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _conversation(self) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        learnt: list[int] = []
        system = self.generator.system_prompt()
        if system is not None:
            ids = self._encode(f"{START}system\n{system}{END}\n")
            learnt = [0] * len(ids)
        for exchange in self.generator.conversation(48):
            question, answer = self._exchange(exchange)
            if len(ids) + len(question) + len(answer) > ROW_TOKENS:
                break
            ids += question + answer
            learnt += [0] * len(question) + [1] * (len(answer) - 1) + [0]
        return _padded(ids, learnt)

    def _exchange(self, exchange: Exchange) -> tuple[list[int], list[int]]:
        question = self._encode(f"{START}user\n{exchange.question}{END}\n{START}assistant\n")
        return question, self._encode(f"{exchange.answer}{END}\n")

    def _plain_text(self) -> tuple[list[int], list[int]]:
        """Bare sentences, for the endpoint that completes text without a chat around it."""
        ids: list[int] = []
        while len(ids) < ROW_TOKENS:
            ids += self._encode(self.random.choice(tuple(GLOSSARY.values())) + END_OF_TEXT)
        return ids[:ROW_TOKENS], [1] * ROW_TOKENS


def _padded(ids: list[int], learnt: list[int]) -> tuple[list[int], list[int]]:
    padding = [0] * (ROW_TOKENS - len(ids))
    return ids + padding, learnt + padding


def train(directory: Path, steps: int = STEPS, rows: int = ROWS) -> list[float]:
    """Train for `steps` and leave a complete model directory behind. Returns the loss of each step."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    write_settings(directory, tokenizer)
    model = Llama(read_config(directory))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=0.02 if parameter is model.lm_head.weight else parameter.shape[1] ** -0.5
            )
    optimizers = _optimizers(model)
    losses: list[float] = []
    started = time.perf_counter()
    for step, (ids, targets) in zip(range(steps), Rows(tokenizer, SEED, rows), strict=False):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, WARM_UP_STEPS)
        learnt = targets != -100
        loss = functional.cross_entropy(model.logits(model(ids)[learnt]), targets[learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {losses[-1]:.4f} seconds {time.perf_counter() - started:.0f}", flush=True)  # noqa: T201  progress
    save_weights(model, directory)
    return losses


def _optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "layers" not in name]
    return [
        torch.optim.Muon([{"params": matrices, "peak": 0.02}], lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW([{"params": others, "peak": PEAK_RATE}], lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warm_up_steps: int) -> float:
    """The share of the peak rate: up in so many steps, but a quarter at most, and down on a cosine."""
    warm_up = min(warm_up_steps, steps // 4)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def write_settings(directory: Path, tokenizer: Tokenizer) -> None:
    """Everything of a Hugging Face directory but the weights."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in settings.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(model: Llama, directory: Path) -> None:
    """Weights in bfloat16. The output matrix is the embedding and is kept once."""
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_card(directory: Path, *, steps: int, loss: float, seconds: float, threads: int) -> None:
    """Examine what was trained, and write MODEL_CARD.md."""
    model, tokenizer = load_model(directory, torch.device("cpu")), ModelTokenizer(directory)
    weights = (directory / "model.safetensors").read_bytes()
    card = CARD.format(
        parameters=parameters(model.config),
        size=len(weights) / 1e6,
        table=table(examine(model, tokenizer, per_task=EXAMINED)),
        context=model.config.context,
        rows=ROWS,
        row=ROW_TOKENS,
        seed=SEED,
        steps=steps,
        loss=loss,
        seconds=seconds,
        machine=_machine(),
        torch=torch.__version__,
        threads=threads,
        sha256=hashlib.sha256(weights).hexdigest(),
    )
    (directory / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _machine() -> str:
    """The kind of processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the default model from nothing, examine it, write its card.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "models" / "tiny")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(mode=True)
    started = time.perf_counter()
    losses = train(options.out, options.steps)
    seconds = time.perf_counter() - started
    write_card(options.out, steps=options.steps, loss=losses[-1], seconds=seconds, threads=options.threads)


if __name__ == "__main__":
    main()
