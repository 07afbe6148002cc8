"""A language model in service: its tokenizer here, its engine in a worker process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reference_backend.engine.config import VISION_FILE, ModelError, Narrow, read_config
from reference_backend.engine.frames import Start
from reference_backend.load_report import Reporter
from reference_backend.repository import Entry, Kind
from reference_backend.tokenizer import Tokenizer
from reference_backend.worker import Worker

LoadFormat = Literal["safetensors", "dummy"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the engine is made, and of what; None: what is sensible."""

    max_running: int
    max_waiting: int
    context: int | None
    cache_tokens: int | None
    quantize: Narrow | None
    ranks: int
    load_format: LoadFormat


class Language(Worker):
    """A worker, and what of the model the server needs itself."""

    kind: Kind = "language"

    def __init__(
        self, tokenizer: Tokenizer, start: Start, bound: int, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        super().__init__(start, bound, clock)
        self.reporter = Reporter(self, wall)
        self.tokenizer = tokenizer
        self.sees = tokenizer.picture_token is not None and (Path(start.model) / VISION_FILE).exists()

    @classmethod
    def read(cls, entry: Entry, sizes: Sizes, clock: Callable[[], float], wall: Callable[[], float]) -> Language:
        """The model of a directory. Raises ModelError."""
        tokenizer = read_tokenizer(entry)
        start = Start(
            str(entry.directory),
            sorted(tokenizer.end_tokens),
            sizes.max_running,
            sizes.context,
            sizes.cache_tokens,
            sizes.quantize,
            sizes.ranks,
            sizes.load_format == "dummy",
        )
        return cls(tokenizer, start, sizes.max_running + sizes.max_waiting, clock, wall)


def read_tokenizer(entry: Entry) -> Tokenizer:
    """The tokenizer of a directory that the engine can serve. Raises ModelError."""
    config, tokenizer = read_config(entry.directory), Tokenizer(entry.directory)
    if tokenizer.largest_token >= config.vocab_size:
        raise ModelError(
            f"{entry.directory}: the tokenizer knows token {tokenizer.largest_token}, the model only "
            f"{config.vocab_size} of them; tokenizer.json and config.json do not belong together"
        )
    return tokenizer
