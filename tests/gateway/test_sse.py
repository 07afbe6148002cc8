import pytest

from gateway.sse import MAX_EVENT_BYTES, EventTooLarge, Scanner
from tests.support.corpora import event_streams

CHAT = "/v1/chat/completions"


def fed(pieces: list[bytes], path: str = CHAT) -> tuple[list[bytes], Scanner]:
    scanner = Scanner(path)
    return [scanner.feed(piece) for piece in pieces], scanner


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        ([b"data: a\n\n"], [b"data: a\n\n"]),
        ([b"data: a\n", b"\n"], [b"", b"data: a\n\n"]),
        ([b"data: a\n\ndata: b", b"\n\n"], [b"data: a\n\n", b"data: b\n\n"]),
        ([b"data: a\r\n\r\n"], [b"data: a\r\n\r\n"]),
        ([b"data: a\r\n\r", b"\n"], [b"data: a\r\n\r", b""]),
        ([b"data: a\r\rdata: b"], [b"data: a\r\r"]),
        ([b"data: a\n\r\nx"], [b"data: a\n\r\n"]),
        ([b"data: a\r\ndata: b\r\n"], [b""]),
        ([b": comment\n\n"], [b": comment\n\n"]),
        ([b""], [b""]),
    ],
)
def test_only_whole_events_pass(pieces, passed) -> None:
    assert fed(pieces)[0] == passed


@pytest.mark.parametrize(
    "stream",
    [b"data: a\n\ndata: b\n\n", b"data: a\r\n\r\nid: 1\r\ndata: b\r\n\r\n", b"data: a\r\rdata: b\r\r", b"\xff\xfe\n\n"],
)
def test_every_cut_into_pieces_gives_the_same_bytes(stream) -> None:
    for size in range(1, len(stream) + 1):
        passed, scanner = fed([stream[at : at + size] for at in range(0, len(stream), size)])
        assert b"".join(passed) + scanner.rest() == stream


def test_the_corpus_passes_byte_for_byte_in_slices_of_one() -> None:
    for pieces in event_streams().values():
        stream = b"".join(pieces)
        if len(stream) > 10_000:
            continue  # its slices of one are covered by the short ones
        passed, scanner = fed([stream[at : at + 1] for at in range(len(stream))])
        assert b"".join(passed) + scanner.rest() == stream


def test_an_event_without_end_is_refused_at_the_bound() -> None:
    scanner = Scanner(CHAT)
    for _ in range(MAX_EVENT_BYTES // 1000):
        scanner.feed(b"x" * 1000)
    with pytest.raises(EventTooLarge):
        scanner.feed(b"x" * 1000)


@pytest.mark.parametrize(
    ("path", "events", "whole", "finished"),
    [
        (CHAT, [b'data: {"a":1}\n\n', b"data: [DONE]\n\n"], True, False),
        (CHAT, [b'data: {"a":1}\n\n'], False, False),
        (CHAT, [b'data: {"choices":[{"finish_reason": "stop"}]}\n\n'], True, True),
        (CHAT, [b'data: {"choices":[{"finish_reason":"stop"}]}\n\n', b'data: {"usage":{}}\n\n'], True, True),
        (CHAT, [b'data: {"choices":[{"finish_reason":null}]}\n\n'], False, False),
        ("/v1/messages", [b'event: message_stop\ndata: {"type":"message_stop"}\n\n'], True, False),
        ("/v1/messages", [b"event: ping\ndata: {}\n\n"], False, False),
        ("/hooks", [b"data: x\n\n"], True, False),
    ],
)
def test_a_stream_is_whole_when_its_kind_says_so(path, events, whole, finished) -> None:
    _, scanner = fed(events, path)
    assert (scanner.is_whole, scanner.is_finished) == (whole, finished)


def test_a_last_event_without_its_empty_line_still_counts() -> None:
    passed, scanner = fed([b'data: {"a":1}\n\n', b"data: [DONE]\n"])
    assert passed == [b'data: {"a":1}\n\n', b""]
    assert scanner.rest() == b"data: [DONE]\n"
    assert scanner.is_whole


def test_usage_and_errors_are_noticed() -> None:
    _, scanner = fed([b'data: {"usage":null}\n\n', b'data: {"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'])
    assert (scanner.tokens_in, scanner.tokens_out) == (3, 5)
    _, scanner = fed([b'data: {"error":{"message":"x"}}\n\n'])
    assert scanner.errored


@pytest.mark.parametrize(
    ("path", "event", "ends"),
    [
        (CHAT, b"data: [DONE]\n\n", True),
        (CHAT, b"data:[DONE]\r\n\r\n", True),
        (CHAT, b"id: 1\ndata: [DONE]\n\n", True),
        (CHAT, b'data: {"content":"[DONE]"}\n\n', False),
        (CHAT, b'data: {"content":"data: [DONE]"}\n\n', False),
        (CHAT, b'data: {"content":"[DONE]","type":"message_stop"}\n\n', False),  # which ends another kind of stream
        (CHAT, b'data: {"content":"\\"finish_reason\\":\\"stop\\""}\n\n', False),
        ("/v1/messages", b'data: {"type": "message_stop"}\n\n', True),
        ("/v1/messages", b"event: message_stop\ndata: {}\n\n", True),
        ("/v1/messages", b'data: {"text":"message_stop"}\n\n', False),
        ("/v1/messages", b'data: {"text":"\\"type\\":\\"message_stop\\" event: message_stop"}\n\n', False),
    ],
)
def test_what_a_model_writes_does_not_end_its_stream(path, event, ends) -> None:
    assert fed([event], path)[1].is_whole is ends
    assert fed([bytes([byte]) for byte in event], path)[1].is_whole is ends


def test_what_a_model_writes_is_no_error() -> None:
    assert not fed([b'data: {"content":"event: error","error":null}\n\n'])[1].errored
    assert fed([b'event: error\ndata: {"error":{}}\n\n'])[1].errored
    assert fed([b"event: error\ndata: out of memory\n\n"])[1].errored


LAST = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":8}}'
)
LOAD = b'{"seq":7,"running":1,"waiting":0}'


@pytest.mark.parametrize(
    ("stream", "passes", "load"),
    [
        (LAST + b',"load":' + LOAD + b"}\n\n", LAST + b"}\n\n", LOAD),
        (LAST + b"}\n\n", LAST + b"}\n\n", b""),
        (
            b'data: {"load":1}\n\n',
            b'data: {"load":1}\n\n',
            b"",
        ),  # not beside a usage: whatever it is, it is the answer's
        (b'data: {"usage":null,"text":",\\"load\\":1"}\n\n', b'data: {"usage":null,"text":",\\"load\\":1"}\n\n', b""),
    ],
)
def test_a_load_beside_the_usage_is_heard_and_ends_here(stream, passes, load) -> None:
    (passed,), scanner = fed([stream])
    assert (passed, scanner.load) == (passes, load)
    assert scanner.tokens_cached == (8 if LAST in stream else -1)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", 2),
        (b"data: a\r\n\r\nevent: x\r\ndata: b\r\n\r\n", 2),
        (b"event: x\ndata: a\n\n: comment\n\n", 1),
        (b'data: {"text":"\\n\\ndata: no"}\n\n', 1),
        (b"data: a\n\ndata: cut", 1),
    ],
)
def test_events_with_data_are_counted_where_somebody_wants_to_know(stream, events) -> None:
    for size in (1, 5, len(stream)):
        counting, other = Scanner(CHAT, counts=True), Scanner(CHAT)
        for at in range(0, len(stream), size):
            counting.feed(stream[at : at + size])
            other.feed(stream[at : at + size])
        assert (counting.events, other.events) == (events, 0)
