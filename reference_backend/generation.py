"""A request to a language model: from a prompt to pieces of text.

A generation is held by a `with` from admission to the last byte. Whatever ends the request, the client going away
included, aborts the sequence.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self
from uuid import uuid4

from reference_backend import protocol
from reference_backend.engine.request import Delta, Finish, Logprobs, Picture, Priority, Sampling
from reference_backend.load_report import Reporter
from reference_backend.protocol import ApiError, TokenLogprob, Usage
from reference_backend.tokenizer import TextStream, Tokenizer
from reference_backend.tools import CallPiece, CallReader, Form
from reference_backend.worker import Worker, WorkerAway, WorkerBusy


class GenerationError(Exception):
    """There will be no more tokens, and no proper end. Carries what to tell a client who has seen none yet."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Generation:
    """One request at the worker: a `with` around `next`, which gives its tokens, those of each choice in order.

    There is a choice for each sampling, and each takes a place at the worker.
    """

    def __init__(
        self, worker: Worker, reporter: Reporter, prompt: list[int], samplings: list[Sampling], asked: Asked
    ) -> None:
        self._worker, self._reporter = worker, reporter
        self._arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._prompt, self._samplings, self._asked = prompt, samplings, asked
        self._tickets: list[int] = []
        self._began, self._first_at, self._tokens = worker.clock(), 0.0, 0

    def __enter__(self) -> Self:
        """Raises ApiError 429 when the worker is full, 503 when there is none."""
        try:
            for choice, sampling in enumerate(self._samplings):
                ticket = self._worker.submit(
                    self._prompt,
                    sampling,
                    partial(self._arrive, choice),
                    deadline=self._asked.deadline,
                    priority=self._asked.priority,
                    tenant=self._asked.tenant,
                    salt=self._asked.salt,
                    pictures=self._asked.pictures,
                )
                self._tickets.append(ticket)
        except WorkerBusy as error:
            for choice in range(len(self._tickets)):
                self.abort(choice)
            self._reporter.rejects += 1
            raise protocol.not_started(429, "queue_full", "this backend has no room for another request now") from error
        except WorkerAway as error:
            raise protocol.loading() from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for choice in range(len(self._tickets)):
            self.abort(choice)
        if self._tokens:
            each = -(-self._tokens // len(self._tickets))
            self._reporter.answered(self._first_at - self._began, self._worker.clock() - self._began, each)

    @property
    def choices(self) -> int:
        return len(self._samplings)

    def abort(self, choice: int) -> None:
        """Give one choice up. What it has said may still come."""
        self._worker.abort(self._tickets[choice])

    def _arrive(self, choice: int, delta: Delta) -> None:
        self._arrived.put_nowait((choice, delta))

    async def next(self) -> tuple[int, Delta]:
        """Wait for the next token of any choice, or its end. Raises GenerationError."""
        choice, delta = await self._arrived.get()
        if delta.finish == "failed":
            raise GenerationError(protocol.engine_failed())
        if delta.finish == "grammar":
            raise GenerationError(protocol.grammar_failed())
        if delta.finish == "lost":
            raise GenerationError(protocol.worker_lost())
        self._tokens += 1
        if self._tokens == 1:
            self._first_at = self._worker.clock()
        return choice, delta


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
    """What is to be sent on of a choice: text and calls, the end if this is it, and of which tokens it is if wanted."""

    choice: int
    text: str
    finish: str | None  # as OpenAI calls it
    logprobs: list[TokenLogprob] | None
    calls: list[CallPiece]
    is_late: bool = False


class _Written:
    """One choice: its text, in which there may be calls."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], form: Form | None) -> None:
        self._text = TextStream(tokenizer, stops)
        self._calls = None if form is None else CallReader(form, lambda: f"call_{uuid4().hex[:24]}")
        self.untold: list[TokenLogprob] | None = None  # of text that is held back

    def take(self, delta: Delta) -> tuple[str, list[CallPiece], str | None]:
        """What is certain now, and how it ends, if it does."""
        text = "" if delta.token is None else self._text.feed(delta.token)
        if delta.finish is not None and not self._text.is_stopped:
            text += self._text.finish()
        finish: Finish | None = "stop" if self._text.is_stopped else delta.finish
        calls: list[CallPiece] = []
        if self._calls is not None:
            text, calls = self._calls.feed(text)
            text += self._calls.finish() if finish is not None else ""
        has_called = self._calls is not None and self._calls.calls > 0
        return text, calls, None if finish is None else protocol.finish_reason(finish, has_called=has_called)


class Reader:
    """A generation as text: detokenised, cut at the stop strings, counted. `choices` are those still being written."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        prompt_tokens: int,
        form: Form | None = None,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self.choices = {choice: _Written(tokenizer, stops, form) for choice in range(generation.choices)}
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    async def next(self) -> Piece:
        """The next text that is certain. A piece with a finish is the last of its choice."""
        while True:
            choice, delta = await self._generation.next()
            written = self.choices.get(choice)
            if written is None:
                continue  # it was on its way when a stop string ended the choice
            self._completion_tokens += delta.finish != "deadline"
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
            if delta.token is not None and delta.logprobs is not None:
                written.untold = [*(written.untold or []), self._told(delta.token, delta.logprobs)]
            text, calls, finish = written.take(delta)
            if finish is not None:
                del self.choices[choice]
                self._generation.abort(choice)
            if text or calls or finish is not None:
                told, written.untold = written.untold, None
                return Piece(choice, text, finish, told, calls, delta.finish == "deadline")

    def _told(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        top = [(self._tokenizer.name(other), value) for other, value in logprobs.top]
        return TokenLogprob(self._tokenizer.name(token), logprobs.chosen, top)
