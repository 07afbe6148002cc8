"""What is wrong with a document an operator wrote, told so that it can be put right.

A `Problem` has a place, a path and a sentence; `InvalidDocument` carries all that were found. What a file says is put
into sentences through `shown` alone, so that no key or value of it can garble a terminal or a log.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

MAX_PROBLEMS = 100  # more help nobody, and a hostile document has tens of thousands

Path = tuple[str | int, ...]

_SIMPLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, and where. `line` and `column` count from 1; `path` is empty for the whole file."""

    line: int
    column: int
    path: str
    message: str

    def text(self, name: str) -> str:
        """Return `NAME:LINE:COLUMN field.path: what is wrong`."""
        subject = f"{self.path}: " if self.path else ""
        return f"{name}:{self.line}:{self.column} {subject}{self.message}"


class InvalidDocument(Exception):  # noqa: N818  a noun, like every refusal of this project
    """A document was refused; `problems` are all that could be found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems))[:MAX_PROBLEMS])
        super().__init__("\n".join(self.lines("document")))

    def lines(self, name: str) -> list[str]:
        """Return one line per problem, as `weir policy check` prints them."""
        return [problem.text(name) for problem in self.problems]


def dotted(path: Path) -> str:
    """Return `routes[0].match.path`; a key that is not a plain word is quoted."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _SIMPLE_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


_LOGIN = re.compile(r"(?<=//)[^/?#]*(?=@)")


def shown(text: str) -> str:
    """Return text fit for a message: in backquotes, one line, printable, short; without the login of a URL."""
    text = _LOGIN.sub("...", text)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    printable = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in short)
    return f"`{printable}`"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `: did you mean `x`?` for the nearest known word, or nothing where none is near."""
    near = difflib.get_close_matches(word[:100], islice(known, 1000), n=1)
    return f": did you mean {shown(near[0])}?" if near else ""


def kind_of(value: object) -> str:
    """Return what stands there, for a sentence: a list, a mapping, or the text itself."""
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else shown(str(value))
