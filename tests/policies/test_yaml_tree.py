import base64
import contextlib
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from policies.problems import MAX_PROBLEMS, InvalidDocument
from policies.yaml_tree import MAX_BYTES, MAX_DEPTH, MAX_NODES, Tree, compose, compose_events, to_plain
from tests.support.corpora import rows


def problems_of(source) -> list[str]:
    """Of a document that can be read and of one that cannot: `LINE:COLUMN path: message`."""
    try:
        problems = compose(source).problems
    except InvalidDocument as invalid:
        problems = invalid.problems
    return [problem.text("f").removeprefix("f:") for problem in problems]


@pytest.mark.parametrize(
    "text", ["no", "1:30", "010", "1e3", "1_000", "0x10", "yes", "2001-01-01", ".inf", "1.10", "=", "<<"]
)
def test_a_scalar_is_the_text_that_was_written(text):
    assert to_plain(compose(f"key: {text}").root) == {"key": text}


def test_structure_and_places():
    tree = compose("a:\n  - b: 'x'\n    c: [1, {d: 2}]\n")
    assert to_plain(tree.root) == {"a": [{"b": "x", "c": ["1", {"d": "2"}]}]}
    item = tree.root.get("a").items[0]
    assert (item.line, item.column) == (2, 5)
    entry = item.entries["c"]
    assert (entry.key.line, entry.key.column, entry.value.column) == (3, 5, 8)


@pytest.mark.parametrize("text", ["''", '""', "'null'", '"~"'])
def test_quotes_say_that_the_text_is_meant(text):
    assert problems_of(f"key: {text}") == []


NO_VALUE = "has no value: give one, remove the key, or quote it if the text itself is meant"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a: 1\nb: 2\na: 3", ["3:1 a: was already given on line 1"]),
        ("x: {a: 1, a: 2}", ["1:11 x.a: was already given on line 1"]),
        ("a: &x 1", ["1:4 a: anchors (`&name`) are not allowed"]),
        ("a: &x [b]\nc: *x", ["1:4 a: anchors (`&name`) are not allowed", "2:4 c: aliases (`*name`) are not allowed: write the value out"]),
        ("a: &x\n  b: *x", ["1:4 a: anchors (`&name`) are not allowed", "2:6 a.b: aliases (`*name`) are not allowed: write the value out"]),
        ("a: !!int 3", ["1:4 a: tags such as `tag:yaml.org,2002:int` are not allowed"]),
        ("a: !!python/object:os.system [x]", ["1:4 a: tags such as `tag:yaml.org,2002:python/object:os.system` are not allowed"]),
        ("a:\nb: ~\nc: [null]", ["1:3 a: " + NO_VALUE, "2:4 b: " + NO_VALUE, "3:5 c[0]: " + NO_VALUE]),
        ("? [a, b]\n: c\nd: e", ["1:3 a key must be plain text"]),
        ("{{a: b}: c}: d", ["1:2 a key must be plain text", "1:1 a key must be plain text"]),
        ("a: 1\n---\nb: 2", ["2:1 a second document begins here: one file holds one document"]),
        ("", ["1:1 the document is empty"]),
        ("# nothing\n", ["1:1 the document is empty"]),
        ("a: [1", ["2:1 not YAML: did not find expected ',' or ']' while parsing a flow sequence that begins on line 1"]),
        ("%FOO\na", ["1:5 not YAML: found unknown directive name while scanning a directive that begins on line 1"]),
        ("a: b\rc: \x00", ["2:4 the character U+0000 may not stand in a YAML file"]),
        ("a: b\u2028\x85\r\nc:\x00", ["4:3 the character U+0000 may not stand in a YAML file"]),
        ("a: b\x00c", ["1:5 the character U+0000 may not stand in a YAML file"]),
        ("a: b\n\ufeffc: d", ["2:1 the character U+FEFF may not stand in a YAML file"]),
        ("\ufeff\ufeffa: b", ["1:1 the character U+FEFF may not stand in a YAML file"]),
        ("a\n\ud800", ["2:1 the character U+D800 may not stand in a YAML file"]),
        (b"a: b\n\xff", ["2:1 is not UTF-8 from here on"]),
        ("a: 1".encode("utf-16"), ["1:1 is not UTF-8 from here on"]),
        (b"x" * (MAX_BYTES + 1), ["1:1 the document is larger than 1 MiB"]),
    ],
)  # fmt: skip
def test_what_is_refused(text, problems):
    assert problems_of(text) == problems


def test_reading_goes_on_after_a_problem():
    tree = compose("a: &x 1\nb: *x\na: 2\n? {k: v}\n: dropped\nc: 3")
    assert to_plain(tree.root) == {"a": "1", "b": "", "c": "3"}
    assert len(tree.problems) == 4


def test_a_byte_order_mark_is_no_content():
    assert to_plain(compose("\ufeffa: 1").root) == {"a": "1"}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[{? "])
def test_depth_ends_the_reading_before_the_parser_has_worked_for_it(opening):
    taken = 0

    def counted(events):
        nonlocal taken
        for event in events:
            taken += 1
            yield event

    with pytest.raises(InvalidDocument, match="nested deeper than 32 levels"):
        compose_events(counted(yaml.parse(opening * 200_000, Loader=yaml.CSafeLoader)))
    assert taken <= 2 + 2 * (MAX_DEPTH + 1)


def test_the_deepest_allowed():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert problems_of(text) == []
    assert problems_of(f"[{text}]") == ["1:33 nested deeper than 32 levels"]


def test_the_number_of_values_is_bounded():
    assert problems_of("[" + "a," * (MAX_NODES - 1) + "]") == []
    assert problems_of("[" + "a," * MAX_NODES + "]") == [
        f"1:{2 * MAX_NODES} the document has more than {MAX_NODES} values"
    ]


def test_problems_are_bounded():
    assert len(compose("[" + "~," * 1000 + "]").problems) == MAX_PROBLEMS


@given(st.text())
def test_any_text_is_a_tree_or_problems(text):
    with contextlib.suppress(InvalidDocument):
        assert isinstance(compose(text), Tree)


@given(st.binary())
def test_any_bytes_are_a_tree_or_problems(source):
    with contextlib.suppress(InvalidDocument):
        assert isinstance(compose(source), Tree)


# Where libyaml differs from the suite (YAML 1.2): what it takes though it is wrong, what it reads otherwise.
LENIENT = {"9C9N", "9JBA", "CVW2", "DK95/01", "G5U8", "QB6E", "S98Z", "SU5Z", "X4QW", "Y79Y/003", "YJV2"}
OTHERWISE = {"652Z", "JEF9/02", "L24T/01"}


def test_yaml_test_suite():
    """What is taken without a problem is read as the suite says, each scalar as text."""
    lenient, otherwise = set(), set()
    for case in rows("yaml-test-suite"):
        try:
            tree = compose(base64.b64decode(case["in_b64"]))
        except InvalidDocument:
            continue
        if tree.problems:
            continue
        if case["error"]:
            lenient.add(case["id"])
        elif as_text(json.loads(case["json"])) != to_plain(tree.root):
            otherwise.add(case["id"])
    assert (lenient, otherwise) == (LENIENT, OTHERWISE)


def as_text(value):
    if isinstance(value, dict):
        return {key: as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_text(each) for each in value]
    return value if isinstance(value, str) else json.dumps(value)
