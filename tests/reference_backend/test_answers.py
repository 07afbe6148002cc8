"""Answers written, whole and as events, without a server around them."""

import pytest

from reference_backend.answers import (
    Answer,
    ChatAnswer,
    Piece,
    TokenLogprob,
    Usage,
    events,
    finish_reason,
    joined,
)
from reference_backend.tools import CallPiece


def test_a_chat_answer_is_this_json():
    answer = ChatAnswer("chatcmpl-1", 1_800_000_000, "tiny")
    assert answer.whole([Piece(0, "Hi.", "stop")], Usage(9, 3, 8)) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }


def test_a_stream_of_completions_is_these_bytes():
    answer = Answer("cmpl-1", 1, "tiny", with_usage=True)
    frame = b'"id":"cmpl-1","object":"text_completion","created":1,"model":"tiny","choices":'
    assert events(*answer.chunks(Piece(0, "Hi", "length")), answer.usage_chunk(Usage(1, 1))) == (
        b"data: {" + frame + b'[{"text":"Hi","index":0,"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        b"data: {" + frame + b'[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n'
        b"data: {" + frame + b'[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2,'
        b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
    )


LOGPROBS = [TokenLogprob("Hi", -0.5, [("Hi", -0.5), ("Ho", -1.0)]), TokenLogprob("\N{REPLACEMENT CHARACTER}", -2.0, [])]


def test_logprobs_of_a_chat():
    [chunk] = ChatAnswer("chatcmpl-1", 1, "tiny").chunks(Piece(0, "Hi", logprobs=LOGPROBS))
    [choice] = chunk["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.5,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
                    {"token": "Ho", "logprob": -1.0, "bytes": [72, 111]},
                ],
            },
            {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -2.0, "bytes": None, "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_logprobs_of_a_completion():
    whole = Answer("cmpl-1", 1, "tiny").whole([Piece(0, "Hi", "length", LOGPROBS)], Usage(1, 2))
    [choice] = whole["choices"]
    assert choice["logprobs"] == {
        "tokens": ["Hi", "\N{REPLACEMENT CHARACTER}"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"Hi": -0.5, "Ho": -1.0}, {}],
    }


def test_calls_are_told_whole_and_piece_by_piece():
    pieces = [
        CallPiece(0, "", "c1", "f"),
        CallPiece(0, '{"a"'),
        CallPiece(0, ": 1}"),
        CallPiece(1, "", "c2", "g"),
        CallPiece(1, "{}"),
    ]
    answer = ChatAnswer("chatcmpl-1", 1, "tiny")
    message = answer.whole(
        [joined([Piece(0, "", None, [], pieces[:3]), Piece(0, "", "tool_calls", [], pieces[3:])])], Usage(1, 1)
    )["choices"][0]["message"]
    assert message["content"] is None
    assert [(each["id"], each["function"]) for each in message["tool_calls"]] == [
        ("c1", {"name": "f", "arguments": '{"a": 1}'}),
        ("c2", {"name": "g", "arguments": "{}"}),
    ]
    [chunk] = answer.chunks(Piece(0, "", calls=pieces[:2]))
    assert chunk["choices"][0]["delta"] == {
        "tool_calls": [
            {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"index": 0, "function": {"arguments": '{"a"'}},
        ]
    }


@pytest.mark.parametrize(
    ("finish", "has_called", "told"),
    [("stop", False, "stop"), ("stop", True, "tool_calls"), ("length", True, "length"), ("deadline", False, "length")],
)
def test_ends_have_the_names_of_openai(finish, has_called, told):
    assert finish_reason(finish, has_called=has_called) == told
