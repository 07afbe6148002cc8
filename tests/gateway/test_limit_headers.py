from __future__ import annotations

import pytest

from gateway.limit_headers import LimitHeaders, duration, quoted, told
from policies.lease import Limit
from policies.policy import Rate


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
    assert LimitHeaders("free", "requests", Limit(10, Rate(60, 60.0))).lines(7.4) == (
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
    lines = LimitHeaders("free", "requests", Limit(10, Rate(60, 60.0))).lines(remaining)
    assert b"remaining-requests: %d\r\n" % left in lines
    assert b"reset-requests: %b\r\n" % reset.encode() in lines


def test_the_same_numbers_are_not_written_twice():
    headers = LimitHeaders("free", "requests", Limit(10, Rate(1, 60.0)))
    assert headers.lines(5.0) is headers.lines(5.0)
    assert headers.lines(4.0) != headers.lines(5.0)


def test_a_name_with_a_percent_sign():
    headers = LimitHeaders("100%d", "requests", Limit(1, Rate(1, 1.0)))
    assert headers.lines(1.0).startswith(b'ratelimit: "100%d";r=1;t=0\r\n')


def test_no_limit_no_lines():
    assert LimitHeaders("free", "requests", None).lines(float("inf")) == b""


def test_lines_of_tokens_have_names_of_their_own():
    assert LimitHeaders("free", "tokens", Limit(40_000, Rate(40_000, 60.0))).lines(38_000) == (
        b'ratelimit: "free.tokens";r=38000;t=3\r\n'
        b'ratelimit-policy: "free.tokens";q=40000;w=60;qu="tokens"\r\n'
        b"x-ratelimit-limit-tokens: 40000\r\n"
        b"x-ratelimit-remaining-tokens: 38000\r\n"
        b"x-ratelimit-reset-tokens: 3s\r\n"
    )


def test_what_is_owed_is_told_as_nothing_left_and_by_the_time():
    lines = LimitHeaders("free", "tokens", Limit(60, Rate(60, 60.0))).lines(-30.0)
    assert b"remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1m30s\r\n" in lines


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (Rate(60.0, 60.0), "60 per 1m0s"),
        (Rate(2_000_000.0, 86_400.0), "2000000 per 24h0m0s"),
        (Rate(0.5, 1.0), "0.5 per 1s"),
    ],
)
def test_a_limit_in_words(rate, words):
    assert told(Limit(1, rate)) == words
