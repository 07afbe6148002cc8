from __future__ import annotations

import pytest

from gateway.limit_headers import LimitHeaders, duration, quoted
from policies.policy import Plan, Rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (1, "1s"), (59, "59s"), (60, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (90061, "25h1m1s")],
)
def test_durations_are_written_as_go_does(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "field"),
    [("free", b'"free"'), ('a"b\\c', b'"a\\"b\\\\c"'), ("größe\r\nx: y", b'"gr??e??x: y"'), ("100%", b'"100%"')],
)
def test_names_are_quoted_and_cannot_end_the_line(name, field):
    assert quoted(name) == field


def test_all_lines():
    assert LimitHeaders(Plan("free", Rate(60, 60.0), 10)).lines(7.4) == (
        b'ratelimit: "free";r=7;t=3\r\n'
        b'ratelimit-policy: "free";q=60;w=60\r\n'
        b"x-ratelimit-limit-requests: 10\r\n"
        b"x-ratelimit-remaining-requests: 7\r\n"
        b"x-ratelimit-reset-requests: 3s\r\n"
    )


@pytest.mark.parametrize(
    ("remaining", "left", "reset"),
    [(10.0, 10, "0s"), (9.99, 9, "1s"), (0.4, 0, "10s"), (0.0, 0, "10s")],
)
def test_numbers(remaining, left, reset):
    lines = LimitHeaders(Plan("free", Rate(60, 60.0), 10)).lines(remaining)
    assert b"remaining-requests: %d\r\n" % left in lines
    assert b"reset-requests: %b\r\n" % reset.encode() in lines


def test_the_same_numbers_are_not_written_twice():
    headers = LimitHeaders(Plan("free", Rate(1, 60.0), 10))
    assert headers.lines(5.0) is headers.lines(5.0)
    assert headers.lines(4.0) != headers.lines(5.0)


def test_a_name_with_a_percent_sign():
    assert LimitHeaders(Plan("100%d", Rate(1, 1.0), 1)).lines(1.0).startswith(b'ratelimit: "100%d";r=1;t=0\r\n')


def test_no_limit_no_lines():
    assert LimitHeaders(Plan("free")).lines(float("inf")) == b""


def test_refusal_names_the_limit():
    assert LimitHeaders(Plan("free", Rate(60, 60.0), 10)).refusal == (
        "The request limit of this plan is reached: 60 per 1m0s."
    )
