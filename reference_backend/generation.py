"""A request to a language model: from a prompt to pieces of text.

A generation is held by a `with` from admission to the last byte. Whatever ends the request, the client going away
included, aborts the sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self
from uuid import uuid4

from reference_backend import refusals
from reference_backend.answers import Piece, TokenLogprob, Usage, finish_reason
from reference_backend.engine.request import Delta, Finish, Picture, Sampling
from reference_backend.language import Language
from reference_backend.tensors import Terms
from reference_backend.tokenizer import TextStream, Tokenizer
from reference_backend.tools import CallPiece, CallReader, Form

REFUSALS = {"failed": refusals.engine_failed, "grammar": refusals.grammar_failed, "lost": refusals.worker_lost}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: of which prompt, each choice how, ended where, with which tools, and all beside that."""

    prompt: list[int]
    samplings: list[Sampling]  # one for each choice
    terms: Terms
    stops: tuple[str, ...]
    salt: bytes
    form: Form | None  # of calls, where there are tools
    pictures: Sequence[Picture]  # that the prompt has places for


class Generation:
    """One request at the worker, of which each choice takes a place: a `with` around an iteration over its pieces."""

    def __init__(self, model: Language, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self._arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._tickets: list[int] = []
        self._open = {
            index: _Choice(index, model.tokenizer, asked.stops, asked.form) for index in range(len(asked.samplings))
        }
        self._began, self._first_at, self._tokens = self._model.clock(), 0.0, 0
        self._is_begun = False
        self.usage = Usage(len(asked.prompt), 0)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """At the worker until left. Raises ApiError 429 when the worker is full, 503 when there is none."""
        asked = self._asked
        try:
            for choice, sampling in enumerate(asked.samplings):
                arrive = partial(self._arrive, choice)
                ticket = self._model.submit(asked.prompt, sampling, asked.terms, arrive, asked.salt, asked.pictures)
                self._tickets.append(ticket)
            yield
        finally:
            for ticket in self._tickets:
                self._model.abort(ticket)
            if self._tokens:
                each = -(-self._tokens // len(self._tickets))
                self._model.reporter.answered(self._first_at - self._began, self._model.clock() - self._began, each)

    @property
    def choices(self) -> int:
        return len(self._asked.samplings)

    def _arrive(self, choice: int, delta: Delta) -> None:
        self._arrived.put_nowait((choice, delta))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """Wait for what is certain next, of any choice. One with a finish is the last of its choice.

        Raises ApiError: where the model, its process or a grammar fails; 504 when the deadline passes before any text.
        """
        while self._open:
            index, delta = await self._arrived.get()
            if delta.finish in REFUSALS:
                refusal = REFUSALS[delta.finish]()
                raise refusal
            self._tokens += 1
            if self._tokens == 1:
                self._first_at = self._model.clock()
            choice = self._open.get(index)
            if choice is None:
                continue  # it was on its way when a stop string ended the choice
            self.usage.completion_tokens += delta.finish != "deadline"
            self.usage.cached_tokens = max(self.usage.cached_tokens, delta.cached_tokens)
            piece = choice.take(delta)
            if piece is None:
                continue
            if delta.finish == "deadline" and not (self._is_begun or piece.text):
                raise refusals.ApiError(504, "deadline", "the deadline passed before the answer began")
            if piece.finish is not None:
                del self._open[index]
                self._model.abort(self._tickets[index])
            self._is_begun = True
            return piece
        raise StopAsyncIteration


class _Choice:
    """One choice as it is written: its text, in which there may be calls."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: tuple[str, ...], form: Form | None) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._text = TextStream(tokenizer, stops)
        self._calls = None if form is None else CallReader(form, lambda: f"call_{uuid4().hex[:24]}")
        self._untold: list[TokenLogprob] = []  # of text that is held back

    def take(self, delta: Delta) -> Piece | None:
        """What is certain now, and how it ends, if it does; None while nothing is."""
        name = self._tokenizer.name
        if delta.token is not None and delta.logprobs is not None:
            top = [(name(other), value) for other, value in delta.logprobs.top]
            self._untold.append(TokenLogprob(name(delta.token), delta.logprobs.chosen, top))
        text = "" if delta.token is None else self._text.feed(delta.token)
        if delta.finish is not None and not self._text.is_stopped:
            text += self._text.finish()
        finish: Finish | None = "stop" if self._text.is_stopped else delta.finish
        calls: list[CallPiece] = []
        if self._calls is not None:
            text, calls = self._calls.feed(text)
            text += self._calls.finish() if finish is not None else ""
        if not (text or calls or finish is not None):
            return None
        told, self._untold = self._untold, []
        has_called = self._calls is not None and self._calls.calls > 0
        return Piece(self._index, text, finish and finish_reason(finish, has_called=has_called), told, calls)
