"""What clients send on the OpenAI paths, decoded and judged.

Nothing here does I/O. A request is decoded once into a struct; whatever is wrong with it becomes an `ApiError` that
names the field. A field that would change the answer and that this server does not know how to honour is refused, not
ignored; fields that it has never heard of are ignored, as OpenAI's own clients expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from reference_backend.answers import Answer, ChatAnswer
from reference_backend.engine.request import PICTURE_TOKENS, Sampling
from reference_backend.refusals import LONGEST_SHOWN, bad
from reference_backend.structured import Clause, ResponseFormat, clause_of
from reference_backend.tokenizer import PICTURE_TOKEN, Message
from reference_backend.tools import MOST_TOOLS, EarlierCall, Form, Tool, call_grammar, schema_of

PICTURE = PICTURE_TOKEN * PICTURE_TOKENS  # what stands for a picture in a text
SEED_STEP = 0x9E3779B97F4A7C15  # the golden ratio of 64 bits: seeds that clients count up do not meet
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# What clients send when they mean the default. Zero stands for False, too.
NEUTRAL: tuple[Any, ...] = (None, 0, "", "none", "auto", [], {}, ["text"], {"type": "text"})

Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ImageUrl(msgspec.Struct):
    url: str


class Part(msgspec.Struct):
    """A piece of a message. Only `text` ones can be read here, and `image_url` by a model that sees."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None

    def __post_init__(self) -> None:
        if self.type in ("text", "image_url") and getattr(self, self.type) is None:
            raise ValueError(f"a part of the type {self.type} needs `{self.type}`")

    @property
    def picture(self) -> str | None:
        """Its URL, if it is a picture."""
        return self.image_url.url if self.type == "image_url" and self.image_url is not None else None


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs `content`")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role tool needs `tool_call_id`")

    @property
    def parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else [Part("text", self.content or "")]

    def plain(self) -> Message:
        """The message as templates know it: one text, with tokens that stand for pictures; no `developer`."""
        return Message(
            "system" if self.role == "developer" else self.role,
            "".join(PICTURE if part.picture is not None else part.text or "" for part in self.parts),
            [call.plain() for call in self.tool_calls or ()],
            self.tool_call_id,
        )


class Unsupported(msgspec.Struct, kw_only=True):
    """Fields that would change the answer, each refused unless it says what is the case anyway."""

    audio: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    suffix: Any = None
    web_search_options: Any = None


class GenerationRequest(Unsupported, kw_only=True):
    """The fields that both endpoints share. Those that OpenAI does not have are named as vLLM names them."""

    unsupported: ClassVar[tuple[str, ...]] = Unsupported.__struct_fields__
    answer: ClassVar[type[Answer]] = Answer
    prompt_field: ClassVar[str]

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None  # 0 and -1: no limit
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.1, le=10)] | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    logit_bias: Annotated[dict[int, Bias], msgspec.Meta(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool = False  # go on to max_tokens, for measurements
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None

    def __post_init__(self) -> None:
        """Raises ApiError for what was asked for and cannot be done."""
        for name in self.unsupported:
            if getattr(self, name) not in NEUTRAL:
                raise bad(f"{name} is not supported by this server", name, "unsupported_parameter")
        if self.best_of not in (None, self.n or 1):
            raise bad("best_of is not supported beyond n", "best_of", "unsupported_parameter")

    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self, room: int, largest_token: int, grammar: str | None = None) -> list[Sampling]:
        """How to generate each choice, given the tokens that the context has room for. Raises ApiError."""
        unknown = next((token for token in self.logit_bias or () if not 0 <= token <= largest_token), None)
        if unknown is not None:
            raise bad(
                f"logit_bias: {unknown} is no token of this model; its last is {largest_token}", param="logit_bias"
            )
        given = {each.name: getattr(self, each.name, None) for each in fields(Sampling)} | {
            "max_tokens": min(self.token_limit() or room, room),
            "top_k": max(self.top_k or 0, 0),
            "logprobs": self.alternatives(),
            "bias": tuple((self.logit_bias or {}).items()),
            "grammar": grammar,
        }
        first = Sampling(**{name: value for name, value in given.items() if value is not None})
        seeds = [self.seed if self.seed is None else _other_seed(self.seed, choice) for choice in range(self.n or 1)]
        return [replace(first, seed=seed) for seed in seeds]

    def alternatives(self) -> int | None:
        """How many alternatives the client wants to be told with each token; None: no logprobs at all."""
        raise NotImplementedError

    def token_limit(self) -> int | None:
        """The longest answer that the client wants; None: what there is room for."""
        return self.max_tokens


class ChatRequest(GenerationRequest, kw_only=True):
    answer = ChatAnswer
    prompt_field = "messages"

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=1000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise bad("two tools have the same name", "tools")
        if self.named is not None and self.named not in names:
            raise bad(f"tool_choice names {self.named[:LONGEST_SHOWN]!r}, which is not among the tools", "tool_choice")
        if self.tool_choice == "required" and not names:
            raise bad("tool_choice: required needs tools", "tool_choice")
        for index, tool in enumerate(self.tools or ()):
            if (tool.function.parameters or {}).get("type", "object") != "object":
                place = f"tools[{index}].function.parameters.type"
                raise bad(f"{place}: the parameters of a function are an object", place)
        if self.ignore_eos and (self.offered() or clause_of(self.response_format)):
            raise bad("ignore_eos does not go with structured output", "ignore_eos")

    @property
    def named(self) -> str | None:
        """The one tool that is to be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else None

    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def turns(self, *, sees: bool) -> list[Message]:
        """The messages as templates know them. Raises ApiError 400 for what the model cannot read."""
        for place, part in self._parts():
            if part.type != "text" and not (sees and part.picture is not None):
                readable = "text and image_url" if sees else "text"
                message = f"this model reads {readable} parts only, not {part.type[:LONGEST_SHOWN]!r}"
                raise bad(message, f"{place}.type", "unsupported_content")
        return [message.plain() for message in self.messages]

    def pictures(self) -> dict[str, str]:
        """URLs of the pictures, by their places."""
        return {f"{place}.image_url.url": part.picture for place, part in self._parts() if part.picture is not None}

    def _parts(self) -> Iterator[tuple[str, Part]]:
        for number, message in enumerate(self.messages):
            for index, part in enumerate(message.parts):
                yield f"messages[{number}].content[{index}]", part

    def structure(self, form: Form | None) -> tuple[str | None, list[Clause]]:
        """The grammar that the answer keeps to, for a model that calls tools in this form, and what it is made of.

        Raises ApiError 400 for what is too deep, or where the model calls no tools.
        """
        content = clause_of(self.response_format)
        clauses = [] if content is None else [content]
        expression = "" if content is None else content.grammar
        if not self.offered():
            return f"start: {expression}" if expression else None, clauses
        if form is None:
            message = "this model's chat template takes no tools, or has them called in a form that is not known here"
            raise bad(message, "tools", "unsupported_parameter")
        called = {
            tool.function.name: Clause(
                f"tools[{index}].function.parameters", schema_of(tool.function), is_strict=bool(tool.function.strict)
            )
            for index, tool in enumerate(self.offered())
            if self.named in (None, tool.function.name)
        }
        grammar = call_grammar(
            form,
            {name: clause.grammar for name, clause in called.items()},
            is_forced=self.tool_choice == "required" or self.named is not None,
            in_parallel=self.parallel_tool_calls is not False and self.named is None,
            content=expression,
        )
        return grammar, [*clauses, *called.values()]

    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest, kw_only=True):
    unsupported = (*Unsupported.__struct_fields__, "response_format", "tool_choice", "tools")
    prompt_field = "prompt"

    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None

    def text(self) -> str:
        """The one prompt, however it was sent."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def alternatives(self) -> int | None:
        return self.logprobs

    def token_limit(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


Request = TypeVar("Request", bound=msgspec.Struct)
# How messages end, those of msgspec and ours: with a field that is missing, and with the place of what is wrong.
_PLACE = re.compile(r"(?:(?:field|needs) `(\w+)`)?(?: - at (?:`key` in )?`\$\.?([^`]*)`)?$")


def decode(body: bytes | memoryview, form: type[Request]) -> Request:
    """Decode and judge a request. Raises ApiError 400, with the field where there is one to name."""
    try:
        return msgspec.json.decode(body, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        missing, place = _PLACE.findall(str(error))[0]
        what = "" if isinstance(error, msgspec.ValidationError) else "the body is not JSON: "
        raise bad(f"{what}{error}"[:LONGEST_SHOWN], ".".join(filter(None, (place, missing))) or None) from error


def _other_seed(seed: int, choice: int) -> int:
    """A seed for each choice, the first of which has the client's own: equal requests have equal answers."""
    return (seed + choice * SEED_STEP + (1 << 63)) % (1 << 64) - (1 << 63)
