import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.text import LONGEST, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("caf\u00e9 \u4f60\u597d", "caf\u00e9 \u4f60\u597d"),
        ("a\r\nb", r"a\r\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x00\x7f\x85", r"\x00\x7f\x85"),
        ("\u2028\u202e", r"\u2028\u202e"),
        ("\udc85admin\udca0", r"\udc85admin\udca0"),
        ("x" * 1_000_000, "x" * LONGEST),
    ],
)
def test_shown_as(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_comes_is_printable_and_encodable(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
