"""Strict YAML: text becomes a tree of positions and plain text, and nothing is guessed.

YAML 1.1 turns `no` into False, `1:30` into 90 and `010` into 8, lets the last of two equal keys win, and lets an alias
multiply a document. Here a scalar is the text that was written, and its reader says what it means. Refused: anchors,
aliases, tags, equal keys, keys that are not text, values left empty or `null`, a second document.

The tree is built from libyaml's events, one at a time and without recursion, so each limit holds before the memory or
the time behind it is spent: a 1 MiB file of `[` costs as many events as the depth limit has levels.

Problems are of two kinds. Those after which nothing can be believed (syntax, size, depth) end the reading at once. All
others are collected with their place, and reading goes on, so that one look shows everything that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from policies.problems import MAX_PROBLEMS, InvalidDocument, Path, Problem, dotted, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 50_000

_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)  # YAML 1.1, 5.1
_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # YAML 1.1, 5.4: libyaml counts lines so
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class Scalar:
    text: str
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Sequence:
    items: list[Node]
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Mapping:
    entries: dict[str, Entry]
    line: int
    column: int

    def get(self, key: str) -> Node | None:
        entry = self.entries.get(key)
        return None if entry is None else entry.value


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class Entry:
    key: Scalar
    value: Node


@dataclass(frozen=True, slots=True)
class Tree:
    """A document that could be read. `problems` are those that did not stop the reading."""

    root: Node
    problems: tuple[Problem, ...]


def compose(source: str | bytes) -> Tree:
    """Read one document. Raises InvalidDocument where no tree can be made of it."""
    text = _decode(source)
    return compose_events(yaml.parse(text, Loader=yaml.CSafeLoader))


def compose_events(events: Iterator[yaml.Event]) -> Tree:
    """Build the tree from parser events; takes no more of them than the limits allow."""
    composer = _Composer()
    try:
        for event in events:
            composer.take(event)
    except yaml.YAMLError as error:
        raise InvalidDocument([*composer.problems, _syntax_problem(error)]) from error
    if composer.root is None:
        raise InvalidDocument([*composer.problems, Problem(1, 1, "", "the document is empty")])
    return Tree(composer.root, tuple(composer.problems))


def to_plain(node: Node) -> object:
    """Return the tree as dicts, lists and text."""
    if isinstance(node, Mapping):
        return {key: to_plain(entry.value) for key, entry in node.entries.items()}
    if isinstance(node, Sequence):
        return [to_plain(item) for item in node.items]
    return node.text


def _decode(source: str | bytes) -> str:
    """Return the text of a document that is small enough, UTF-8 and printable."""
    if len(source) > MAX_BYTES:
        raise InvalidDocument([Problem(1, 1, "", f"the document is larger than {MAX_BYTES >> 20} MiB")])
    try:
        text = source.decode() if isinstance(source, bytes) else source
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        raise InvalidDocument([_problem_after(before, "is not UTF-8 from here on")]) from None
    text = text.removeprefix("\ufeff")  # a byte order mark, which may stand nowhere else
    if bad := _UNPRINTABLE.search(text):
        message = f"the character U+{ord(bad.group()):04X} may not stand in a YAML file"
        raise InvalidDocument([_problem_after(text[: bad.start()], message)])
    return text


def _problem_after(text: str, message: str) -> Problem:
    ends = [end.end() for end in _LINE_END.finditer(text)]
    return Problem(len(ends) + 1, len(text) - (ends[-1] if ends else 0) + 1, "", message)


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    """Translate libyaml's words; it numbers lines from 0."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem(1, 1, "", f"not YAML: {' '.join(str(error).split())}")
    words = f"not YAML: {error.problem}"
    if error.context and error.context_mark:
        words += f" {error.context} that begins on line {error.context_mark.line + 1}"
    return Problem(error.problem_mark.line + 1, error.problem_mark.column + 1, "", words)


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet. `key` is the key that waits for its value."""

    node: Sequence | Mapping
    path: Path
    key: Scalar | None = None
    drop_value: bool = False  # the key was refused: read its value, and forget it


@dataclass(slots=True)
class _Composer:
    """Parser events in, `root` and `problems` out."""

    problems: list[Problem] = field(default_factory=list)
    root: Node | None = None
    _open: list[_Open] = field(default_factory=list)
    _nodes: int = 0

    def take(self, event: yaml.Event) -> None:
        """Grow the tree by one event. Raises InvalidDocument where the document goes over a limit."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._check_single(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._add(self._open.pop().node)
        elif isinstance(event, yaml.NodeEvent):
            self._count(event)
            self._begin(event)

    def _begin(self, event: yaml.NodeEvent) -> None:
        self._refuse_extras(event)
        line, column = _place(event)
        if isinstance(event, yaml.MappingStartEvent):
            self._open.append(_Open(Mapping({}, line, column), self._next_path()))
        elif isinstance(event, yaml.SequenceStartEvent):
            self._open.append(_Open(Sequence([], line, column), self._next_path()))
        elif isinstance(event, yaml.ScalarEvent):
            self._refuse_null(event)
            self._add(Scalar(event.value, line, column))
        else:  # an alias: it was reported, its place is kept
            self._add(Scalar("", line, column))

    def _add(self, node: Node) -> None:
        """Put a whole node where it belongs: the root, an item, a key, or the value of the key before it."""
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        if isinstance(parent.node, Sequence):
            parent.node.items.append(node)
        elif self._awaits_key():
            self._take_key(parent, parent.node, node)
        else:
            if parent.key is not None:
                parent.node.entries[parent.key.text] = Entry(parent.key, node)
            parent.key, parent.drop_value = None, False

    def _take_key(self, parent: _Open, mapping: Mapping, node: Node) -> None:
        parent.drop_value = True
        if not isinstance(node, Scalar):
            self._report((node.line, node.column), "a key must be plain text")
        elif first := mapping.entries.get(node.text):
            path = (*parent.path, node.text)
            self._report((node.line, node.column), f"was already given on line {first.key.line}", path)
        else:
            parent.key, parent.drop_value = node, False

    def _awaits_key(self) -> bool:
        if not self._open or isinstance(self._open[-1].node, Sequence):
            return False
        return self._open[-1].key is None and not self._open[-1].drop_value

    def _next_path(self) -> Path:
        """Return the path of the node that comes next."""
        if not self._open:
            return ()
        parent = self._open[-1]
        if isinstance(parent.node, Sequence):
            return (*parent.path, len(parent.node.items))
        return parent.path if parent.key is None else (*parent.path, parent.key.text)

    def _count(self, event: yaml.NodeEvent) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._stop(event, f"the document has more than {MAX_NODES} values")
        if isinstance(event, yaml.CollectionStartEvent) and len(self._open) >= MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels")

    def _check_single(self, event: yaml.Event) -> None:
        if self.root is not None:
            self._stop(event, "a second document begins here: one file holds one document")

    def _refuse_extras(self, event: yaml.NodeEvent) -> None:
        """Report what YAML can do and this project does not want."""
        place = _place(event)
        if isinstance(event, yaml.AliasEvent):
            self._report(place, "aliases (`*name`) are not allowed: write the value out")
        elif event.anchor is not None:
            self._report(place, "anchors (`&name`) are not allowed")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            self._report(place, f"tags such as {shown(event.tag)} are not allowed")

    def _refuse_null(self, event: yaml.ScalarEvent) -> None:
        if not event.style and event.value in _NULLS and not self._awaits_key():
            message = "has no value: give one, remove the key, or quote it if the text itself is meant"
            self._report(_place(event), message)

    def _report(self, place: tuple[int, int], message: str, path: Path | None = None) -> None:
        where = self._next_path() if path is None else path
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(*place, dotted(where), message))

    def _stop(self, event: yaml.Event, message: str) -> None:
        raise InvalidDocument([*self.problems, Problem(*_place(event), "", message)])


def _place(event: yaml.Event) -> tuple[int, int]:
    """Return line and column as people count them."""
    mark = event.start_mark
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
