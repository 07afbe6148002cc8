"""A language model in service: its tokenizer here, its engine in a worker process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reference_backend.engine.config import VISION_FILE, ModelError, Narrow, read_config
from reference_backend.engine.frames import Start
from reference_backend.load_report import Reporter
from reference_backend.repository import Entry, Kind
from reference_backend.tokenizer import Tokenizer
from reference_backend.worker import Worker


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the engine is made, and of what; None: what is sensible."""

    max_running: int
    max_waiting: int
    context: int | None
    cache_tokens: int | None
    quantize: Narrow | None
    ranks: int
    load_format: Literal["safetensors", "dummy"]


class Language:
    kind: Kind = "language"

    def __init__(self, worker: Worker, tokenizer: Tokenizer, start: Start, wall: Callable[[], float]) -> None:
        self.worker = worker
        self.reporter = Reporter(worker, wall)
        self.tokenizer = tokenizer
        self.bound = worker.bound
        self.sees = tokenizer.picture_token is not None and (Path(start.model) / VISION_FILE).exists()
        self._start = start

    @classmethod
    def read(cls, entry: Entry, sizes: Sizes, clock: Callable[[], float], wall: Callable[[], float]) -> Language:
        """What of the model the server needs itself. Raises ModelError."""
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
        return cls(Worker(sizes.max_running + sizes.max_waiting, clock), tokenizer, start, wall)

    @property
    def is_alive(self) -> bool:
        return self.worker.is_alive

    def running(self) -> AbstractAsyncContextManager[None]:
        return self.worker.running(self._start)

    async def sleep(self) -> None:
        await self.worker.sleep()

    async def wake(self) -> None:
        await self.worker.wake()

    async def wait_lost(self) -> None:
        await self.worker.wait_lost()


def read_tokenizer(entry: Entry) -> Tokenizer:
    """The tokenizer of a directory that the engine can serve. Raises ModelError."""
    config, tokenizer = read_config(entry.directory), Tokenizer(entry.directory)
    if tokenizer.largest_token >= config.vocab_size:
        raise ModelError(
            f"{entry.directory}: the tokenizer knows token {tokenizer.largest_token}, the model only "
            f"{config.vocab_size} of them; tokenizer.json and config.json do not belong together"
        )
    return tokenizer
