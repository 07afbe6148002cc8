from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field, ValidationInfo

from policies.fields import Count, Name, Text
from policies.problems import MAX_PROBLEMS
from policies.typed_tree import Section, Strict, read
from policies.yaml_tree import compose


class Leaf(Section):
    LATER: ClassVar = frozenset({"later"})

    size: Count
    mood: Literal["calm", "wild"] = "calm"


class Root(Section):
    leaf: Leaf | None = None
    leaves: list[Leaf] = Field(default=[], max_length=500)
    named: dict[Name, Leaf] = {}


def from_context(value: str, info: ValidationInfo) -> str:
    return info.context["prefix"] + value


@dataclass(frozen=True, slots=True)
class Plain(Strict):
    LATER: ClassVar = frozenset({"soon"})

    secret: Annotated[Text, Field(alias="secret_file")] = field(repr=False)
    place: Annotated[str, BeforeValidator(from_context)] = ""
    others: tuple[Name, ...] = ()

    def __post_init__(self) -> None:
        if self.place == "up no":
            raise ValueError("no")


def problems_of(model, text, **context) -> list[str]:
    _, problems = read(compose(text), model, context)
    return [problem.text("f").removeprefix("f:") for problem in problems]


def test_a_section():
    value, problems = read(compose("leaf: {size: 1k}\nnamed: {a: {size: 2, mood: wild}}"), Root)
    assert problems == []
    assert (value.leaf.size, value.leaf.mood) == (1000, "calm")
    assert (value.named["a"].size, value.named["a"].mood) == (2, "wild")


def test_a_dataclass():
    value, problems = read(compose("secret_file: x\nplace: y\nothers: [a, b]"), Plain, {"prefix": "up "})
    assert problems == []
    assert (value.secret, value.place, value.others) == ("x", "up y", ("a", "b"))
    assert "x" not in repr(value).replace("Plain", "")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("leaf: {}", ["1:7 leaf.size: is missing"]),
        ("leaf: x", ["1:7 leaf: expected a mapping (`key: value`), found text"]),
        ("leaves: {}", ["1:9 leaves: expected a list, found a mapping"]),
        ("leaves: [[]]", ["1:10 leaves[0]: expected a mapping (`key: value`), found a list"]),
        ("named: []", ["1:8 named: expected a mapping (`key: value`), found a list"]),
        ("[]", ["1:1 expected a mapping (`key: value`), found a list"]),
        ("leaf: {size: 1, sise: 2}", ["1:17 leaf.sise: unknown key `sise`: did you mean `size`?"]),
        ("leaf: {size: 1, zzz: 2}", ["1:17 leaf.zzz: unknown key `zzz`: expected `size`, `mood`"]),
        ("leaves: [{size: 1, later: 2}]", ["1:20 leaves[0].later: is not available in this version"]),
        ("named: {a: {size: 1, later: 2}}", ["1:22 named.a.later: is not available in this version"]),
        ("leaf: {size: 1, mood: calmm}", ["1:23 leaf.mood: unknown value `calmm`: did you mean `calm`?"]),
        ("leaf: {size: 1, mood: x}", ["1:23 leaf.mood: unknown value `x`: expected `calm`, `wild`"]),
        ("leaf: {size: 1, mood: [calm]}", ["1:23 leaf.mood: expected `calm`, `wild`, found a list"]),
        ("named: {a b: {size: x}}", ["1:9 named[`a b`]: `a b` is not a name: letters, digits, `.`, `_` and `-`, at most 128",
                                     "1:21 named[`a b`].size: `x` is not a number: expected one such as `100`, `40k` or `2M`"]),
        ("named: {'[key]': {}}", ["1:9 named[`[key]`]: `[key]` is not a name: letters, digits, `.`, `_` and `-`, at most 128",
                                  "1:18 named[`[key]`].size: is missing"]),
        ("leaf: {size: 1, size: x}", ["1:17 leaf.size: was already given on line 1"]),
        ("leaf: {size: ~}", ["1:14 leaf.size: has no value: give one, remove the key, or quote it if the text itself is meant"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_section(text, problems):
    assert problems_of(Root, text) == problems


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("secret: x", ["1:1 secret_file: is missing", "1:1 secret: unknown key `secret`: did you mean `secret_file`?"]),
        ("secret_file: x\nsoon: 1", ["2:1 soon: is not available in this version"]),
        ("secret_file: x\nplace: no", ["1:1 no"]),
        ("secret_file: x\nothers: [a b]", ["2:10 others[0]: `a b` is not a name: letters, digits, `.`, `_` and `-`, at most 128"]),
        ("x", ["1:1 expected a mapping (`key: value`), found text"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_dataclass(text, problems):
    assert problems_of(Plain, text, prefix="up ") == problems


def test_a_rule_of_pydantic_speaks_for_itself():
    many = "leaves:\n" + "- {size: 1}\n" * 501
    assert problems_of(Root, many) == ["2:1 leaves: List should have at most 500 items after validation, not 501"]


def test_there_are_only_so_many_problems():
    assert len(problems_of(Root, "".join(f"k{index}: 1\n" for index in range(5000)))) == MAX_PROBLEMS
