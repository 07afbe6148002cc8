"""A request to a language model: from a prompt to pieces of text.

A generation is held by a `with` from admission to the last byte. Whatever ends the request, the client going away
included, aborts the sequence.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from reference_backend import protocol
from reference_backend.engine.request import Delta, Finish, Logprobs, Picture, Priority, Sampling
from reference_backend.load_report import Reporter
from reference_backend.protocol import ApiError, TokenLogprob, Usage
from reference_backend.tokenizer import TextStream, Tokenizer
from reference_backend.worker import Worker, WorkerAway, WorkerBusy


class GenerationError(Exception):
    """There will be no more tokens, and no proper end. Carries what to tell a client who has seen none yet."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Generation:
    """One request at the worker: a `with` around `next`, which gives its tokens in order."""

    def __init__(self, worker: Worker, reporter: Reporter, prompt: list[int], sampling: Sampling, asked: Asked) -> None:
        self._worker, self._reporter = worker, reporter
        self._arrived: asyncio.Queue[Delta] = asyncio.Queue()
        self._prompt, self._sampling, self._asked = prompt, sampling, asked
        self._ticket = 0
        self._began, self._first_at, self._tokens = worker.clock(), 0.0, 0

    def __enter__(self) -> Self:
        """Raises ApiError 429 when the worker is full, 503 when there is none."""
        try:
            self._ticket = self._worker.submit(
                self._prompt,
                self._sampling,
                self._arrived.put_nowait,
                deadline=self._asked.deadline,
                priority=self._asked.priority,
                tenant=self._asked.tenant,
                salt=self._asked.salt,
                pictures=self._asked.pictures,
            )
        except WorkerBusy as error:
            self._reporter.rejects += 1
            raise protocol.not_started(429, "queue_full", "this backend has no room for another request now") from error
        except WorkerAway as error:
            raise protocol.loading() from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.abort(self._ticket)
        if self._tokens:
            self._reporter.answered(self._first_at - self._began, self._worker.clock() - self._began, self._tokens)

    async def next(self) -> Delta:
        """Wait for the next token or the end. Raises GenerationError."""
        delta = await self._arrived.get()
        if delta.finish == "failed":
            raise GenerationError(protocol.engine_failed())
        if delta.finish == "lost":
            raise GenerationError(protocol.worker_lost())
        self._tokens += 1
        if self._tokens == 1:
            self._first_at = self._worker.clock()
        return delta


@dataclass(frozen=True, slots=True)
class Asked:
    """What stands beside a request: until when it is wanted, how urgently, by whom, and with whom it may share."""

    deadline: float | None
    priority: Priority
    tenant: str
    salt: bytes
    pictures: list[Picture] = field(default_factory=list)  # that the prompt has places for


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to be sent on, the end if this is it, and of which tokens it is, where the client wants to know."""

    text: str
    finish: Finish | None
    logprobs: list[TokenLogprob] | None


class Reader:
    """A generation as text: detokenised, cut at the stop strings, counted."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stops)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    async def next(self) -> Piece:
        """The next text that is certain. A piece with a finish is the last."""
        told: list[TokenLogprob] | None = None
        while True:
            delta = await self._generation.next()
            self._completion_tokens += delta.finish != "deadline"
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
            text = "" if delta.token is None else self._text.feed(delta.token)
            if delta.token is not None and delta.logprobs is not None:
                told = [*(told or []), self._told(delta.token, delta.logprobs)]
            if delta.finish is not None and not self._text.is_stopped:
                text += self._text.finish()
            finish = "stop" if self._text.is_stopped else delta.finish
            if text or finish is not None:
                return Piece(text, finish, told)

    def _told(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        top = [(self._tokenizer.name(other), value) for other, value in logprobs.top]
        return TokenLogprob(self._tokenizer.name(token), logprobs.chosen, top)
