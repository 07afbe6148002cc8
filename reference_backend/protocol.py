"""What clients send and get on the OpenAI paths: requests decoded and judged, answers and errors encoded.

Nothing here does I/O. A request is decoded once into a struct; whatever is wrong with it becomes an `ApiError` that
names the field. A field that would change the answer and that this server does not know how to honour is refused, not
ignored; fields that it has never heard of are ignored, as OpenAI's own clients expect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec

from reference_backend.engine.request import PICTURE_TOKENS, Finish, Sampling
from reference_backend.structured import Clause, ResponseFormat, clause_of, composed
from reference_backend.tokenizer import PICTURE_TOKEN, UNFINISHED, Message
from reference_backend.tools import MOST_TOOLS, CallPiece, EarlierCall, Form, Tool, ToolNamed, call_grammar, schema_of

LONGEST_SHOWN = 200  # characters of a client's own text in a message of ours
PICTURE = PICTURE_TOKEN * PICTURE_TOKENS  # what stands for a picture in a text
SEED_STEP = 0x9E3779B97F4A7C15  # the golden ratio of 64 bits: seeds that clients count up do not meet
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# What clients send when they mean the default. Zero stands for False, too.
NEUTRAL: tuple[Any, ...] = (None, 0, "", "none", "auto", [], {}, ["text"], {"type": "text"})

Json = dict[str, Any]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class ApiError(Exception):
    """An answer in the error form of the OpenAI API. `headers` go out with it."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers or {}

    def body(self) -> Json:
        """The error as the client reads it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def not_started(status: int, code: str, message: str) -> ApiError:
    """A refusal before any work: whoever balances over several backends may send the request to another one."""
    return ApiError(status, code, message, headers={"retry-after": "1", "x-backend-not-started": "true"})


def loading() -> ApiError:
    return not_started(503, "loading", "this backend's model is being loaded")


def draining() -> ApiError:
    """The connection is closed, too, so that a client's next request finds another backend."""
    refusal = not_started(503, "draining", "this backend is ending and takes no new requests")
    refusal.headers |= {"x-draining": "true", "connection": "close"}
    return refusal


def worker_lost() -> ApiError:
    """No byte has gone out, and whatever was computed is gone: another backend may have the request."""
    return not_started(503, "engine_restarted", "the model's process ended while it worked on this request")


def engine_failed() -> ApiError:
    return ApiError(500, "engine_failed", "the model failed while it worked on this request")


def grammar_failed() -> ApiError:
    message = "the schema led to more work for each token than this server gives to one request; make it simpler"
    return ApiError(400, "schema_too_complex", message)


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ImageUrl(msgspec.Struct):
    url: str


class Part(msgspec.Struct):
    """A piece of a message. Only `text` ones can be read here, and `image_url` by a model that sees."""

    type: str
    text: str = ""
    image_url: ImageUrl | None = None

    @property
    def picture(self) -> str | None:
        """Its URL, if it is a picture."""
        return self.image_url.url if self.type == "image_url" and self.image_url is not None else None


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None

    def plain(self, *, sees: bool) -> Message:
        """The message as templates know it: one text, and `developer` under its older name.

        Where a picture is, tokens that stand for it. Raises ApiError 400 for what the model cannot read.
        """
        role = "system" if self.role == "developer" else self.role
        if self.content is None and not (role == "assistant" and self.tool_calls):
            raise ApiError(400, "bad_request", f"a message of the role {self.role} needs content", param="messages")
        calls = tuple(each.plain() for each in self.tool_calls or ())
        if self.content is None or isinstance(self.content, str):
            return Message(role, self.content or "", calls, self.tool_call_id)
        readable = {True: "text and image_url", False: "text"}[sees]
        for part in self.content:
            if part.type != "text" and not (sees and part.picture is not None):
                message = f"this model reads {readable} parts only, not {part.type[:LONGEST_SHOWN]!r}"
                raise ApiError(400, "unsupported_content", message, param="messages")
        text = "".join(PICTURE if part.picture is not None else part.text for part in self.content)
        return Message(role, text, calls, self.tool_call_id)

    def pictures(self) -> list[str]:
        """URLs of the pictures in it."""
        if self.content is None or isinstance(self.content, str):
            return []
        return [part.picture for part in self.content if part.picture is not None]


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

    def check_supported(self) -> None:
        """Raise ApiError for what was asked for and cannot be done."""
        for name in self.unsupported:
            if getattr(self, name) not in NEUTRAL:
                raise ApiError(400, "unsupported_parameter", f"{name} is not supported by this server", param=name)
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "unsupported_parameter", "best_of is not supported beyond n", param="best_of")

    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self, room: int, largest_token: int, grammar: str | None = None) -> list[Sampling]:
        """How to generate each choice, given the tokens that the context has room for. Raises ApiError."""
        unknown = next((token for token in self.logit_bias or () if not 0 <= token <= largest_token), None)
        if unknown is not None:
            message = f"logit_bias: {unknown} is no token of this model; its last is {largest_token}"
            raise ApiError(400, "bad_request", message, param="logit_bias")
        first = self._sampling(room, grammar)
        seeds = [self.seed if self.seed is None else _other_seed(self.seed, choice) for choice in range(self.n or 1)]
        return [replace(first, seed=seed) for seed in seeds]

    def _sampling(self, room: int, grammar: str | None) -> Sampling:
        return Sampling(
            max_tokens=min(self.token_limit() or room, room),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
            logprobs=self.alternatives(),
            ignore_eos=self.ignore_eos,
            bias=tuple((self.logit_bias or {}).items()),
            grammar=grammar,
        )

    def alternatives(self) -> int | None:
        """How many alternatives the client wants to be told with each token; None: no logprobs at all."""
        raise NotImplementedError

    def token_limit(self) -> int | None:
        """The longest answer that the client wants; None: what there is room for."""
        return self.max_tokens


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=1000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolNamed | None = None
    parallel_tool_calls: bool | None = None

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "bad_request", "top_logprobs needs logprobs: true", param="top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ApiError(400, "bad_request", "two tools have the same name", param="tools")
        chosen = self.tool_choice
        if isinstance(chosen, ToolNamed) and chosen.function.name not in names:
            message = f"tool_choice names {chosen.function.name[:LONGEST_SHOWN]!r}, which is not among the tools"
            raise ApiError(400, "bad_request", message, param="tool_choice")
        if chosen == "required" and not names:
            raise ApiError(400, "bad_request", "tool_choice: required needs tools", param="tool_choice")
        for index, tool in enumerate(self.tools or ()):
            if (tool.function.parameters or {}).get("type", "object") != "object":
                place = f"tools[{index}].function.parameters.type"
                raise ApiError(400, "bad_request", f"{place}: the parameters of a function are an object", param=place)
        if self.ignore_eos and (self.offered() or clause_of(self.response_format)):
            raise ApiError(400, "bad_request", "ignore_eos does not go with structured output", param="ignore_eos")

    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def structure(self, form: Form | None) -> tuple[str | None, list[Clause]]:
        """The grammar that the answer keeps to, for a model that calls tools in this form, and what it is made of.

        Raises Unfit for what is too long or too deep, ApiError where the model calls no tools.
        """
        content = clause_of(self.response_format)
        clauses = [] if content is None else [content]
        if not self.offered():
            return (composed(lambda: f"start: {content.grammar}", content.place) if content else None), clauses
        if form is None:
            message = "this model's chat template takes no tools, or has them called in a form that is not known here"
            raise ApiError(400, "unsupported_parameter", message, param="tools")
        chosen = self.tool_choice
        called = {
            f"tools[{index}].function.parameters": tool.function
            for index, tool in enumerate(self.offered())
            if not isinstance(chosen, ToolNamed) or tool.function.name == chosen.function.name
        }
        clauses += [Clause(place, schema_of(each), is_strict=bool(each.strict)) for place, each in called.items()]

        def build() -> str:
            return call_grammar(
                form,
                list(called.values()),
                is_forced=chosen == "required" or isinstance(chosen, ToolNamed),
                in_parallel=self.parallel_tool_calls is not False and not isinstance(chosen, ToolNamed),
                content="" if content is None else content.grammar,
            )

        return composed(build, "tools"), clauses

    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest, kw_only=True):
    unsupported = (*Unsupported.__struct_fields__, "response_format", "tool_choice", "tools")

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


class Judged(Protocol):
    """What a body is decoded into."""

    def check_supported(self) -> None: ...


Request = TypeVar("Request", bound=Judged)
_FIELD = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$|missing required field `(\w+)`$")


def decode(body: bytes, form: type[Request]) -> Request:
    """Decode and judge a request. Raises ApiError 400, with the field where there is one to name."""
    try:
        request = msgspec.json.decode(body, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = str(error)
        place = _FIELD.search(what)
        param = (place[1] or place[2]) if place else None
        raise ApiError(400, "bad_request", what[:LONGEST_SHOWN], param=param) from error
    request.check_supported()
    return request


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, that did not have to be computed

    def as_json(self) -> Json:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token as text, its logprob, and those of the likeliest tokens in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


Told = list[TokenLogprob] | None


@dataclass(slots=True)
class Choice:
    """One answer, as it grows."""

    text: str = ""
    finish: str | None = None
    logprobs: Told = None
    calls: list[Json] = field(default_factory=list)

    def add(self, text: str, finish: str | None, logprobs: Told, calls: list[CallPiece]) -> None:
        """Take a piece."""
        self.text, self.finish = self.text + text, finish
        if logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *logprobs]
        for piece in calls:
            if piece.id is not None:
                called = {"name": piece.name, "arguments": ""}
                self.calls.append({"id": piece.id, "type": "function", "function": called})
            self.calls[-1]["function"]["arguments"] += piece.arguments


@dataclass(frozen=True, slots=True)
class Answer:
    """The frame of one answer; its two kinds fill in the choice."""

    whole_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]
    prompt_field: ClassVar[str]

    id: str
    created: int
    model: str
    with_usage: bool = field(default=False)  # chunks carry `usage`: null, until the last one

    def whole(self, choices: list[Choice], usage: Usage) -> Json:
        """The complete answer as one object."""
        told = [self._choice(each) | self._ending(n, each.finish, each.logprobs) for n, each in enumerate(choices)]
        return self._frame(self.whole_name, told) | {"usage": usage.as_json()}

    def chunk(
        self,
        index: int,
        text: str | None,
        finish: str | None = None,
        logprobs: Told = None,
        calls: list[CallPiece] | None = None,
    ) -> Json:
        """One event of a stream, for one choice. No text, with a finish, is the last one of that choice."""
        delta = self._delta(text, calls or []) | self._ending(index, finish, logprobs)
        return self._frame(self.chunk_name, [delta]) | ({"usage": None} if self.with_usage else {})

    def usage_chunk(self, usage: Usage) -> Json:
        """The event that closes a stream when the client asked for usage."""
        return self._frame(self.chunk_name, []) | {"usage": usage.as_json()}

    def opening(self, choices: int) -> list[Json]:
        """Events that precede the text."""
        del choices
        return []

    def _frame(self, name: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _ending(self, index: int, finish: str | None, logprobs: Told = None) -> Json:
        told = None if logprobs is None else self._logprobs(logprobs)
        return {"index": index, "logprobs": told, "finish_reason": finish}

    def _choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def _delta(self, text: str | None, calls: list[CallPiece]) -> Json:
        raise NotImplementedError

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        raise NotImplementedError


class ChatAnswer(Answer):
    __slots__ = ()
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    def opening(self, choices: int) -> list[Json]:
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self.chunk(n, None) | {"choices": [role | self._ending(n, None)]} for n in range(choices)]

    def _choice(self, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {"message": message}

    def _delta(self, text: str | None, calls: list[CallPiece]) -> Json:
        delta: Json = {"content": text} if text or (text is not None and not calls) else {}
        return {"delta": delta | ({"tool_calls": [_call(each) for each in calls]} if calls else {})}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        content = [
            _token(each.text, each.logprob) | {"top_logprobs": [_token(text, value) for text, value in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    __slots__ = ()
    whole_name = chunk_name = "text_completion"
    id_prefix = "cmpl"
    prompt_field = "prompt"

    def _choice(self, choice: Choice) -> Json:
        return {"text": choice.text}

    def _delta(self, text: str | None, calls: list[CallPiece]) -> Json:
        del calls  # there are none on this path
        return {"text": text or ""}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        return {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [dict(each.top) for each in logprobs],
        }


def _token(text: str, logprob: float) -> Json:
    """A token that is no whole text by itself has no bytes to tell."""
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


def _call(piece: CallPiece) -> Json:
    """A piece of a call: what it is with the first one, and more of its arguments with the others."""
    function: Json = {"arguments": piece.arguments}
    if piece.id is None:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name} | function}


def _other_seed(seed: int, choice: int) -> int:
    """A seed for each choice, the first of which has the client's own: equal requests have equal answers."""
    return (seed + choice * SEED_STEP + (1 << 63)) % (1 << 64) - (1 << 63)


def finish_reason(finish: Finish, *, has_called: bool = False) -> str:
    """OpenAI's word for it. An answer that its deadline cut short reads like one that its length cut short."""
    if finish != "stop":
        return "length"
    return "tool_calls" if has_called else "stop"


def builtins(tools: list[Tool]) -> list[Json] | None:
    """The tools as chat templates know them: None where there are none."""
    return [msgspec.to_builtins(tool) for tool in tools] or None


def event(content: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"
