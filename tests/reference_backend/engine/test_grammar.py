"""Which tokens a grammar allows, walked with the tokens of the default model; no model is needed."""

import itertools
import json
from random import Random

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
import jsonschema  # noqa: E402
import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from reference_backend.engine import grammar  # noqa: E402
from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.grammar import Grammars, fault, json_grammar  # noqa: E402
from tests.support.tiny_model import DIRECTORY, tiny, tiny_grammars  # noqa: E402

TOKENIZER = tiny()[1]
END = 2
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def lark(schema, *, is_strict=True):
    return f"start: {json_grammar(schema, is_strict=is_strict)}"


def allowed(constraint):
    mask = constraint.mask()
    assert len(mask) == 1024 // 8
    return set(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").nonzero()[0].tolist())


def follow(constraint, text):
    """How much of the text is taken, and whether the answer is complete then."""
    is_complete, taken = False, []
    for token in TOKENIZER.encode(text):
        if token not in allowed(constraint):
            break
        is_complete = constraint.take(token)
        taken.append(token)
    return TOKENIZER.decode(taken), is_complete


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"x":1}', '{"x":1}'),
        ('{"x": -12}', '{"x": -12}'),
        ('{\n    "x": 5\n}', '{\n    "x": 5\n}'),
        ('{"x":1.5}', '{"x":1'),
        ('{"y":1}', '{"'),
        ("[1]", ""),
        ("Sure!", ""),
        ('{"x":  1}', '{"x": '),
        ('{"x":\n' + " " * 17 + "1}", '{"x":\n' + " " * 16),
    ],
)
def test_an_answer_keeps_to_its_schema(text, taken):
    found = follow(tiny_grammars().begin(lark(POINT)), text)
    assert found == (taken, text == taken)


def test_the_end_is_allowed_where_the_answer_may_end():
    constraint = tiny_grammars().begin(lark({"type": "integer"}))
    assert END not in allowed(constraint)
    assert follow(constraint, "12") == ("12", False)
    assert END in allowed(constraint)


def test_answers_of_one_grammar_go_their_own_ways():
    first, second = (tiny_grammars().begin(lark(POINT)) for _ in range(2))
    assert follow(first, '{"x":1}')[1]
    assert follow(second, '{"x"')[0] == '{"x"'
    assert not second.is_broken


@pytest.mark.parametrize(
    "text",
    ["start: nobody", lark({"$ref": "#"}), lark({"type": "string", "pattern": "^((([a-z]{1,100}){1,100}){1,100})$"})],
    ids=range(3),
)
def test_what_cannot_be_followed_is_broken_and_allows_nothing(text):
    constraint = tiny_grammars().begin(text)
    for token in TOKENIZER.encode('"ectesillaiindowadsead'):
        constraint.mask()
        constraint.take(token)
    assert constraint.is_broken
    assert allowed(constraint) == set()
    assert not constraint.take(5)


@pytest.mark.parametrize(("seconds", "is_broken"), [(0.001, False), (0.1, True)])
def test_an_answer_whose_steps_take_too_long_is_given_up(seconds, is_broken):
    """The clock goes on by as much between any two looks at it."""
    ticks = itertools.count()
    own = Grammars(DIRECTORY / "tokenizer.json", 1024, [END], lambda: next(ticks) * seconds)
    constraint = own.begin(lark({"type": "string"}))
    for token in TOKENIZER.encode('"aaaaaaaaaa'):
        constraint.mask()
        constraint.take(token)
    assert constraint.is_broken is is_broken
    assert bool(allowed(constraint)) is not is_broken


def test_grammars_are_kept_the_oldest_not(monkeypatch):
    compiled = []
    monkeypatch.setattr(grammar, "COMPILED", 2)
    own = Grammars(DIRECTORY / "tokenizer.json", 1024, [END], lambda: 0.0)
    monkeypatch.setattr(own, "_compile", compiled.append)
    begun = [own.begin(text) for text in ("a", "b", "a", "c", "a", "b")]
    begun[-1]._compiled.result()
    assert compiled == ["a", "b", "c", "b"]


def test_a_tokenizer_that_has_no_bytes_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    with pytest.raises(ModelError, match="cannot be used for structured output"):
        Grammars(path, 4, [0], lambda: 0.0)


@pytest.mark.parametrize(
    ("schema", "is_strict", "expected"),
    [
        ({"type": "object"}, True, None),
        ({"not": {}}, True, 'Unimplemented keys: ["not"]'),
        ({"not": {}}, False, None),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, False, None),
        ({"type": "strnig"}, False, "Invalid type: strnig"),
        ({"type": "string", "pattern": "("}, False, "regex parse error: ( ^ error: unclosed group"),
        ({"$ref": "#/nowhere"}, False, "Pointer '/nowhere' does not exist"),
        ({"$ref": "#"}, False, "nothing can satisfy it"),
        ({"x-guidance": {"lenient": True}, "not": {}}, True, 'Unimplemented keys: ["not"]'),
        (
            {"type": "string", "pattern": "^((([a-z]{1,100}){1,100}){1,100})$"},
            False,
            "lexer error: too many expressions constructed",
        ),
    ],
)
def test_a_trial_tells_what_is_wrong(schema, is_strict, expected):
    assert fault(lark(schema, is_strict=is_strict), Random(0)) == expected


NAMES = st.text('abc xyz_-"\\é😀', min_size=1, max_size=6)
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"const": {"a": [1, "ü"]}}]),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-99, 99), st.integers(0, 999)),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size}, st.integers(0, 4), st.integers(0, 9)),
    st.sampled_from(["uuid", "ipv4"]).map(lambda each: {"type": "string", "format": each}),
    st.sampled_from(["^[a-f]{2,5}$", "^x+(y|zz)$"]).map(lambda each: {"type": "string", "pattern": each}),
    st.lists(st.one_of(NAMES, st.integers(), st.booleans()), min_size=1, max_size=4).map(lambda each: {"enum": each}),
)  # fmt: skip


def objects(inner):
    def built(properties, required, is_open):
        names = sorted(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name, is_wanted in zip(names, required, strict=False) if is_wanted],
            "additionalProperties": is_open,
        }

    return st.builds(
        built, st.dictionaries(NAMES, inner, max_size=3), st.lists(st.booleans(), max_size=3), st.booleans()
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.just({"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}),
    ),
    max_leaves=5,
)  # fmt: skip
CLOSERS = set(TOKENIZER.encode('"}]0')) | {END}


def walk(constraint, rng):
    """An answer that chance makes up; after a while it comes to an end where it may."""
    tokens = []
    while len(tokens) < 2000:
        options = allowed(constraint)
        closing = options & CLOSERS if len(tokens) > 40 else set()
        token = rng.choice(sorted(closing or options))
        if token == END:
            break
        tokens.append(token)
        if constraint.take(token):
            break
    return TOKENIZER.decode(tokens)


@settings(max_examples=60)
@given(SCHEMAS, LEAVES, st.integers(0, 1 << 30))
def test_whatever_the_schema_what_comes_out_is_valid(schema, leaf, seed):
    schema = schema | {"$defs": {"leaf": leaf}}
    answer = json.loads(walk(tiny_grammars().begin(lark(schema)), Random(seed)))
    jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
