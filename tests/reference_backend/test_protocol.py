"""Requests judged, without a server around them."""

import json

import msgspec
import pytest

from reference_backend import refusals
from reference_backend.engine.request import Sampling
from reference_backend.protocol import ChatRequest, CompletionRequest, decode
from reference_backend.refusals import ApiError
from reference_backend.tools import QWEN

HELLO = [{"role": "user", "content": "Hello"}]
TEXT = {"type": "text", "text": "Hello"}


def chat(**changes):
    return json.dumps({"model": "tiny", "messages": HELLO} | changes).encode()


def parts(*content):
    return chat(messages=[{"role": "user", "content": content}])


def tool(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


BAD_CHATS = [
    (b"", None, "the body is not JSON: Input data was truncated"),
    (b"null", None, "Expected `object`"),
    (b"[]", None, "Expected `object`"),
    (b"{", None, "the body is not JSON: Input data was truncated"),
    (b'{"model": "\xff"}', None, "utf-8"),
    (b'{"model": "\\ud800"}', None, ""),
    (b'{"functions": ' + b"[" * 100_000, None, "recursion"),
    (b'{"model": "tiny", "temperature": NaN}', None, "malformed"),
    (chat(temperature=0).replace(b'"temperature": 0', b'"temperature": 1e999'), "temperature", "out of range"),
    (json.dumps({"messages": HELLO}).encode(), "model", "missing required field `model`"),
    (json.dumps({"model": "tiny"}).encode(), "messages", "missing required field `messages`"),
    (chat(model=7), "model", "Expected `str`"),
    (chat(model=None), "model", "Expected `str`"),
    (chat(messages=[]), "messages", "length >= 1"),
    (chat(messages="Hello"), "messages", "Expected `array`"),
    (chat(messages=HELLO * 1001), "messages", "length <= 1000"),
    (chat(messages=[{"role": "wizard", "content": ""}]), "messages[0].role", "Invalid enum value 'wizard'"),
    (chat(messages=[{"role": "w" * 5000, "content": ""}]), "messages[0].role", "Invalid enum value"),
    (chat(messages=[{"role": "user", "content": [1]}]), "messages[0].content[0]", "Expected `object`"),
    (parts(TEXT, {"type": "text"}), "messages[0].content[1].text", "needs `text`"),
    (parts(TEXT, {"type": "text", "text": None}), "messages[0].content[1].text", "needs `text`"),
    (parts({"type": "text", "image_url": {"url": "data:"}}), "messages[0].content[0].text", "needs `text`"),
    (parts({"text": "Hello"}), "messages[0].content[0].type", "missing required field `type`"),
    (parts(TEXT, {"type": "image_url"}), "messages[0].content[1].image_url", "needs `image_url`"),
    (
        parts({"type": "image_url", "image_url": {}}),
        "messages[0].content[0].image_url.url",
        "missing required field `url`",
    ),
    (chat(messages=[*HELLO, {"role": "user"}]), "messages[1].content", "role user needs `content`"),
    (chat(messages=[{"role": "assistant", "tool_calls": []}]), "messages[0].content", "role assistant needs `content`"),
    (chat(messages=[{"role": "tool", "tool_call_id": "1"}]), "messages[0].content", "role tool needs `content`"),
    (chat(messages=[{"role": "tool", "content": "2"}]), "messages[0].tool_call_id", "role tool needs `tool_call_id`"),
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
    (chat(n=129), "n", "<= 128"),
    (chat(n=2, best_of=3), "best_of", "best_of is not supported beyond n"),
    (chat(best_of=2), "best_of", "best_of is not supported beyond n"),
    (chat(n=0), "n", ">= 1"),
    (chat(stop=""), "stop", "length >= 1"),
    (chat(stop=["a"] * 5), "stop", "length <= 4"),
    (chat(stop=[1]), "stop[0]", "Expected `str`"),
    (chat(seed=2**63), "seed", "<= 9223372036854775807"),
    (chat(seed="x"), "seed", "Expected `int"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "missing required field `function`"),
    (chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type", "Invalid enum value 'custom'"),
    (chat(tools=[tool("a b")]), "tools[0].function.name", "matching regex"),
    (chat(tools=[tool("f"), tool("f")]), "tools", "two tools have the same name"),
    (chat(tools=[tool(f"f{n}") for n in range(129)]), "tools", "length <= 128"),
    (chat(tools=[tool("f", {"type": "string"})]), "tools[0].function.parameters.type", "are an object"),
    (chat(tools=[tool("f", [])]), "tools[0].function.parameters", "Expected `object | null`"),
    (chat(tools=[tool("f")], tool_choice="any"), "tool_choice", "Invalid enum value 'any'"),
    (chat(tools=[tool("f")], tool_choice=tool("g")), "tool_choice", "names 'g', which is not among the tools"),
    (chat(tool_choice="required"), "tool_choice", "tool_choice: required needs tools"),
    (chat(tools=[tool("f")], parallel_tool_calls="no"), "parallel_tool_calls", "Expected `bool | null`"),
    (chat(tools=[tool("f")], ignore_eos=True), "ignore_eos", "does not go with structured output"),
    (chat(functions=[{"name": "f"}]), "functions", "functions is not supported"),
    (chat(logprobs="yes"), "logprobs", "Expected `bool | null`"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "<= 20"),
    (chat(top_logprobs=2), "top_logprobs", "top_logprobs needs logprobs: true"),
    (chat(top_k=-2), "top_k", ">= -1"),
    (chat(top_k=2**40), "top_k", "<= 2147483647"),
    (chat(min_p=1.5), "min_p", "<= 1"),
    (chat(frequency_penalty=2.5), "frequency_penalty", "<= 2"),
    (chat(presence_penalty=-3), "presence_penalty", ">= -2"),
    (chat(repetition_penalty=0), "repetition_penalty", ">= 0.1"),
    (chat(repetition_penalty="NaN"), "repetition_penalty", "Expected `float"),
    (chat(cache_salt=""), "cache_salt", "length >= 1"),
    (chat(echo=True), "echo", "echo is not supported"),
    (chat(logit_bias={"5": 101}), "logit_bias[...]", "<= 100"),
    (chat(logit_bias={"five": 1}), "logit_bias", "Expected `int"),
    (chat(response_format={"type": "xml"}), "response_format.type", "Invalid value 'xml'"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing required field"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "", "schema": {}}}),
        "response_format.json_schema.name",
        "matching regex",
    ),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": True}}),
        "response_format.json_schema.schema",
        "Expected `object`",
    ),
    (chat(tool_choice={"type": "function"}), "tool_choice.function", "missing required field `function`"),
    (chat(modalities=["text", "audio"]), "modalities", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_a_bad_request_names_its_field(body, param, message):
    with pytest.raises(ApiError) as refusal:
        decode(body, ChatRequest)
    error = refusal.value.body()["error"]
    assert (refusal.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert len(error["message"]) <= refusals.LONGEST_SHOWN
    msgspec.json.encode(refusal.value.body())


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None},
        {"tools": []},
        {"logprobs": False},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": None, "top_k": None, "min_p": None},
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
    [plain] = request.turns(sees=False)
    assert (plain.role, plain.content) == ("system", "Hello")


def test_an_image_is_refused_by_name():
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    request = decode(chat(messages=[{"role": "user", "content": content}]), ChatRequest)
    with pytest.raises(ApiError, match="text parts only, not 'image_url'") as refusal:
        request.turns(sees=False)
    assert (refusal.value.param, refusal.value.code) == ("messages[0].content[0].type", "unsupported_content")


def test_a_model_that_sees_gets_tokens_in_the_place_of_a_picture():
    picture = {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}}
    parts = [{"type": "text", "text": "See: "}, picture, {"type": "text", "text": "?"}]
    request = decode(chat(messages=[*HELLO, {"role": "user", "content": parts}]), ChatRequest)
    assert request.turns(sees=True)[1].content == "See: " + "<|image_pad|>" * 16 + "?"
    assert request.pictures() == {"messages[1].content[1].image_url.url": "data:a"}


@pytest.mark.parametrize("part", [{"type": "input_audio"}, {"type": "video_url", "text": "a"}])
def test_what_even_a_model_that_sees_cannot_read_is_refused(part):
    request = decode(parts(part), ChatRequest)
    with pytest.raises(ApiError, match=f"text and image_url parts only, not '{part['type']}'"):
        request.turns(sees=True)


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
    assert request.samplings(100, 9)[0].max_tokens == limit


def test_sampling_defaults_are_those_of_openai():
    assert decode(chat(), ChatRequest).samplings(10, 9) == [Sampling(max_tokens=10)]


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0, "top_p": 0.5, "seed": -1}, {"temperature": 0.0, "top_p": 0.5, "seed": -1}),
        ({"top_k": 5, "min_p": 0.1, "ignore_eos": True}, {"top_k": 5, "min_p": 0.1, "ignore_eos": True}),
        ({"top_k": -1}, {}),
        ({"top_k": 0, "min_p": 0}, {}),
        (
            {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.1},
            {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.1},
        ),
        ({"logit_bias": {"9": -100, "0": 1.5}}, {"bias": ((9, -100.0), (0, 1.5))}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 7}, {"logprobs": 7}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_what_is_asked_reaches_the_sampler(fields, sampling):
    assert decode(chat(**fields), ChatRequest).samplings(10, 9) == [Sampling(max_tokens=10, **sampling)]


def test_choices_have_seeds_of_their_own_and_the_first_that_of_the_client():
    seeds = [sampling.seed for sampling in decode(chat(n=128, seed=2**63 - 1), ChatRequest).samplings(10, 9)]
    assert (seeds[0], len(set(seeds))) == (2**63 - 1, 128)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert [sampling.seed for sampling in decode(chat(n=2), ChatRequest).samplings(10, 9)] == [None, None]


@pytest.mark.parametrize("token", [-1, 10])
def test_a_bias_for_a_token_that_is_not_there_is_refused(token):
    with pytest.raises(ApiError, match=f"{token} is no token of this model; its last is 9"):
        decode(chat(logit_bias={token: 1}), ChatRequest).samplings(10, 9)


def test_earlier_calls_and_their_results_are_plain_for_templates():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    broken = call | {"function": {"name": "f", "arguments": "{a"}}
    sent = [
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    asked, told = msgspec.to_builtins(decode(chat(messages=sent), ChatRequest).turns(sees=False))
    assert asked["content"] == ""
    assert [each["function"]["arguments"] for each in asked["tool_calls"]] == [{"a": [1]}, "{a"]
    assert told == {"role": "tool", "content": "2", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"tools": [tool("f")], "tool_choice": "none"}, None),
        ({"response_format": {"type": "json_object"}}, "start: %json {"),
        ({"tools": [tool("f")]}, "start: TEXT | behind_text call ("),
        ({"tools": [tool("f")], "parallel_tool_calls": False}, "start: TEXT | behind_text call\n"),
        ({"tools": [tool("f")], "tool_choice": "required"}, 'start: "<tool_call>" call ('),
        ({"tools": [tool("f"), tool("g")], "tool_choice": tool("g")}, 'start: "<tool_call>" call\n'),
        ({"tools": [tool("f")], "response_format": {"type": "json_object"}}, 'start: "<tool_call>" call ("\\n<tool_call>" call)* | %json {'),
    ],
)  # fmt: skip
def test_what_is_asked_becomes_a_grammar(fields, start):
    grammar, clauses = decode(chat(**fields), ChatRequest).structure(QWEN)
    assert (grammar is None) is (start is None) is (not clauses)
    assert grammar is None or grammar.startswith(start)
    assert grammar is None or ('"f' in grammar) is ("tools" in fields and fields.get("tool_choice") != tool("g"))


def test_tools_for_a_model_that_knows_none_are_refused():
    with pytest.raises(ApiError, match="takes no tools"):
        decode(chat(tools=[tool("f")]), ChatRequest).structure(None)


@pytest.mark.parametrize(("asked", "alternatives"), [({}, None), ({"logprobs": 0}, 0), ({"logprobs": 5}, 5)])
def test_completions_ask_for_logprobs_by_number(asked, alternatives):
    body = json.dumps({"model": "tiny", "prompt": "a"} | asked).encode()
    assert decode(body, CompletionRequest).samplings(10, 9)[0].logprobs == alternatives
