"""What a request costs of its plan's `tokens`: an estimate while it is not yet sent, its real cost once it has ended.

The estimate is what it may come to: the prompt, reckoned from the bytes of the body, and the longest answer that it
asks for. It is rough on purpose; what a backend counted takes its place when it is known (`cost`). Tokens are those of
language models, whole numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

BYTES_PER_TOKEN: Final = 4
"""Of JSON with English text in it (OpenAI's rule of thumb). Other scripts have more bytes a token, or are escaped."""

ANSWER_TOKENS: Final = 1024
"""An answer to a request that does not say how long it may be."""

PICTURE_TOKENS: Final = 1000
"""A picture or a sound that lies in the body, however large: OpenAI counts 765 for one of 1024 x 1024."""

SMALLEST_PICTURE: Final = 4096
"""Bytes without a space: base64, and no text."""

_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_RUN: Final = re.compile(b"[A-Za-z0-9+/=]*")
_STRIDE: Final = SMALLEST_PICTURE // 2  # a run as long as a picture has a whole stride in it, wherever that begins


class Estimate(NamedTuple):
    """Tokens that a request may come to."""

    prompt: int
    answer: int


NOTHING: Final = Estimate(0, 0)


def prompt_tokens(body: bytes) -> int:
    """About how many tokens a model reads where this is the JSON body of a request."""
    pictures = [size for size in _base64_runs(body) if size >= SMALLEST_PICTURE]
    return -(-(len(body) - sum(pictures)) // BYTES_PER_TOKEN) + len(pictures) * PICTURE_TOKENS


def _base64_runs(body: bytes) -> Iterator[int]:
    """How long each run of base64 is that has a whole stride in it.

    One look at each byte, 2 ns of it: a client chooses the body, and an expression that looks for `{4096,}` takes
    minutes for some.
    """
    at = 0
    while at + _STRIDE <= len(body):
        if body[at : at + _STRIDE].translate(None, _BASE64):
            at += _STRIDE
            continue
        before = body[max(0, at - _STRIDE) : at]
        run = _RUN.match(body, at)
        end = run.end() if run is not None else at
        yield end - at + len(before) - len(before.rstrip(_BASE64))
        at = end


def estimate(body: bytes, longest: int | None, answers: int, capacity: int) -> Estimate:
    """What a request may come to: `answers` of at most `longest` tokens each.

    None: it does not say. That alone makes no request larger than its plan's whole `capacity`.
    """
    prompt = prompt_tokens(body)
    if longest is None:
        return Estimate(prompt, max(0, min(answers * ANSWER_TOKENS, capacity - prompt)))
    return Estimate(prompt, answers * longest)


def cost(expected: Estimate, tokens_in: int, tokens_out: int, events: int, *, is_whole: bool) -> int:
    """What a request has come to whose answer was passed on, or is not whole because the client left or it broke.

    `tokens_in` and `tokens_out` are what the backend stated (-1: it did not), `events` how many of a stream were passed
    on: mostly one token each. What nobody counted stays as it was expected.
    """
    prompt = tokens_in if tokens_in >= 0 else expected.prompt
    if not is_whole or (events and tokens_out < 0):
        return prompt + max(tokens_out, events)
    if tokens_out >= 0:
        return prompt + tokens_out
    return prompt + (expected.answer if tokens_in < 0 else 0)  # an embedding has a prompt alone
