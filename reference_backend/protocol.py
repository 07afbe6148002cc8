"""What clients send and get on the OpenAI paths: requests decoded and judged, answers and errors encoded.

Nothing here does I/O. A request is decoded once into a struct; whatever is wrong with it becomes an `ApiError` that
names the field. A field that would change the answer and that this server does not know how to honour is refused, not
ignored; fields that it has never heard of are ignored, as OpenAI's own clients expect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec

from reference_backend.engine.request import PICTURE_TOKENS, Finish, Sampling
from reference_backend.tokenizer import PICTURE_TOKEN, UNFINISHED, Message

LONGEST_SHOWN = 200  # characters of a client's own text in a message of ours
PICTURE = PICTURE_TOKEN * PICTURE_TOKENS  # what stands for a picture in a text
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# What clients send when they mean the default. Zero stands for False, too.
NEUTRAL: tuple[Any, ...] = (None, 0, "", "none", "auto", [], {}, ["text"], {"type": "text"})

Json = dict[str, Any]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
One = Annotated[int, msgspec.Meta(ge=1, le=1)]
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
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self, *, sees: bool) -> Message:
        """The message as templates know it: one text, and `developer` under its older name.

        Where a picture is, tokens that stand for it. Raises ApiError 400 for what the model cannot read.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        readable = {True: "text and image_url", False: "text"}[sees]
        for part in self.content:
            if part.type != "text" and not (sees and part.picture is not None):
                message = f"this model reads {readable} parts only, not {part.type[:LONGEST_SHOWN]!r}"
                raise ApiError(400, "unsupported_content", message, param="messages")
        return Message(role, "".join(PICTURE if part.picture is not None else part.text for part in self.content))

    def pictures(self) -> list[str]:
        """URLs of the pictures in it."""
        if isinstance(self.content, str):
            return []
        return [part.picture for part in self.content if part.picture is not None]


class Unsupported(msgspec.Struct, kw_only=True):
    """Fields that would change the answer, each refused unless it says what is the case anyway."""

    echo: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    modalities: Any = None
    response_format: Any = None
    suffix: Any = None
    tool_choice: Any = None
    tools: Any = None


class GenerationRequest(Unsupported, kw_only=True):
    """The fields that both endpoints share. Those that OpenAI does not have are named as vLLM names them."""

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
    n: One | None = None
    best_of: One | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool = False  # go on to max_tokens, for measurements
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None

    def check_supported(self) -> None:
        """Raise ApiError for what was asked for and cannot be done."""
        for name in Unsupported.__struct_fields__:
            if getattr(self, name) not in NEUTRAL:
                raise ApiError(400, "unsupported_parameter", f"{name} is not supported by this server", param=name)

    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, room: int) -> Sampling:
        """How to generate, given the tokens that the context has room for."""
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

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "bad_request", "top_logprobs needs logprobs: true", param="top_logprobs")

    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest, kw_only=True):
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
_FIELD = re.compile(r" - at `\$\.?([^`]*)`$|missing required field `(\w+)`$")


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

    def whole(self, text: str, finish: str, usage: Usage, logprobs: Told = None) -> Json:
        """The complete answer as one object."""
        frame = self._frame(self.whole_name, [self._choice(text) | self._ending(finish, logprobs)])
        return frame | {"usage": usage.as_json()}

    def chunk(self, text: str | None, finish: str | None = None, logprobs: Told = None) -> Json:
        """One event of a stream. No text, with a finish, is the last one that has a choice."""
        frame = self._frame(self.chunk_name, [self._delta(text) | self._ending(finish, logprobs)])
        return frame | ({"usage": None} if self.with_usage else {})

    def usage_chunk(self, usage: Usage) -> Json:
        """The event that closes a stream when the client asked for usage."""
        return self._frame(self.chunk_name, []) | {"usage": usage.as_json()}

    def opening(self) -> list[Json]:
        """Events that precede the text."""
        return []

    def _frame(self, name: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _ending(self, finish: str | None, logprobs: Told = None) -> Json:
        told = None if logprobs is None else self._logprobs(logprobs)
        return {"index": 0, "logprobs": told, "finish_reason": finish}

    def _choice(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str | None) -> Json:
        raise NotImplementedError

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        raise NotImplementedError


class ChatAnswer(Answer):
    __slots__ = ()
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    def opening(self) -> list[Json]:
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self.chunk(None) | {"choices": [role | self._ending(None)]}]

    def _choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

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

    def _choice(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str | None) -> Json:
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


def finish_reason(finish: Finish) -> str:
    """OpenAI's word for it. An answer that its deadline cut short reads like one that its length cut short."""
    return "stop" if finish == "stop" else "length"


def event(content: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"
