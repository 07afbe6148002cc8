import re

import pytest
from pydantic import TypeAdapter, ValidationError

from policies import fields
from policies.policy import Rate


def read(kind, value):
    return TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (fields.Text, "no", "no"),
        (fields.Name, "gold-2.a_b", "gold-2.a_b"),
        (fields.Name, "1", "1"),
        (fields.Header, "X-Team", "x-team"),
        (fields.Duration, "5m", 300.0),
        (fields.Size, "1KiB", 1024),
        (fields.Rate, "6/minute", Rate(6.0, 60.0)),
        (fields.Count, "0", 0),
        (fields.Positive, "1k", 1000),
        (fields.Share, "20%", 0.2),
        (fields.Flag, "true", True),
        (fields.OneOrMany, "a", ("a",)),
        (fields.OneOrMany, ["a", "b"], ("a", "b")),
    ],
)
def test_read(kind, text, value):
    assert read(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (fields.Text, "", "must have 1 to 1000 characters"),
        (fields.Text, "x" * 1001, "must have 1 to 1000 characters"),
        (fields.Text, ["x"], "expected text, found a list"),
        (fields.Name, "a b", "`a b` is not a name: letters, digits, `.`, `_` and `-`, at most 128"),
        (fields.Name, "-a", "is not a name"),
        (fields.Name, "a\n", "is not a name"),
        (fields.Name, "x" * 129, "is not a name"),
        (fields.Name, {}, "expected a name, found a mapping"),
        (fields.Header, "a:b", "`a:b` is not the name of a header"),
        (fields.Positive, "0", "must be at least 1"),
        (fields.Duration, ["1s"], "expected a duration, found a list"),
        (fields.OneOrMany, [], "must not be empty"),
    ],
)
def test_refused(kind, value, message):
    with pytest.raises(ValidationError) as caught:
        read(kind, value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (fields.Duration, "250ms"),
        (fields.Size, "32KiB"),
        (fields.Size, "10B"),
        (fields.Rate, "40k/month"),
        (fields.Count, "40k"),
        (fields.Share, "0.5%"),
        (fields.Name, "gold"),
        (fields.Header, "x-team"),
    ],
)
def test_the_schema_takes_what_the_reader_takes(kind, text):
    schema = TypeAdapter(kind).json_schema()
    forms = [form["pattern"] for form in schema.get("anyOf", [schema]) if "pattern" in form]
    assert any(re.search(form, text) for form in forms)
    assert not any(re.search(form, f"{text} ?") for form in forms)
