"""What clients get on the OpenAI paths: answers whole, and as server-sent events. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import msgspec

from reference_backend.engine.request import Finish
from reference_backend.tokenizer import UNFINISHED
from reference_backend.tools import CallPiece

Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, that did not have to be computed

    def as_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token as text, its logprob, and those of the likeliest tokens in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What is told of a choice at a time, or all of it: text and calls, the end if there, the tokens if wanted."""

    choice: int
    text: str
    finish: str | None = None  # as OpenAI calls it
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[CallPiece] = field(default_factory=list)


def joined(pieces: list[Piece]) -> Piece:
    """All pieces of a choice as one; calls are whole then."""
    calls: list[CallPiece] = []
    for call in (call for piece in pieces for call in piece.calls):
        if call.id is not None:
            calls.append(call)
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + call.arguments)
    text = "".join(piece.text for piece in pieces)
    return Piece(pieces[0].choice, text, pieces[-1].finish, [told for each in pieces for told in each.logprobs], calls)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a completion, whole or as the events of a stream."""

    whole_name: ClassVar[str] = "text_completion"
    chunk_name: ClassVar[str] = "text_completion"
    id_prefix: ClassVar[str] = "cmpl"

    id: str
    created: int
    model: str
    with_usage: bool = False  # chunks carry `usage`: null, until the last one

    def whole(self, choices: list[Piece], usage: Usage) -> Json:
        """The complete answer as one object."""
        told = [self._choice(self._message(each), each.choice, each.finish, each.logprobs) for each in choices]
        return self._frame(self.whole_name, told) | {"usage": usage.as_json()}

    def opening(self, choices: int) -> list[Json]:
        """The events of a stream that precede the text."""
        del choices
        return []

    def chunks(self, piece: Piece) -> list[Json]:
        """The events that a piece becomes: what is new, and the end of its choice behind it."""
        told = []
        if piece.text or piece.calls or piece.logprobs:
            told.append(self._choice(self._delta(piece), piece.choice, None, piece.logprobs))
        if piece.finish is not None:
            told.append(self._choice(self._delta(Piece(piece.choice, "")), piece.choice, piece.finish))
        return [self._chunk(each) for each in told]

    def usage_chunk(self, usage: Usage) -> Json:
        """The event that closes a stream when the client asked for usage."""
        return self._frame(self.chunk_name, []) | {"usage": usage.as_json()}

    def _frame(self, name: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, choice: Json) -> Json:
        return self._frame(self.chunk_name, [choice]) | ({"usage": None} if self.with_usage else {})

    def _choice(self, content: Json, index: int, finish: str | None, logprobs: Sequence[TokenLogprob] = ()) -> Json:
        told = self._logprobs(logprobs) if logprobs else None
        return content | {"index": index, "logprobs": told, "finish_reason": finish}

    def _message(self, piece: Piece) -> Json:
        return {"text": piece.text}

    def _delta(self, piece: Piece) -> Json:
        return {"text": piece.text}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [dict(each.top) for each in logprobs],
        }


class ChatAnswer(Answer):
    """The same in the words of a chat."""

    __slots__ = ()
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self, choices: int) -> list[Json]:
        begun = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(self._choice(begun, index, None)) for index in range(choices)]

    def _message(self, piece: Piece) -> Json:
        message: Json = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message |= {"content": piece.text or None, "tool_calls": [_call(each) for each in piece.calls]}
        return {"message": message}

    def _delta(self, piece: Piece) -> Json:
        delta: Json = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": each.index} | _call(each) for each in piece.calls]
        return {"delta": delta}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        content = [
            _token(each.text, each.logprob) | {"top_logprobs": [_token(*other) for other in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> Json:
    """A token that is no whole text by itself has no bytes to tell."""
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


def _call(piece: CallPiece) -> Json:
    """A call, or a piece of one: what it is with the first one, and more of its arguments with the others."""
    if piece.id is None:
        return {"function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": piece.id, "type": "function", "function": function}


def finish_reason(finish: Finish, *, has_called: bool = False) -> str:
    """OpenAI's word for it. An answer that its deadline cut short reads like one that its length cut short."""
    if finish != "stop":
        return "length"
    return "tool_calls" if has_called else "stop"


def events(*contents: Json) -> bytes:
    """Server-sent events."""
    return b"".join(b"data: %b\n\n" % msgspec.json.encode(each) for each in contents)


DONE = b"data: [DONE]\n\n"
