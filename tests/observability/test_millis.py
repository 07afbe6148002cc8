import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.millis import millis


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, b"0.000"), (0.0000004, b"0.000"), (0.0000006, b"0.001"), (0.0000124, b"0.012"), (0.001, b"1.000"),
        (0.004095, b"4.095"), (0.0040956, b"4.096"), (0.1, b"100.000"), (12.3456789, b"12345.679"),
    ],
)  # fmt: skip
def test_milliseconds_have_three_digits(seconds, text) -> None:
    assert millis(seconds) == text


@given(st.floats(0.0, 1e6))
def test_looked_up_or_formatted_it_is_right_to_a_microsecond(seconds) -> None:
    assert abs(float(millis(seconds)) - seconds * 1e3) <= 0.000501 + seconds * 1e-9
