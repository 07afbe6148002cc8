"""The scanner of event streams, beside a plain reader: whatever a backend sends, and however it is cut into pieces."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.sse import Scanner
from gateway.usage import usage_of
from tests.support.event_stream import Event, events_of

CHAT = "/v1/chat/completions"
FIELDS = [b"data: ", b"data:", b"data", b"event: ", b"event:", b"id: ", b": ", b"", b" data: ", b"datax: "]
VALUES = [
    b"[DONE]", b"[DONE", b"message_stop", b"error", b'{"error":{"message":"x"}}', b'{"content":"[DONE]"}', b"\x00",
    b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}', b'{"usage":null}', b'{"usage":{"prompt_tokens":7}}',
    b'{"choices":[{"finish_reason":"stop"}]}', b'{"choices":[{"finish_reason":null}]}', b'{"type":"message_stop"}',
    b'{"content":"data: [DONE]\\n\\nevent: error"}', b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"a:b", b"",
]  # fmt: skip

lines = st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES) | st.binary(max_size=4)).map(b"".join)
ends = st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n"])
streams = st.lists(lines | ends, max_size=30).map(b"".join) | st.lists(st.tuples(lines, ends)).map(
    lambda pairs: b"".join(map(b"".join, pairs))
)
cuts = st.sets(st.integers(0, 400), max_size=20)


def cut(stream: bytes, places: set[int]) -> list[bytes]:
    bounds = [0, *sorted(place for place in places if 0 < place < len(stream)), len(stream)]
    return [stream[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def findings(scanner: Scanner) -> tuple[bool, bool, int, int]:
    return scanner.terminated, scanner.errored, scanner.tokens_in, scanner.tokens_out


def scanned(pieces: list[bytes], path: str) -> Scanner:
    scanner = Scanner(path)
    passed = [scanner.feed(piece) for piece in pieces]
    assert b"".join(passed) + scanner.rest() == b"".join(pieces)
    return scanner


@given(streams, cuts)
@example(b"data: a\r\n\r\ndata: b", {8})
@example(b'event: error\ndata: x\n\ndata: {"a":"error"}\n\n', {22})
def test_what_passes_is_every_event_that_has_ended_and_no_more(stream, places) -> None:
    """After each piece a reader of what has passed has the events of all that came, and an event of ours fits behind."""
    scanner, came, passed = Scanner(CHAT), b"", b""
    ours = Event("message", "ours")
    for piece in cut(stream, places):
        came += piece
        passed += scanner.feed(piece)
        ended = events_of(came)
        assert came.startswith(passed)
        assert events_of(passed) == ended
        *before, last = events_of(passed + b"data: ours\n\n")
        assert (before, last.type, last.data) == (ended, ours.type, ours.data)


@given(streams, cuts, st.sampled_from([CHAT, "/v1/messages", "/v1/responses"]))
@example(b'event: error\ndata: x\n\ndata: {"a":"error"}\n\n', {22}, CHAT)
def test_no_cut_changes_a_byte_or_what_is_found(stream, places, path) -> None:
    whole, pieces = scanned([stream], path), scanned(cut(stream, places), path)
    bytewise = scanned(cut(stream, set(range(len(stream)))), path)
    assert findings(whole) == findings(pieces) == findings(bytewise)


@given(streams)
def test_what_is_found_is_there(stream) -> None:
    """By a look at each line of it."""
    scanner = scanned([stream], CHAT)
    told = re.split(rb"\r\n|\n|\r", stream)
    assert scanner.terminated is any(re.match(rb"data: ?\[DONE\]", line) for line in told)
    ended = stream[: len(stream) - len(unended(stream))]
    usages = [
        usage_of(line.partition(b":")[2]) for line in re.split(rb"\r\n|\n|\r", ended) if line.startswith(b"data:")
    ]
    assert scanner.tokens_in == max([tokens_in for tokens_in, _, _ in usages], default=-1)
    assert scanner.tokens_out == max([tokens_out for _, tokens_out, _ in usages], default=-1)


def unended(stream: bytes) -> bytes:
    scanner = Scanner(CHAT)
    scanner.feed(stream)
    return scanner.rest()
