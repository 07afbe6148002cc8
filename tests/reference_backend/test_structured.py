"""Schemas of strangers: tried in a process of its own, and refused with the place in the request."""

import asyncio
from random import Random

import msgspec
import pytest

from reference_backend import structured
from reference_backend.refusals import ApiError
from reference_backend.structured import Clause, JsonSchema, ResponseFormat, Trials, clause_of, faults
from reference_backend.tools import QWEN, Function, call_grammar, schema_of

BAD = {"type": "strnig"}
WRONG = "Invalid type: strnig"


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


TOO_DEEP = nested(2000)


def clause(schema, *, place="schema", is_strict=False):
    return Clause(place, schema, is_strict)


def task(*clauses):
    return structured._Task("start: " + " | ".join(each.grammar for each in clauses), list(clauses))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Clause("response_format", {"type": "object"}, is_strict=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}, "strict": True}},
            Clause("response_format.json_schema.schema", {"type": "null"}, is_strict=True),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
            Clause("response_format.json_schema.schema", {"type": "null"}, is_strict=False),
        ),
    ],
)
def test_a_format_is_a_schema_to_keep_to(wanted, expected):
    assert clause_of(msgspec.convert(wanted, ResponseFormat | None)) == expected


@pytest.mark.parametrize("field", ["shema", "grammar"])
def test_a_field_of_a_schema_that_is_not_known_is_refused(field):
    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{field}`"):
        msgspec.convert({"type": "json_schema", "json_schema": {"name": "x", field: {}}}, JsonSchema)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (BAD, "schema"),
        ({"properties": {"a": {"type": "null"}, "b": BAD}}, "schema.properties.b"),
        ({"items": {"anyOf": [{"type": "null"}, BAD]}}, "schema.items.anyOf[1]"),
        ({"prefixItems": [{}, {"additionalProperties": BAD}]}, "schema.prefixItems[1].additionalProperties"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"items": BAD}}}, "schema.$defs.x.items"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {}, "y": BAD}}, None),  # nobody refers to it
    ],
)
def test_what_is_wrong_is_found_where_it_is(schema, place):
    found = list(faults(task(clause(schema)), Random(0)))
    assert [reason for _, reason in found] == [WRONG] * len(found)
    assert (found[-1][0] if found else None) == place


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (nested(200), ("schema", "it is nested too deep")),
        ({"properties": {"a": {"minimum": 10**400}}}, ("schema.properties.a", "number out of range")),
    ],
)
def test_what_our_own_notation_cannot_hold_is_told_in_words_of_the_client(schema, told):
    assert list(faults(task(clause(schema)), Random(0)))[-1] == told


def test_the_first_clause_that_is_wrong_is_told():
    clauses = [clause({}, place="a"), clause(BAD, place="b"), clause(BAD, place="c")]
    assert list(faults(task(*clauses), Random(0))) == [("a", WRONG), ("b", WRONG)]


def test_clauses_that_are_good_alone_and_not_together_are_told_too():
    clauses = [clause({}, place="a"), clause({}, place="b")]
    assert [place for place, _ in faults(structured._Task("start: nobody", clauses), Random(0))] == ["a"]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [(TOO_DEEP, "it is nested too deep"), ({"const": "x" * 200_000}, "may have 131072 characters")],
)
async def test_what_nobody_would_write_is_not_even_tried(schema, reason):
    with pytest.raises(ApiError, match=reason) as refusal:
        await Trials().check(clause(schema).grammar, [clause({}), clause(schema, place="b")])
    assert refusal.value.param == ("b" if schema is not TOO_DEEP else "schema")


HOSTILE = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(2, 30)]}  # takes for ever
TRIED = [
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, None),
    ({"properties": {"a": BAD}}, ("schema.properties.a", WRONG)),
    (HOSTILE, ("schema", structured.TOO_MUCH)),
]


async def test_schemas_are_tried_in_processes_that_are_ended(monkeypatch):
    monkeypatch.setattr(structured, "TRIALS_AT_ONCE", 3)
    trials = Trials()

    async def refused(schema):
        wanted = clause(schema)
        try:
            await trials.check(f"start: {wanted.grammar}", [wanted])
        except ApiError as error:
            return error.param, str(error).removeprefix(f"{error.param}: ")

    assert await asyncio.gather(*(refused(schema) for schema, _ in TRIED)) == [expected for _, expected in TRIED]


async def test_forty_tools_are_no_trouble():
    """Each alone would take longer to try than all of them together may."""
    parameters = {"properties": {f"p{n}": {"type": "string", "format": "date-time"} for n in range(5)}}
    functions = [Function(name=f"tool_{n}", parameters=parameters) for n in range(40)]
    clauses = [clause(schema_of(each), place=each.name) for each in functions]
    called = {each.place: each.grammar for each in clauses}
    await Trials().check(call_grammar(QWEN, called, is_forced=False, in_parallel=True, content=""), clauses)


async def test_what_is_good_is_not_tried_again(monkeypatch):
    tried = []

    async def note(task, _place):
        tried.append(msgspec.json.decode(task)["grammar"])

    trials = Trials()
    monkeypatch.setattr(trials, "_try", note)
    monkeypatch.setattr(structured, "REMEMBERED", 2)
    for grammar in ("a", "b", "a", "c", "a", "b"):
        await trials.check(grammar, [clause({})])
    assert tried == ["a", "b", "c", "b"]


async def test_a_client_that_leaves_ends_the_trial():
    """Whoever comes next does not wait for it."""
    trials = Trials()
    wanted = clause(HOSTILE)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await trials.check(f"start: {wanted.grammar}", [wanted])
    good = clause({})
    await trials.check(f"start: {good.grammar}", [good])
