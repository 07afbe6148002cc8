import json
import os

import pytest

from observability import access_log as module
from observability.access_log import AccessLog
from observability.line_writer import LineWriter
from tests.support.corpora import naughty_strings
from tests.support.ended import ATTEMPT, ended, refused
from tests.support.log_output import Output


@pytest.fixture
def output():
    output = Output()
    yield output
    output.writer.close()
    os.close(output.reader)


def test_a_request_is_one_line(output):
    AccessLog(output.writer)(ended(sampled=True))
    assert output.records() == [
        {
            "time": 1_700_000_000.0, "request_id": "req-1", "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "consumer": "alice", "plan": "free", "method": "POST", "path": "/v1/chat/completions", "route": "chat",
            "service": "tiny", "model": "tiny-1", "backend": "b-1", "policy": "0123456789ab", "status": 200,
            "end_reason": "ok", "total_ms": 100.0, "overhead_ms": 0.1, "auth_ms": 1.0, "limit_ms": 0.5, "body_ms": 2.0,
            "pick_ms": 0.5, "attempts": 1, "bytes_in": 600, "bytes_out": 812, "tokens_in": 12, "tokens_out": 30,
            "first_token_ms": 95.0, "upstream_ms": 90.0, "connect_ms": 1.0,
        }
    ]  # fmt: skip


def test_a_refusal_says_why_and_leaves_out_what_never_was(output):
    AccessLog(output.writer)(refused(429, "rate_limited", "rate_limited", rule="plans.free.requests"))
    [record] = output.records()
    assert (record["status"], record["code"], record["rule"]) == (429, "rate_limited", "plans.free.requests")
    assert (record["attempts"], record["backend"]) == (0, "")
    assert not {"tokens_in", "tokens_out", "first_token_ms", "upstream_ms", "stream"} & record.keys()


@pytest.mark.parametrize(
    "text",
    [
        "a\r\nb", "\x1b[31m", "\x00", "\x7f\x85", "\u2028\u2029\u202e", "${jndi:ldap://x}", "\udc85admin\udca0", '"}\\',
        "\U0001f600", "caf\u00e9", "x" * 1_000_000, "\u20ac" * 200,
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["request_id", "consumer", "path", "model", "rule"])
def test_hostile_text_is_one_plain_short_line(output, field, text):
    AccessLog(output.writer)(ended(**{field: text}))
    [line] = output.lines()
    assert line.isascii()
    assert line.decode().isprintable()
    assert len(json.loads(line)[field]) <= 256 * len(r"\udc85")


def test_every_naughty_string_is_one_line_that_parses():
    naughty = naughty_strings()
    descriptor = os.memfd_create("log")
    writer = LineWriter(descriptor)
    log = AccessLog(writer)
    for text in naughty:
        log(ended(request_id=text, consumer=text, model=text, path=text))
    writer.close()
    lines = os.pread(descriptor, 10_000_000, 0).splitlines()
    os.close(descriptor)
    assert len(lines) == len(naughty)
    assert all(line.decode("ascii").isprintable() and isinstance(json.loads(line), dict) for line in lines)


def test_a_backend_is_told_by_its_id_alone(output):
    AccessLog(output.writer)(ended(attempts=[ATTEMPT, ATTEMPT]))
    [record] = output.records()
    assert (record["backend"], record["attempts"]) == ("b-1", 2)


def test_names_are_remembered_up_to_a_bound_and_each_line_has_its_own(output):
    log = AccessLog(output.writer)
    for number in range(module._MOST_NAMED + 10):
        log._name((f"c{number}", *[""] * (len(module._NAMED) - 1)))
    assert len(log._named) <= module._MOST_NAMED
    for consumer in ("a", "b", "a"):
        log(ended(consumer=consumer, stream=consumer == "b"))
    assert [(line["consumer"], "stream" in line) for line in output.records()] == [
        ("a", False),
        ("b", True),
        ("a", False),
    ]
