"""A tree of text becomes typed values, and whatever does not fit becomes a problem with its place.

Pydantic checks the types and makes the JSON Schema; it knows nothing of lines. So each of its errors is led back along
its location to the node in the tree, and told in the words of someone who edits the file: a key at its own position,
the nearest right word where there is one. Models are pydantic `Section`s or dataclasses that are `Strict`; their
scalars arrive as text and are read by the types of `policies/fields.py`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from policies.problems import MAX_PROBLEMS, Path, Problem, did_you_mean, dotted, kind_of, shown
from policies.yaml_tree import Mapping, Node, Sequence, Tree, to_plain

T = TypeVar("T")


class Section(BaseModel):
    """A mapping of a document, with exactly the declared keys. `LATER` are keys that a later version will have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    LATER: ClassVar[frozenset[str]] = frozenset()


class Strict:
    """The same for a plain dataclass: only a document is checked, code constructs it freely."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    LATER: ClassVar[frozenset[str]] = frozenset()


_adapter = cache(TypeAdapter)  # made from a model in a tenth of a second


def read(tree: Tree, model: type[T], context: dict[str, Any] | None = None) -> tuple[T | None, list[Problem]]:
    """Return the model, None where it could not be made, and every problem, those of the tree included."""
    found = list(tree.problems)
    kind: Any = model  # mypy doubts that every class is hashable
    try:
        typed: T = _adapter(kind).validate_python(to_plain(tree.root), context=context)
    except ValidationError as error:
        told = {problem.path for problem in found}
        errors = error.errors(include_url=False)[:MAX_PROBLEMS]
        problems = [_problem(tree.root, model, dict(each)) for each in errors]
        return None, found + [problem for problem in problems if problem.path not in told]
    return typed, found


def _problem(root: Node, model: type, error: dict[str, Any]) -> Problem:
    """Translate one error of pydantic."""
    path: Path = error["loc"]
    if path and path[-1] == "[key]":  # the key of a free mapping, such as a plan's name
        return _at_key(root, path[:-1], _message(model, error, path))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _at_key(root, path, _unknown_key(model, path))
    node = _find(root, path)
    return Problem(node.line, node.column, dotted(path), _message(model, error, path))


def _at_key(root: Node, path: Path, message: str) -> Problem:
    parent = _find(root, path[:-1])
    place = parent.entries[str(path[-1])].key if isinstance(parent, Mapping) else parent
    return Problem(place.line, place.column, dotted(path), message)


def _message(model: type, error: dict[str, Any], path: Path) -> str:
    match error["type"]:
        case "missing":
            return "is missing"
        case "literal_error":
            return _unknown_value(model, path, error["input"])
        case "model_type" | "dataclass_type" | "dict_type":
            found = "a list" if isinstance(error["input"], list) else "text"  # which may be a secret in the wrong place
            return f"expected a mapping (`key: value`), found {found}"
        case "list_type" | "tuple_type":
            return f"expected a list, found {kind_of(error['input'])}"
        case "too_short":
            return "must not be empty"
        case "value_error":
            return str(error["ctx"]["error"])
    return str(error["msg"])


def _unknown_key(model: type, path: Path) -> str:
    key = str(path[-1])
    section = _type_at(model, path[:-1])
    if key in getattr(section, "LATER", ()):
        return "is not available in this version"
    known = list(_fields(section))
    hint = did_you_mean(key, known) or f": expected {_listed(known)}"
    return f"unknown key {shown(key)}{hint}"


def _unknown_value(model: type, path: Path, value: object) -> str:
    known = [str(choice) for choice in typing.get_args(_type_at(model, path))]
    if not isinstance(value, str):
        return f"expected {_listed(known)}, found {kind_of(value)}"
    return f"unknown value {shown(value)}{did_you_mean(value, known) or f': expected {_listed(known)}'}"


def _listed(words: list[str]) -> str:
    return ", ".join(shown(word) for word in words)


def _find(root: Node, path: Path) -> Node:
    """Return the node at path, or the last one on the way there."""
    node = root
    for step in path:
        if isinstance(node, Mapping) and step in node.entries:
            node = node.entries[str(step)].value
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            break
    return node


def _type_at(model: type, path: Path) -> Any:
    """Return the type that a model declares for a path."""
    current: Any = _bare(model)
    for step in path:
        if typing.get_origin(current) is dict:
            current = _bare(typing.get_args(current)[1])
        elif isinstance(step, int):
            current = _bare(typing.get_args(current)[0])
        else:
            current = _bare(_fields(current)[step])
    return current


def _bare(annotation: Any) -> Any:
    """Return a type without Annotated and without None."""
    if typing.get_origin(annotation) is Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _bare(next(arm for arm in typing.get_args(annotation) if arm is not types.NoneType))
    return annotation


@cache
def _fields(section: Any) -> dict[str, Any]:
    """Return the keys that a section declares, as the document spells them, and their types."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    hints = typing.get_type_hints(section, include_extras=True)
    names = [field.name for field in dataclasses.fields(section)]
    return {_spelling(name, hints[name]): hints[name] for name in names}


def _spelling(name: str, annotation: Any) -> str:
    aliases = [note.alias for note in typing.get_args(annotation)[1:] if isinstance(note, FieldInfo) and note.alias]
    return aliases[0] if aliases else name
