"""Calls: the grammar that they keep to, and how they are found in what a model writes."""

import itertools
import json

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from reference_backend.engine.grammar import json_grammar  # noqa: E402
from reference_backend.tools import LLAMA, QWEN, CallReader, Function, call_grammar, form_of, schema_of  # noqa: E402
from tests.support.tiny_model import tiny, tiny_grammars  # noqa: E402

TOKENIZER = tiny()[1]
WEATHER = Function(
    name="weather",
    parameters={"properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
)
NOW = Function(name="now")
CALLED = {each.name: json_grammar(schema_of(each), is_strict=False) for each in (WEATHER, NOW)}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (TOKENIZER.template_source, QWEN),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if tools %}<tool_call>{% endif %}", QWEN),
        ("{% if tools %}<tool_call><function=f>{% endif %}", None),
        ('{% if tools %}{"name": f, "parameters": p}{% endif %}', LLAMA),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", None),
    ],
    ids=range(6),
)
def test_the_form_is_that_of_the_template(template, form):
    assert form_of(template) == form


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        (None, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({}, {"type": "object"}),
        ({"$ref": "#/$defs/x", "$defs": {"x": {}}}, {"type": "object", "$ref": "#/$defs/x", "$defs": {"x": {}}}),
    ],
)
def test_arguments_are_an_object(parameters, schema):
    assert schema_of(Function(name="f", parameters=parameters)) == schema


FREE, FORCED = {"is_forced": False}, {"is_forced": True}
AS_JSON = {"content": json_grammar({"type": "array", "maxItems": 1}, is_strict=True)}
ALLOWED = [
    (QWEN, FREE, "It is hot.", True),
    (QWEN, FREE, "A <tool", True),
    (QWEN, FREE, CALL, True),
    (QWEN, FREE, f"I shall look.\n{CALL}\n{NOW_CALL}", True),
    (QWEN, FREE | {"in_parallel": False}, f"{CALL}\n", False),
    (QWEN, FREE, f"{CALL} and more", False),
    (QWEN, FREE, CALL.replace("weather", "whether"), False),
    (QWEN, FREE, CALL.replace("city", "town"), False),
    (QWEN, FREE, CALL.replace('"Rome"', "1"), False),
    (QWEN, FREE, NOW_CALL.replace("{}", '{"a": 1}'), False),
    (QWEN, FORCED, "It is hot.", False),
    (QWEN, FORCED, CALL, True),
    (QWEN, FORCED, f"{NOW_CALL}\n{CALL}", True),
    (QWEN, FREE | AS_JSON, "[1]", True),
    (QWEN, FREE | AS_JSON, CALL, True),
    (QWEN, FREE | AS_JSON, f"Look: {CALL}", False),
    (QWEN, FORCED | AS_JSON, "[1]", False),
    (LLAMA, FREE, "It is {hot}.", True),
    (LLAMA, FREE, LLAMA_CALL, True),
    (LLAMA, FREE, f"{LLAMA_CALL} and", False),
    (LLAMA, FREE, '{"name": "whether"', False),
    (LLAMA, FORCED, "It is hot.", False),
    (LLAMA, FORCED, LLAMA_CALL, True),
    (LLAMA, FREE | AS_JSON, "[1]", True),
    (LLAMA, FREE | AS_JSON, LLAMA_CALL, True),
]


@pytest.mark.parametrize(("form", "asked", "text", "is_allowed"), ALLOWED, ids=range(len(ALLOWED)))
def test_the_grammar_allows_calls_and_text_as_asked(form, asked, text, is_allowed):
    constraint = tiny_grammars().begin(call_grammar(form, CALLED, **({"in_parallel": True, "content": ""} | asked)))
    for token in TOKENIZER.encode(text):
        constraint.take(token)
    assert constraint.is_broken is not is_allowed


def told(form, pieces):
    """The text and the calls that come of pieces."""
    ids = itertools.count()
    reader, text, calls = CallReader(form, lambda: f"id{next(ids)}"), "", []
    for piece in pieces:
        certain, found = reader.feed(piece)
        text += certain
        for each in found:
            if each.id is not None:
                assert each.index == len(calls)
                calls.append([each.id, each.name, ""])
            calls[each.index][2] += each.arguments
    return text + reader.finish(), [tuple(each) for each in calls]


def pieces_of(text, cuts):
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


JSONS = st.dictionaries(
    st.text('a"\\{}[]<\n', max_size=4),
    st.recursive(st.text('}"\\</tool_cal>\n', max_size=9) | st.integers(), lambda inner: st.lists(inner, max_size=2)),
    max_size=3,
)


@settings(max_examples=60)
@given(
    st.text("ab <tool_call>\n{", max_size=20).filter(lambda text: "<tool_call>" not in text),
    st.lists(st.tuples(st.sampled_from(["f", "get-it", "a_b"]), JSONS), max_size=3),
    st.lists(st.integers(0, 500), max_size=12),
    st.booleans(),
)
def test_calls_are_found_however_the_text_is_cut(text, calls, cuts, is_pretty):
    indent = 2 if is_pretty else None
    written = [(name, json.dumps(arguments, indent=indent)) for name, arguments in calls]
    tail = "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in written
    )
    assert told(QWEN, pieces_of(text + tail, cuts)) == (
        text,
        [(f"id{number}", name, arguments) for number, (name, arguments) in enumerate(written)],
    )
    for name, arguments in written[:1]:
        whole = f'{{"name": "{name}", "parameters": {arguments}}}'
        assert told(LLAMA, pieces_of(whole, cuts)) == ("", [("id0", name, arguments)])


@pytest.mark.parametrize(
    ("form", "pieces", "expected"),
    [
        (QWEN, ["so <tool"], ("so <tool", [])),  # the end came before it became a call
        (QWEN, ['so <tool_call>\n{"na'], ("so ", [])),  # cut short before its name
        (QWEN, ['<tool_call>\n{"name": "f", "arguments": {"a": "b'], ("", [("id0", "f", '{"a": "b')])),
        (LLAMA, ['{"na'], ('{"na', [])),
        (LLAMA, ['{"name": "f'], ("", [])),
        (LLAMA, ['so {"name": "f", "parameters": {}}'], ('so {"name": "f", "parameters": {}}', [])),
        (LLAMA, ["s", 'o {"name": "f", "parameters": {}}'], ('so {"name": "f", "parameters": {}}', [])),
        (LLAMA, ["[1, ", '{"a": 2}]'], ('[1, {"a": 2}]', [])),
    ],
)
def test_what_is_cut_short_or_is_no_call(form, pieces, expected):
    assert told(form, pieces) == expected


def test_what_is_certain_is_told_at_once():
    reader = CallReader(QWEN, lambda: "id")
    assert reader.feed("I see<") == ("I see", [])
    assert reader.feed("b><tool_call>") == ("<b>", [])
    [begun] = reader.feed('\n{"name": "f", "arguments": ')[1]
    assert (begun.index, begun.id, begun.name, begun.arguments) == (0, "id", "f", "")
    assert [piece.arguments for piece in reader.feed('{"a": "}')[1]] == ['{"a": "']  # it could be the call's
    assert [piece.arguments for piece in reader.feed('"}}\n</tool')[1]] == ['}"}']
