import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import units
from policies.policy import Rate

GOOD = [
    (units.parse_duration, "250ms", 0.25),
    (units.parse_duration, "10s", 10.0),
    (units.parse_duration, "1.5m", 90.0),
    (units.parse_duration, "1h", 3600.0),
    (units.parse_size, "0", 0),
    (units.parse_size, "100", 100),
    (units.parse_size, "100B", 100),
    (units.parse_size, "32KiB", 32 << 10),
    (units.parse_size, "1.5MiB", 3 << 19),
    (units.parse_size, "1MB", 1_000_000),
    (units.parse_size, "2kB", 2_000),
    (units.parse_size, "1GiB", 1 << 30),
    (units.parse_rate, "60/minute", Rate(60.0, 60.0)),
    (units.parse_rate, "0.5/second", Rate(0.5, 1.0)),
    (units.parse_rate, "40k/hour", Rate(40_000.0, 3600.0)),
    (units.parse_rate, "2M/day", Rate(2_000_000.0, 86_400.0)),
    (units.parse_rate, "1/month", Rate(1.0, 2_592_000.0)),
    (units.parse_count, "0", 0),
    (units.parse_count, "40k", 40_000),
    (units.parse_count, "2.5M", 2_500_000),
    (units.parse_share, "5%", 0.05),
    (units.parse_share, "100%", 1.0),
    (units.parse_share, "0.5%", 0.005),
    (units.parse_share, "0.05", 0.05),
    (units.parse_share, "1.0", 1.0),
    (units.parse_share, "0", 0.0),
    (units.parse_flag, "true", True),
    (units.parse_flag, "false", False),
]

BAD = [
    (units.parse_duration, "10", "`10` is not a duration: expected one such as `250ms`, `10s`, `5m` or `1h`"),
    (units.parse_duration, "1d", "is not a duration"),
    (units.parse_duration, "-1s", "is not a duration"),
    (units.parse_duration, "1 s", "is not a duration"),
    (units.parse_duration, "0s", "must be more than 0 and at most a year"),
    (units.parse_duration, "10000h", "must be more than 0 and at most a year"),
    (units.parse_size, "32Kib", "`32Kib` is not a size: expected one such as `32KiB`, `1MB` or a number of bytes"),
    (units.parse_size, "0.5", "`0.5` is not a whole number"),
    (units.parse_rate, "60", "`60` is not a rate: expected one such as `60/minute` or `40k/hour`"),
    (units.parse_rate, "60/minut", "`60/minut` has the unknown period `minut`: did you mean `minute`?"),
    (units.parse_rate, "60/x", "has the unknown period `x`: expected second, minute, hour, day, month"),
    (units.parse_rate, "0/second", "allows nothing"),
    (units.parse_count, "010", "`010` is not a number: expected one such as `100`, `40k` or `2M`"),
    (units.parse_count, "1e3", "is not a number"),
    (units.parse_count, "1_000", "is not a number"),
    (units.parse_count, "1:30", "is not a number"),
    (units.parse_count, "-1", "is not a number"),
    (units.parse_count, "٣", "is not a number"),
    (units.parse_count, "9" * 5000, "is not a number"),
    (units.parse_count, "1.5", "`1.5` is not a whole number"),
    (units.parse_share, "20", "`20` is not a share: write `20%` if that is meant"),
    (units.parse_share, "1", "`1` is not a share: write `1%` or `100%` if that is meant"),
    (units.parse_share, "120%", "`120%` is more than 100%"),
    (units.parse_share, "half", "is not a share"),
    (units.parse_flag, "yes", "`yes` is neither `true` nor `false`"),
    (units.parse_flag, "True", "is neither"),
]


@pytest.mark.parametrize(("parse", "text", "value"), GOOD)
def test_read(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(("parse", "text", "message"), BAD)
def test_refused(parse, text, message):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "parse",
    [units.parse_duration, units.parse_size, units.parse_rate, units.parse_count, units.parse_share, units.parse_flag],
)
@given(text=st.text())
def test_any_text_is_a_number_or_refused(parse, text):
    with contextlib.suppress(ValueError):
        parse(text)
