"""Text to tokens and back: tokenizer.json, the chat template, and text that appears token by token.

A token is not a character: one may end in the middle of a UTF-8 sequence, and a stop string may begin in one token and
end in another. `TextStream` therefore holds back what could still turn out otherwise, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from reference_backend.engine.config import ModelError, as_told, read_json
from reference_backend.refusals import bad

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for half a UTF-8 sequence
# No character has more than four bytes, so what is still broken after so many tokens will stay broken. Two more,
# because a token may also straddle two characters.
LONGEST_UNFINISHED_TOKENS = 6

COMPOSED = 4  # characters that Unicode normalisation may make one of
PICTURE_TOKEN = "<|image_pad|>"  # noqa: S105  stands for a piece of a picture, as in Qwen's models


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, as templates know it."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None  # of the call that this answers

    @property
    def characters(self) -> int:
        """About how many there are, calls included."""
        return len(self.content) + sum(len(str(call["function"])) for call in self.tool_calls)


class Tokenizer:
    """The tokenizer of a model directory. Raises ModelError when the directory does not hold a usable one."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        settings = as_told(path, read_json(path), _Settings)
        self._tokenizer = _load(directory / "tokenizer.json")
        self._special = {
            name: token if isinstance(token, str) else token.content
            for name in ("bos_token", "eos_token")
            if (token := getattr(settings, name))
        }
        self.template_source = _template_source(directory, settings)
        self._template = None if self.template_source is None else _template(directory, self.template_source)
        self.end_tokens = self._end_tokens(directory)
        self.picture_token: int | None = self._tokenizer.token_to_id(PICTURE_TOKEN)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.largest_token: int = max(vocabulary.values(), default=0)
        self._longest_token = max(map(len, vocabulary), default=1)

    def is_hopeless(self, characters: int, tokens: int) -> bool:
        """Whether so long a text surely has more than so many tokens. To be asked before it is tokenized.

        No token stands for more characters than its own name has; normalising may have put a few into one before.
        """
        return characters > COMPOSED * self._longest_token * tokens

    def encode(self, text: str) -> list[int]:
        """Plain text, with the begin token where the model wants one."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """A conversation up to where the assistant speaks, who may call these tools. Raises ApiError 400."""
        if self._template is None:
            raise bad("this model has no chat template; use /v1/completions", "messages")
        turns = msgspec.to_builtins(messages)
        try:
            text = self._template.render(messages=turns, tools=tools, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise bad(f"the model's chat template does not take these messages: {error}", "messages") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def name(self, token: int) -> str:
        """One token by itself, special ones too."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _end_tokens(self, directory: Path) -> frozenset[int]:
        """What ends an answer: generation_config.json knows best, then config.json, then the tokenizer."""
        for path in (directory / "generation_config.json", directory / "config.json"):
            ends = as_told(path, read_json(path), _Ends).eos_token_id if path.exists() else None
            if ends is not None:
                return frozenset(ends if isinstance(ends, list) else [ends])
        named = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        return frozenset() if named is None else frozenset([named])


def _load(path: Path) -> FastTokenizer:
    if not path.exists():
        raise ModelError(f"{path}: no such file; a tokenizer in the `tokenizers` JSON form is needed")
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file that it cannot use
        raise ModelError(f"{path}: cannot be used as a tokenizer: {error}") from error


class _Added(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _Settings(msgspec.Struct):
    """What is needed of tokenizer_config.json. Special tokens stand as text or as an object with the text in it."""

    bos_token: str | _Added | None = None
    eos_token: str | _Added | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _Ends(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def _template_source(directory: Path, settings: _Settings) -> str | None:
    """The chat template: its own file in newer directories, inside tokenizer_config.json in others."""
    path, source = directory / "chat_template.jinja", settings.chat_template
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if isinstance(source, list):
            return next((each.template for each in source if each.name == "default"), None)
        return source
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _template(directory: Path, source: str) -> jinja2.Template:
    # A template is code from whoever made the model: it gets no file, no attribute access and no way to change data.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"{directory}: the chat template is broken: {error}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class TextStream:
    """Turns tokens into text as they come.

    `feed` returns what is certain: whole characters that belong to no stop string. Once a stop string is complete,
    `is_stopped` holds, and neither it nor anything behind it ever comes out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._context: list[int] = []  # tokens whose text is out; they decide how the next ones decode
        self._fresh: list[int] = []
        self._held = ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Take one token; give the text that is certain by now."""
        self._fresh.append(token)
        text = self._fresh_text()
        if text.endswith(UNFINISHED) and len(self._fresh) < LONGEST_UNFINISHED_TOKENS:
            return ""
        self._context, self._fresh = self._fresh, []
        return self._pass_on(text)

    def finish(self) -> str:
        """What was held back and will not be contradicted any more."""
        text = self._pass_on(self._fresh_text()) if self._fresh else ""
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _fresh_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._fresh)[len(before) :]

    def _pass_on(self, text: str) -> str:
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
