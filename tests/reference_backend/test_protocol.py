"""Requests judged and answers written, without a server around them."""

import json

import msgspec
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend import protocol  # noqa: E402
from reference_backend.engine.request import Load  # noqa: E402
from reference_backend.protocol import (  # noqa: E402
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Usage,
    decode,
)

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**changes):
    return json.dumps({"model": "tiny", "messages": HELLO} | changes).encode()


BAD_CHATS = [
    (b"", None, "truncated"),
    (b"null", None, "Expected `object`"),
    (b"[]", None, "Expected `object`"),
    (b"{", None, "truncated"),
    (b'{"model": "\xff"}', None, "utf-8"),
    (b'{"model": "\\ud800"}', None, ""),
    (b'{"tools": ' + b"[" * 100_000, None, "recursion"),
    (b'{"model": "tiny", "temperature": NaN}', None, "malformed"),
    (chat(temperature=0).replace(b'"temperature": 0', b'"temperature": 1e999'), "temperature", "out of range"),
    (json.dumps({"messages": HELLO}).encode(), "model", "missing required field `model`"),
    (json.dumps({"model": "tiny"}).encode(), "messages", "missing required field `messages`"),
    (chat(model=7), "model", "Expected `str`"),
    (chat(model=None), "model", "Expected `str`"),
    (chat(messages=[]), "messages", "length >= 1"),
    (chat(messages="Hello"), "messages", "Expected `array`"),
    (chat(messages=HELLO * 1001), "messages", "length <= 1000"),
    (chat(messages=[{"role": "user"}]), "messages[0]", "missing required field `content`"),
    (chat(messages=[{"role": "wizard", "content": ""}]), "messages[0].role", "Invalid enum value 'wizard'"),
    (chat(messages=[{"role": "w" * 5000, "content": ""}]), "messages[0].role", "Invalid enum value"),
    (chat(messages=[{"role": "user", "content": [1]}]), "messages[0].content[0]", "Expected `object`"),
    (chat(stream="yes"), "stream", "Expected `bool | null`"),
    (chat(stream_options=[]), "stream_options", "Expected `object | null`"),
    (chat(max_tokens=0), "max_tokens", ">= 1"),
    (chat(max_tokens=-1), "max_tokens", ">= 1"),
    (chat(max_tokens=1.5), "max_tokens", "Expected `int"),
    (chat(max_tokens=10**30), "max_tokens", "<= 1000000"),
    (chat(temperature=-0.1), "temperature", ">= 0"),
    (chat(temperature=2.1), "temperature", "<= 2"),
    (chat(temperature="hot"), "temperature", "Expected `float"),
    (chat(top_p=0), "top_p", "> 0"),
    (chat(top_p=1.1), "top_p", "<= 1"),
    (chat(n=2), "n", "<= 1"),
    (chat(n=0), "n", ">= 1"),
    (chat(stop=""), "stop", "length >= 1"),
    (chat(stop=["a"] * 5), "stop", "length <= 4"),
    (chat(stop=[1]), "stop[0]", "Expected `str`"),
    (chat(seed=2**63), "seed", "<= 9223372036854775807"),
    (chat(seed="x"), "seed", "Expected `int"),
    (chat(tools=[{"type": "function"}]), "tools", "tools is not supported"),
    (chat(logprobs=True), "logprobs", "logprobs is not supported"),
    (chat(frequency_penalty=1), "frequency_penalty", "not supported"),
    (chat(logit_bias={"5": 1}), "logit_bias", "not supported"),
    (chat(response_format={"type": "json_object"}), "response_format", "not supported"),
    (chat(tool_choice={"type": "function"}), "tool_choice", "not supported"),
    (chat(modalities=["text", "audio"]), "modalities", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_a_bad_request_names_its_field(body, param, message):
    with pytest.raises(ApiError) as refusal:
        decode(body, ChatRequest)
    error = refusal.value.body()["error"]
    assert (refusal.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert len(error["message"]) <= protocol.LONGEST_SHOWN
    msgspec.json.encode(refusal.value.body())


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None},
        {"tools": []},
        {"logprobs": False},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"modalities": ["text"]},
        {"n": 1},
        {"user": "x", "metadata": {"a": 1}, "a field of next year": []},
    ],
)
def test_a_field_that_asks_for_nothing_else_passes(neutral):
    decode(chat(**neutral), ChatRequest)


@pytest.mark.parametrize(
    ("prompt", "is_good"),
    [("a", True), (["a"], True), ([], False), (["a", "b"], False), ([1, 2], False), (None, False)],
)
def test_one_prompt_is_completed(prompt, is_good):
    body = json.dumps({"model": "tiny", "prompt": prompt}).encode()
    if is_good:
        assert decode(body, CompletionRequest).text() == "a"
        return
    with pytest.raises(ApiError):
        decode(body, CompletionRequest)


def test_messages_become_plain_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = decode(chat(messages=[{"role": "developer", "content": parts}]), ChatRequest)
    plain = request.messages[0].plain()
    assert (plain.role, plain.content) == ("system", "Hello")


def test_an_image_is_refused_by_name():
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    request = decode(chat(messages=[{"role": "user", "content": content}]), ChatRequest)
    with pytest.raises(ApiError, match="text parts only, not 'image_url'"):
        request.messages[0].plain()


@pytest.mark.parametrize(
    ("form", "fields", "limit"),
    [
        (ChatRequest, {"messages": HELLO}, 100),
        (ChatRequest, {"messages": HELLO, "max_tokens": 5}, 5),
        (ChatRequest, {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 4}, 4),
        (ChatRequest, {"messages": HELLO, "max_tokens": 5000}, 100),
        (CompletionRequest, {"prompt": "a"}, 16),
        (CompletionRequest, {"prompt": "a", "max_tokens": 20}, 20),
    ],
)
def test_the_answer_ends_where_the_client_or_the_context_says(form, fields, limit):
    request = decode(json.dumps({"model": "tiny"} | fields).encode(), form)
    assert request.sampling(room=100).max_tokens == limit


def test_sampling_defaults_are_those_of_openai():
    sampling = decode(chat(), ChatRequest).sampling(10)
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.ignore_eos) == (1.0, 1.0, None, False)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
)
def test_errors_have_the_form_of_openai(status, kind):
    error = ApiError(status, "some_code", "What was wrong.", param="model")
    assert error.body() == {
        "error": {"message": "What was wrong.", "type": kind, "code": "some_code", "param": "model"}
    }


def test_a_chat_answer_is_this_json():
    answer = ChatAnswer("chatcmpl-1", 1_800_000_000, "tiny")
    assert answer.whole("Hi.", "stop", Usage(9, 3)) == {
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
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }


def test_a_stream_of_completions_is_these_bytes():
    answer = CompletionAnswer("cmpl-1", 1, "tiny", with_usage=True)
    events = [answer.chunk("Hi"), answer.chunk(None, "length"), answer.usage_chunk(Usage(1, 1))]
    frame = b'"id":"cmpl-1","object":"text_completion","created":1,"model":"tiny","choices":'
    assert b"".join(protocol.event(each) for each in events) == (
        b"data: {" + frame + b'[{"text":"Hi","index":0,"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        b"data: {" + frame + b'[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n'
        b"data: {" + frame + b'[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\n'
    )


def test_the_load_report_in_both_forms():
    load = Load(running=3, waiting=1, kv_usage=0.123456)
    assert protocol.load_report(load, "json") == (
        'JSON {"named_metrics":{"num_requests_running":3,"num_requests_waiting":1,"kv_cache_usage_perc":0.1235}}'
    )
    assert protocol.load_report(load, "text") == (
        "TEXT named_metrics.num_requests_running=3, named_metrics.num_requests_waiting=1, "
        "named_metrics.kv_cache_usage_perc=0.1235"
    )
