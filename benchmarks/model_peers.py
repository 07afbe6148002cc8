"""What `weir bench backend --beside` measures: workloads, and how each server is started and asked for them.

chat        the default model over server-sent events: 1 and 16 streams, answers of 64 tokens
shape       a model of Qwen3-0.6B's shape, random weights (1.2 GB in bf16): 1 and 8 streams, answers of 16 tokens
mlp         a network of 64-256-256-10 in ONNX over HTTP and JSON: 64 clients, one row each
embeddings  MiniLM: 1 and 32 clients, texts of 5 to 60 words
fairness    ours alone: a light consumer by itself, and beside one that floods
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks import model_files
from benchmarks.beside import Server, Workload, light, streamed, whole
from benchmarks.figures import Figure

SERVERS = msgspec.toml.decode(Path(__file__).with_suffix(".toml").read_bytes(), type=dict[str, tuple[Server, ...]])

STREAMED = (
    Figure("tokens_per_second", "tok/s", "tokens", 1),
    Figure("first_p50_ms", "ms", "first token p50"),
    Figure("cpu_us", "µs", "CPU per token", 0),
)
WHOLE = (
    Figure("per_second", "/s", "requests", 0),
    Figure("p50_ms", "ms", "p50", 2),
    Figure("p99_ms", "ms", "p99", 2),
    Figure("cpu_us", "µs", "CPU per request", 0),
)
LIGHT = (
    Figure("p95_ms", "ms", "p95 of the light consumer", 0),
    Figure("p50_ms", "ms", "p50", 0),
    Figure("flood", "tok/s", "the other's tokens", 0),
    Figure("flood_alone", "tok/s", "by itself", 0),
)


def question(number: int) -> dict[str, object]:
    """A chat that nobody has asked before."""
    text = f"Question {number}: what is a circuit breaker, and when does it let requests through again?"
    return {"messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}


def row(number: int) -> dict[str, object]:
    data = [((number + i) % 17) / 17 for i in range(64)]
    return {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": data}]}


def text(number: int) -> dict[str, object]:
    """Of 5 to 60 words, as sentences and paragraphs are."""
    words = "a gateway sends each request to the backend that has least to do and tells its client when none is left"
    return {"input": " ".join((words.split() * 3)[: 5 + 13 * number % 56])}


CHATS = Workload(
    "chat",
    "the default model, answers of 64 tokens",
    (1, 16),
    SERVERS["language"],
    model_files.tiny,
    question,
    streamed,
    STREAMED,
    tokens=64,
    # One thread for a small model, which is what each is fastest with, and what ours takes by itself.
    places={"running": 16, "waiting": 16, "dtype": "float32", "threads": 1},
)
WORKLOADS = {
    each.id: each
    for each in (
        CHATS,
        replace(
            CHATS,
            id="shape",
            title="Qwen3-0.6B's shape, random weights, answers of 16 tokens",
            points=(1, 8),
            files=model_files.qwen_shape,
            tokens=16,
            places={"running": 8, "waiting": 16, "dtype": "bfloat16", "threads": 2},
        ),
        Workload(
            "mlp",
            "a network of 64-256-256-10, one row a request",
            (64,),
            SERVERS["network"],
            model_files.mlp,
            row,
            whole,
            WHOLE,
        ),
        Workload(
            "embeddings",
            "MiniLM, one text a request",
            (1, 32),
            SERVERS["encoder"],
            model_files.minilm,
            text,
            whole,
            WHOLE,
        ),
        replace(
            CHATS,
            id="fairness",
            title="a light consumer beside so many requests of another's",
            points=(0, 24),
            servers=SERVERS["language"][:1],
            measure=light,
            figures=LIGHT,
            places={"running": 8, "waiting": 24},
        ),
    )
}
