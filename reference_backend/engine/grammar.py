"""Grammars that an answer must keep to: which tokens may come next, and what a grammar may cost. Needs no torch.

The grammars are those of llguidance (Lark's notation, with JSON schemas inside). It was taken, and not xgrammar,
because it needs nothing else (xgrammar: transformers, and triton beside torch), reads any tokenizer.json by itself,
and computes masks while it goes instead of tables before it starts, so that a new schema costs milliseconds.

A grammar is compiled by a thread while the prompt is read. A mask takes microseconds then (6 for the default model's
1,024 tokens), less than handing it to a thread would (50). A grammar whose steps exceed `LIMITS`, or take so long that
others would suffer, is given up. Compiling has no bound of its own inside llguidance: whoever takes grammars from
strangers has them tried first by `fault`, in a process that may be ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from reference_backend.engine.config import ModelError

# A tenth to a half of llguidance's own limits. A step then takes no longer than a few milliseconds, but where counted
# repetitions are nested (0.02 s for `(a{300}){300}`, 0.4 s for a thousand each).
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
FIRST_SECONDS, SECONDS_PER_TOKEN = 0.5, 0.002  # of the processor: what all steps of an answer may take together
COMPILED = 32  # grammars that are kept: clients send the same few again and again
TRIAL_STEPS = 256  # bytes of an answer that is made up to see whether it can be followed
TOO_DEEP = "it is nested too deep"
_LISTING = re.compile(r"\n +\d+ \| ")
_UNREADABLE = re.compile(r'failed to parse "%json": (.+) at line \d+ column \d+')


class Matched:
    """A `Constraint` whose grammar is compiled elsewhere, and waited for when it is asked for first."""

    def __init__(self, compiled: Future[LLMatcher], mask_bytes: int, clock: Callable[[], float]) -> None:
        self._compiled = compiled
        self._mask_bytes = mask_bytes
        self._clock = clock
        self._left = FIRST_SECONDS
        self._own: LLMatcher | None = None

    @property
    def _matcher(self) -> LLMatcher:
        if self._own is None:
            self._own = self._compiled.result().deep_copy()
        return self._own

    @property
    def is_broken(self) -> bool:
        return self._matcher.is_error() or self._left < 0

    def mask(self) -> bytes:
        matcher, began = self._matcher, self._clock()
        mask = matcher.compute_bitmask()
        self._left -= self._clock() - began
        return bytes(self._mask_bytes) if self.is_broken else mask[: self._mask_bytes]

    def take(self, token: int) -> bool:
        began = self._clock()
        self._matcher.consume_token(token)
        self._left -= self._clock() - began - SECONDS_PER_TOKEN
        return self._matcher.is_stopped() and not self.is_broken


class Grammars:
    """Compiles grammars for the tokens of one model. Raises ModelError for a tokenizer that cannot be used so.

    `clock` tells what the calling thread has had of the processor: others at work do not make a grammar expensive.
    """

    def __init__(self, tokenizer: Path, vocabulary: int, end_tokens: Iterable[int], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mask_bytes = -(-vocabulary // 32) * 4
        thread = ThreadPoolExecutor(1, "grammars")
        self._compiled = lru_cache(COMPILED)(lambda grammar: thread.submit(self._compile, grammar))
        text = tokenizer.read_text(encoding="utf-8")
        try:
            self._tokenizer = LLTokenizer(text, vocabulary, sorted(end_tokens) or None, LLTokenizer.json_slices())
        except ValueError as error:
            raise ModelError(f"{tokenizer}: cannot be used for structured output: {error}") from error

    def begin(self, grammar: str) -> Matched:
        """The constraint of a new answer; its grammar is compiled meanwhile."""
        return Matched(self._compiled(grammar), self._mask_bytes, self._clock)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # the first one builds what later ones, of copies too, find ready
        return matcher


def json_grammar(schema: dict[str, Any], *, is_strict: bool) -> str:
    """What keeps to a JSON schema, as an expression of the notation.

    Not strict: keywords that cannot be kept to are passed over, `oneOf` is taken for `anyOf`. Blanks are one,
    or a new line with up to 16: a model may otherwise write nothing else.
    """
    options = {"whitespace_pattern": r" |\n {0,16}", "lenient": not is_strict, "coerce_one_of": not is_strict}
    return f"%json {json.dumps(schema | {'x-guidance': options})}"


def fault(grammar: str, rng: Random) -> str | None:
    """What is wrong with a grammar; None when it compiles and an answer of random bytes can be followed.

    May take any time and memory.
    """
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    for _ in range(TRIAL_STEPS):
        if matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(tokenizer.vocab_size) if mask[token // 8] >> token % 8 & 1]
        matcher.consume_token(rng.choice(allowed or [tokenizer.eos_token]))
    return _reason(matcher.get_error()) if matcher.is_error() else None


def _reason(error: str) -> str:
    """What llguidance says, in one line, without the listing of our grammar."""
    said = _LISTING.split(error.removesuffix("<non-verbose/>"))[0].partition(" while processing json-schema:")[0]
    reason = " ".join(said.rpartition("failed to compile JSON schema: ")[2].split())
    if unreadable := _UNREADABLE.fullmatch(reason):
        return TOO_DEEP if unreadable[1] == "recursion limit exceeded" else unreadable[1]
    return "nothing can satisfy it" if reason.startswith("NoExtension") else reason
