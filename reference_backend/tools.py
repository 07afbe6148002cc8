"""Tools: what clients declare, the grammar that calls of them keep to, and calls found in what a model writes.

Each family of models writes calls in a form of its own, which its chat template teaches it. Two are known: that of Qwen
(and Hermes), where calls stand in tags behind text, and that of Llama 3, where a call is the whole answer. The grammar
is exact to the last blank, so that what is written under it can be told piece by piece, with no call ever taken back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from reference_backend.tokenizer import overlap

MOST_TOOLS = 128  # OpenAI's bound
Name = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class Called(msgspec.Struct):
    """A function in an earlier message of the assistant. The arguments are JSON in a string."""

    name: Name
    arguments: str


class EarlierCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: Called

    def plain(self) -> dict[str, Any]:
        """As templates know it: with the arguments as a value. Arguments that are no JSON object stay text."""
        arguments: Any
        try:
            arguments = msgspec.json.decode(self.function.arguments, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(frozen=True, slots=True)
class Form:
    """How a family writes a call: `opening`, the name, `middle`, the arguments as JSON, `closing`.

    `tag` is what tells a call from text; None where a call is all that is written.
    """

    tag: str | None
    opening: str
    middle: str
    closing: str

    @property
    def head(self) -> re.Pattern[str]:
        start = r"\A" if self.tag is None else re.escape(self.tag)
        return re.compile(f"{start}{re.escape(self.opening)}([a-zA-Z0-9_-]+){re.escape(self.middle)}")


QWEN = Form("<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>")
LLAMA = Form(None, '{"name": "', '", "parameters": ', "}")


def form_of(template: str) -> Form | None:
    """The form that a chat template teaches, as far as it is known here."""
    if "tools" not in template or "<function=" in template:
        return None
    if "<tool_call>" in template:
        return QWEN
    return LLAMA if '"parameters"' in template else None


def schema_of(function: Function) -> dict[str, Any]:
    """What its arguments keep to: an object, whatever else is said."""
    return NOTHING if function.parameters is None else {"type": "object"} | function.parameters


def call_grammar(form: Form, called: dict[str, str], *, is_forced: bool, in_parallel: bool, content: str) -> str:
    """Calls of functions, and nothing else if `is_forced`; otherwise calls behind text, or no calls.

    `called` has what the arguments of each function keep to, and `content` what an answer without calls keeps to
    (empty: any text), as expressions of the notation.
    """
    rules = [
        f"tool_{index}: {_quoted(name + form.middle)} {arguments}"
        for index, (name, arguments) in enumerate(called.items())
    ]
    named = " | ".join(f"tool_{index}" for index in range(len(called)))
    rules.append(f"call: {_quoted(form.opening)} ({named}) {_quoted(form.closing)}")
    if form.tag is None:
        calls = "call"
        text = r"/([^{](.|\n)*)?/"
    else:
        calls = "call" + (f" ({_quoted(chr(10) + form.tag)} call)*" if in_parallel else "")
        text = r"/(.|\n)*/"
    if is_forced or content:
        calls = calls if form.tag is None else f"{_quoted(form.tag)} {calls}"
        start = calls if is_forced else f"{calls} | {content}"
    elif form.tag is None:
        start = f"TEXT | {calls}"
    else:
        start = f"TEXT | behind_text {calls}"
        rules.append(f"behind_text[lazy]: TEXT {_quoted(form.tag)}")
    return "\n".join([f"start: {start}", f"TEXT: {text}", *rules])


def _quoted(text: str) -> str:
    return json.dumps(text)


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call. The first one of a call has its id and name, the others more of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallReader:
    """Tells calls from text in what a model writes in a form, piece by piece.

    The grammar keeps new lines out of strings: what closes a call closes nothing else.
    """

    def __init__(self, form: Form, new_id: Callable[[], str]) -> None:
        self._form, self._new_id = form, new_id
        # Where a call is the whole answer only the last one of such braces closes it: nothing is known to be behind it.
        self._closing = form.closing if form.tag is not None else form.closing + "\0"
        self._held = ""
        self._is_in_call = self._text_came = False
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take what was written; give the text and the pieces of calls that are certain by now."""
        self._held += text
        before = self._certain_text()
        pieces: list[CallPiece] = []
        while True:
            if not self._is_in_call:
                head = self._form.head.search(self._held)
                if head is None or (self._text_came and self._form.tag is None):
                    return before, pieces
                self._held = self._held[head.end() :]
                pieces.append(CallPiece(self.calls, "", self._new_id(), head[1]))
                self.calls, self._is_in_call = self.calls + 1, True
            end = self._held.find(self._closing)
            certain = end if end >= 0 else len(self._held) - overlap(self._held, self._closing)
            if certain:
                pieces.append(CallPiece(self.calls - 1, self._held[:certain]))
            self._held = self._held[certain:]
            if end < 0:
                return before, pieces
            self._held, self._is_in_call = self._held[len(self._closing) :], False

    def finish(self) -> str:
        """The text that was held back. A call that did not get as far as its name is no text."""
        return "" if self.calls or (self._form.tag or self._form.opening) in self._held else self._held

    def _certain_text(self) -> str:
        """Text in front of the first call; behind it there is none."""
        if self.calls:
            return ""
        if self._form.tag is None:
            opening = self._form.opening
            is_certain = self._text_came or not (opening.startswith(self._held) or self._held.startswith(opening))
            certain = len(self._held) if is_certain else 0
        else:
            at = self._held.find(self._form.tag)
            certain = at if at >= 0 else len(self._held) - overlap(self._held, self._form.tag)
        text, self._held = self._held[:certain], self._held[certain:]
        self._text_came = self._text_came or bool(text)
        return text
