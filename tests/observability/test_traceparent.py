import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.traceparent import TraceParent, parse_traceparent

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize("value", [GOOD, GOOD.encode(), f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what.more"])
def test_accepted(value):
    assert parse_traceparent(value) == TraceParent(TRACE, PARENT, 1)


@pytest.mark.parametrize("flags", ["00", "01", "02", "ff"])
def test_flags_are_told_as_they_came(flags):
    parsed = parse_traceparent(f"00-{TRACE}-{PARENT}-{flags}")
    assert parsed is not None
    assert parsed.flags == int(flags, 16)


@pytest.mark.parametrize(
    "value",
    [
        "",
        b"",
        GOOD[:-1],
        GOOD + "1",
        GOOD + "-more",  # version 00 has no more
        GOOD + " ",
        " " + GOOD,
        GOOD + "\n",
        GOOD.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"0x-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01what",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00_{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
        f"00-{TRACE[:-1]}\u0661-{PARENT}-01",  # a digit, though not an ASCII one
        f"00-{TRACE[:-1]}\udc85-{PARENT}-01",
        GOOD.encode() + b"\xff",
        f"cc-{TRACE}-{PARENT}-01-" + "x" * 10_000,
    ],
)
def test_refused(value):
    assert parse_traceparent(value) is None


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_all_that_may_be_written_is_read(trace_id, span_id, sampled):
    trace, span = f"{trace_id:032x}", f"{span_id:016x}"
    assert parse_traceparent(f"00-{trace}-{span}-{sampled:02x}") == TraceParent(trace, span, int(sampled))


@given(st.one_of(st.text(max_size=600), st.binary(max_size=600)))
def test_nothing_makes_it_raise(value):
    parse_traceparent(value)
