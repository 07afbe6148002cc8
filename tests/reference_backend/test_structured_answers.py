"""What OpenAI's own client gets: structured output, tools, several choices, and biased tokens.

The default model has learnt none of it. It writes nonsense, and the grammar makes it well-formed nonsense.
"""

import asyncio
import contextlib
import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
import jsonschema  # noqa: E402
import openai  # noqa: E402
import pydantic  # noqa: E402

from reference_backend.engine import grammar  # noqa: E402
from tests.support.tiny_model import running_api, tiny  # noqa: E402

MESSAGES = [{"role": "user", "content": "What is a KV cache?"}]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "seed": 3}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "enum": [1, 7]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
WRITTEN = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 7}}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


class Place(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    kind: str = pydantic.Field(pattern="^(city|lake)$")
    size: int = pydantic.Field(ge=0, le=99)
    tags: list[bool] = pydantic.Field(max_length=2)


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=10)


@contextlib.asynccontextmanager
async def client():
    async with running_api() as backend:
        async with openai.AsyncOpenAI(base_url=f"{backend.url}/v1", api_key="none", max_retries=0) as made:
            yield made.chat.completions, backend
        await backend.wait_idle()


async def streamed(completions, **asked):
    """What comes of a stream, by choice, and how many chunks brought it."""
    texts, calls, ends, chunks = {}, {}, {}, 0
    async for chunk in await completions.create(stream=True, **asked):
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            for piece in choice.delta.tool_calls or ():
                mine = calls.setdefault(choice.index, [])
                if piece.id:
                    assert (piece.index, piece.type) == (len(mine), "function")
                    mine.append([piece.id, piece.function.name, ""])
                mine[piece.index][2] += piece.function.arguments
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    return texts, calls, ends, chunks


def as_written(backend, monkeypatch, text):
    """Have the model want to write this text, and then end."""
    model, tokenizer = tiny()
    wanted = [*tokenizer.encode(text), *tokenizer.end_tokens]
    logits = model.logits

    def scripted(_self, hidden):
        [sequence] = backend.engine.scheduler.running
        scores = logits(hidden)
        scores[0, wanted[len(sequence.generated)]] = 1e4
        return scores

    monkeypatch.setattr(type(model), "logits", scripted)


async def test_an_answer_is_parsed_into_what_was_asked_for():
    async with client() as (completions, _):
        answer = await completions.parse(response_format=Place, **ASKED)
    [choice] = answer.choices
    assert isinstance(choice.message.parsed, Place)
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens > 10


async def test_the_client_puts_a_stream_together_by_itself():
    """Its helper insists that each event goes on from the one before."""
    tool = openai.pydantic_function_tool(Weather)
    async with client() as (completions, _):
        async with completions.stream(response_format=Place, logprobs=True, **ASKED) as stream:
            kinds = [event.type async for event in stream]
            parsed = (await stream.get_final_completion()).choices[0].message.parsed
        async with completions.stream(tools=[tool], tool_choice="required", **ASKED) as stream:
            kinds += [event.type async for event in stream]
            [call] = (await stream.get_final_completion()).choices[0].message.tool_calls
    assert isinstance(parsed, Place)
    assert isinstance(call.function.parsed_arguments, Weather)
    assert {"content.done", "logprobs.content.done", "tool_calls.function.arguments.done"} < set(kinds)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 3, "maxItems": 4}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"oneOf": [{"const": {"a": 1}}, {"enum": ["b", "c"]}], "not": {"const": 5}}}},
    ],
    ids=["strict", "lenient"],
)  # fmt: skip
async def test_whole_and_streamed_answers_are_json_that_keeps_to_the_schema(wanted):
    asked = ASKED | {"response_format": wanted}
    async with client() as (completions, _):
        [choice] = (await completions.create(**asked)).choices
        texts, _, ends, chunks = await streamed(completions, **asked)
    assert (texts, ends) == ({0: choice.message.content}, {0: choice.finish_reason})
    assert (choice.finish_reason, chunks > 3) == ("stop", True)
    jsonschema.validate(json.loads(choice.message.content), wanted["json_schema"]["schema"])


async def test_json_mode_is_any_object_and_over_with_it(monkeypatch):
    """What the model would say behind it is not asked for, not even the end token."""
    async with client() as (completions, backend):
        as_written(backend, monkeypatch, '{"a": [1, {"b": null}]}, and so on')
        answer = await completions.create(response_format={"type": "json_object"}, temperature=0, **ASKED)
    assert answer.choices[0].message.content == '{"a": [1, {"b": null}]}'
    assert answer.choices[0].finish_reason == "stop"


async def test_a_grammar_that_is_not_finished_in_time_ends_with_length():
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 1000}}}
    async with client() as (completions, _):
        [choice] = (await completions.create(**ASKED | {"response_format": wanted, "max_tokens": 9})).choices
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith('"')


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"type": "strnig"}}}}},
            "response_format.json_schema.schema.items",
            "Invalid type: strnig",
        ),
        (
            {"tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "("}}}}}]},
            "tools[1].function.parameters.properties.a",
            "regex parse error",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
            "Unimplemented keys",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not among"),
        ({"logit_bias": {"1024": 1}}, "logit_bias", "no token of this model"),
        ({"n": 9}, "n", "n is 9, and this backend takes 8 requests at a time"),
    ],
    ids=range(6),
)  # fmt: skip
async def test_what_cannot_be_kept_to_is_refused_with_its_place(fields, param, message):
    async with client() as (completions, _):
        with pytest.raises(openai.BadRequestError, match=message) as refusal:
            await completions.create(**ASKED | fields)
    assert refusal.value.param == param


async def test_a_schema_that_turns_out_to_be_too_much_ends_its_request_alone(monkeypatch):
    monkeypatch.setattr(grammar, "FIRST_SECONDS", 1e-9)
    monkeypatch.setattr(grammar, "SECONDS_PER_TOKEN", 0.0)
    async with client() as (completions, _):
        with pytest.raises(openai.BadRequestError) as refusal:
            await completions.create(response_format={"type": "json_object"}, **ASKED)
        assert (await completions.create(**ASKED)).choices[0].message.content
    assert refusal.value.code == "schema_too_complex"


async def test_a_tool_is_called_and_told_of_its_result():
    asked = ASKED | {"tools": [NOW, WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    async with client() as (completions, _):
        [choice] = (await completions.create(**asked)).choices
        [call] = choice.message.tool_calls
        told = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
        after = await completions.create(
            **asked | {"messages": [*MESSAGES, choice.message, told], "tool_choice": "none", "max_tokens": 5}
        )
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert after.choices[0].message.tool_calls is None
    assert after.choices[0].message.content


async def test_required_calls_are_streamed_as_they_are_told_whole():
    asked = ASKED | {"tools": [NOW, WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    async with client() as (completions, _):
        [choice] = (await completions.create(**asked)).choices
        texts, calls, ends, _ = await streamed(completions, **asked)
    [whole], [[_, name, arguments]] = choice.message.tool_calls, calls[0]
    assert (name, arguments) == (whole.function.name, whole.function.arguments)
    assert (texts, ends) == ({0: ""}, {0: "tool_calls"})
    json.loads(arguments)


async def test_a_model_that_wants_to_calls_behind_its_text(monkeypatch):
    asked = ASKED | {"tools": [NOW, WEATHER], "temperature": 0}
    async with client() as (completions, backend):
        as_written(backend, monkeypatch, WRITTEN)
        [choice] = (await completions.create(**asked)).choices
        await backend.wait_idle()
        texts, calls, ends, chunks = await streamed(completions, **asked)
    found = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls]
    assert found == [("weather", '{"city": "Rome", "days": 7}'), ("now", "{}")]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.\n", "tool_calls")
    assert (texts, ends) == ({0: "Let me see.\n"}, {0: "tool_calls"})
    assert [tuple(each[1:]) for each in calls[0]] == found
    assert len({each[0] for each in calls[0]} | {each.id for each in choice.message.tool_calls}) == 4
    assert chunks > 10


async def test_a_model_that_wants_no_tool_just_answers(monkeypatch):
    async with client() as (completions, backend):
        as_written(backend, monkeypatch, "It is <hot>.")
        [choice] = (await completions.create(tools=[NOW], temperature=0, **ASKED)).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is <hot>.", None, "stop")


async def test_several_choices_are_drawn_alike_whole_and_streamed():
    asked = ASKED | {"n": 3, "temperature": 2, "max_tokens": 40}
    async with client() as (completions, _):
        whole = await completions.create(**asked)
        texts, _, ends, _ = await streamed(completions, **asked)
        alone = await completions.create(**asked | {"n": 1})
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(set(texts.values())) == 3
    assert alone.choices[0].message.content == texts[0]
    assert whole.usage.completion_tokens > 2 * alone.usage.completion_tokens
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens


async def test_a_stop_string_ends_one_choice_and_not_the_others():
    asked = ASKED | {"n": 2, "temperature": 2, "max_tokens": 30, "ignore_eos": True}
    async with client() as (completions, _):
        extra = {"extra_body": {"ignore_eos": asked.pop("ignore_eos")}}
        whole = await completions.create(**asked, **extra)
        first, second = (choice.message.content for choice in whole.choices)
        stop = next(first[at : at + 4] for at in range(len(first)) if first[at : at + 4] not in second)
        cut = await completions.create(stop=stop, **asked, **extra)
    assert [choice.message.content for choice in cut.choices] == [first.split(stop)[0], second]
    assert [choice.finish_reason for choice in cut.choices] == ["stop", "length"]
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


async def test_choices_that_do_not_all_find_room_are_refused_together():
    async with running_api(start=False, slots=1, max_waiting=2) as backend:
        async with openai.AsyncOpenAI(base_url=f"{backend.url}/v1", api_key="none", max_retries=0) as made:
            waiting = asyncio.ensure_future(made.chat.completions.create(n=2, **ASKED))
            await backend.wait_load(lambda load: load.waiting == 2)
            with pytest.raises(openai.RateLimitError):
                await made.chat.completions.create(n=2, **ASKED)
            assert backend.language.load().waiting == 2
            waiting.cancel()
            await backend.wait_load(lambda load: load.waiting == 0)


async def test_a_bias_forbids_and_favours():
    tokenizer = tiny()[1]
    [favoured], [first, *_] = tokenizer.encode("a"), tokenizer.encode("A KV cache")
    async with client() as (completions, _):
        asked = ASKED | {"temperature": 0, "max_tokens": 4}
        plain = (await completions.create(**asked)).choices[0].message.content
        without = (await completions.create(logit_bias={str(first): -100}, **asked)).choices[0].message.content
        only = (await completions.create(logit_bias={str(favoured): 100}, **asked)).choices[0].message.content
    assert plain.startswith("A")
    assert not without.startswith(tokenizer.name(first))
    assert only == "aaaa"
