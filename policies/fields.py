"""The types of the values that stand in a document: how each is read from text, and how an editor may check it.

Each is an annotated Python type. Its reader takes the text as written and raises ValueError with the whole sentence;
its JSON Schema also takes what editors guess of an unquoted scalar (`version: 1` is a number to them, text to us).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, WithJsonSchema

from policies import policy, units
from policies.problems import kind_of, shown

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, 5.6.2
_LONGEST_TEXT = 1000


def reader(parse: Callable[[str], T], expected: str) -> BeforeValidator:
    """Return a validator that reads text by `parse`, and names what was expected where no text stands."""

    def read(value: object) -> T:
        if not isinstance(value, str):
            raise ValueError(f"expected {expected}, found {kind_of(value)}")  # noqa: TRY004  pydantic's contract
        return parse(value)

    return BeforeValidator(read)


def pattern(regex: str, *also: str) -> WithJsonSchema:
    """Return the schema of text of a form; `also` are other JSON types that the same value may look like."""
    text: dict[str, Any] = {"type": "string", "pattern": f"^(?:{regex})$"}
    return WithJsonSchema({"anyOf": [text, *({"type": name} for name in also)]} if also else text)


def parse_text(text: str) -> str:
    if not text or len(text) > _LONGEST_TEXT:
        raise ValueError(f"must have 1 to {_LONGEST_TEXT} characters")
    return text


def parse_name(text: str) -> str:
    """Return a name that is fit for a metric's label, a key in a store and a message."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a name: letters, digits, `.`, `_` and `-`, at most 128")
    return text


def parse_header(text: str) -> str:
    """Return a header's name in lower case."""
    if not _HEADER.fullmatch(text):
        raise ValueError(f"{shown(text)} is not the name of a header")
    return text.lower()


def parse_positive(text: str) -> int:
    count = units.parse_count(text)
    if count < 1:
        raise ValueError("must be at least 1")
    return count


def one_or_more(value: object) -> object:
    """Return a list of one for a single text: `audience: weir` is `audience: [weir]`."""
    if value == []:
        raise ValueError("must not be empty")
    return [value] if isinstance(value, str) else value


_TEXT = {"type": ["string", "number", "boolean"]}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}

Text = Annotated[str, reader(parse_text, "text"), WithJsonSchema(_TEXT)]
OneOrMany = Annotated[tuple[Text, ...], BeforeValidator(one_or_more), WithJsonSchema(_TEXTS)]
Name = Annotated[str, reader(parse_name, "a name"), pattern(_NAME.pattern, "integer")]
Header = Annotated[str, reader(parse_header, "the name of a header"), pattern(_HEADER.pattern)]
Duration = Annotated[float, reader(units.parse_duration, "a duration"), pattern(rf"{units.NUMBER}(ms|s|m|h)")]
Size = Annotated[int, reader(units.parse_size, "a size"), pattern(rf"{units.NUMBER}([kKMG]i?B|B)", "integer")]
Rate = Annotated[
    policy.Rate, reader(units.parse_rate, "a rate"), pattern(rf"{units.NUMBER}[kM]?/({'|'.join(units.PERIODS)})")
]
Count = Annotated[int, reader(units.parse_count, "a number"), pattern(rf"{units.NUMBER}[kM]", "integer")]
Positive = Annotated[int, reader(parse_positive, "a number"), pattern(rf"{units.NUMBER}[kM]", "integer")]
Share = Annotated[float, reader(units.parse_share, "a share such as `5%`"), pattern(rf"{units.NUMBER}%", "number")]
Flag = Annotated[bool, reader(units.parse_flag, "`true` or `false`")]
