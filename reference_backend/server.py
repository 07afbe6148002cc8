"""The HTTP side: from a request to an answer, whole or streamed.

Invariants:
- A generation is held by a `with` from admission to the last byte. Whatever ends the request, the client going away
  included, aborts the sequence.
- The head of a stream goes out with the first token, so that everything that can be refused still has a status. What
  fails later ends with an error event, no `[DONE]`, and a connection that is cut.
- Every answer of the API is JSON in OpenAI's form; no input leads to a traceback.

A backend is READY => DRAINING (told to end: unhealthy, but still taking what was sent before the news got around)
=> CLOSED (new work is refused, old work is finished).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self
from uuid import uuid4

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from reference_backend import protocol
from reference_backend.engine.request import Delta, Finish, Logprobs, Priority, Sampling
from reference_backend.load_report import PATH as LOAD_PATH
from reference_backend.load_report import LoadReport, Reporter, metrics_page
from reference_backend.protocol import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    GenerationRequest,
    Request,
    TokenLogprob,
    Usage,
)
from reference_backend.tokenizer import TemplateRefused, TextStream, Tokenizer
from reference_backend.worker import Worker, WorkerAway, WorkerBusy

LARGEST_BODY = 4 * 1024 * 1024
BODY_SECONDS = 30.0
DEADLINE_HEADER = "x-weir-deadline-ms"  # what is left of the client's time
CONSUMER_HEADER = "x-weir-consumer"  # who shares this backend fairly with others
PRIORITY_HEADER = "x-weir-priority"
USAGE = web.RequestKey("usage", Usage)  # what a request has used, for whoever wraps the handler
log = logging.getLogger(__name__)


class Phase(Enum):
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class GenerationError(Exception):
    """There will be no more tokens, and no proper end. Carries what to tell a client who has seen none yet."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Generation:
    """One request at the worker: a `with` around `next`, which gives its tokens in order."""

    def __init__(self, worker: Worker, reporter: Reporter, prompt: list[int], sampling: Sampling, asked: Asked) -> None:
        self._worker, self._reporter = worker, reporter
        self._arrived: asyncio.Queue[Delta] = asyncio.Queue()
        self._prompt, self._sampling, self._asked = prompt, sampling, asked
        self._ticket = 0
        self._began, self._first_at, self._tokens = worker.clock(), 0.0, 0

    def __enter__(self) -> Self:
        """Raises ApiError 429 when the worker is full, 503 when there is none."""
        try:
            self._ticket = self._worker.submit(
                self._prompt,
                self._sampling,
                self._arrived.put_nowait,
                deadline=self._asked.deadline,
                priority=self._asked.priority,
                tenant=self._asked.tenant,
                salt=self._asked.salt,
            )
        except WorkerBusy as error:
            self._reporter.rejects += 1
            raise protocol.not_started(429, "queue_full", "this backend has no room for another request now") from error
        except WorkerAway as error:
            raise protocol.loading() from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.abort(self._ticket)
        if self._tokens:
            self._reporter.answered(self._first_at - self._began, self._worker.clock() - self._began, self._tokens)

    async def next(self) -> Delta:
        """Wait for the next token or the end. Raises GenerationError."""
        delta = await self._arrived.get()
        if delta.finish == "failed":
            raise GenerationError(protocol.engine_failed())
        if delta.finish == "lost":
            raise GenerationError(protocol.worker_lost())
        self._tokens += 1
        if self._tokens == 1:
            self._first_at = self._worker.clock()
        return delta


@dataclass(frozen=True, slots=True)
class Asked:
    """What stands beside a request: until when it is wanted, how urgently, by whom, and with whom it may share."""

    deadline: float | None
    priority: Priority
    tenant: str
    salt: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to be sent on, the end if this is it, and of which tokens it is, where the client wants to know."""

    text: str
    finish: Finish | None
    logprobs: list[TokenLogprob] | None


class Reader:
    """A generation as text: detokenised, cut at the stop strings, counted."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stops)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    async def next(self) -> Piece:
        """The next text that is certain. A piece with a finish is the last."""
        told: list[TokenLogprob] | None = None
        while True:
            delta = await self._generation.next()
            self._completion_tokens += delta.finish != "deadline"
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
            text = "" if delta.token is None else self._text.feed(delta.token)
            if delta.token is not None and delta.logprobs is not None:
                told = [*(told or []), self._told(delta.token, delta.logprobs)]
            if delta.finish is not None and not self._text.is_stopped:
                text += self._text.finish()
            finish = "stop" if self._text.is_stopped else delta.finish
            if text or finish is not None:
                return Piece(text, finish, told)

    def _told(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        top = [(self._tokenizer.name(other), value) for other, value in logprobs.top]
        return TokenLogprob(self._tokenizer.name(token), logprobs.chosen, top)


class InFlight:
    """How many requests are being answered, and a way to wait until none is."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self._idle.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()


class Api:
    """The handlers of one served model."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, *, model: str, wall: Callable[[], float]) -> None:
        self.model = model
        self.phase = Phase.READY
        self.in_flight = InFlight()
        self.reporter = Reporter(worker, wall, lambda: self.phase is not Phase.READY)
        self._worker = worker
        self._tokenizer = tokenizer
        self._wall = wall
        self._started_at = int(wall())

    def application(self, *middlewares: Middleware) -> web.Application:
        """All paths. `middlewares` stand outside of everything, and see every answer."""
        app = web.Application(middlewares=[*middlewares, self._rescue], client_max_size=LARGEST_BODY)
        app.on_response_prepare.append(self._report_load)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get(LOAD_PATH, self.reporter.stream)
        app.router.add_get("/v2/health/live", self._live)
        app.router.add_get("/v2/health/ready", self._ready)
        return app

    @web.middleware
    async def _rescue(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever went wrong before the head went out, as an answer."""
        try:
            return await handler(request)
        except ApiError as error:
            return _refusal(error)
        except GenerationError as error:
            return _refusal(error.refusal)
        except web.HTTPException as error:
            return _refusal(_refused_by_router(error.status))
        except Exception:  # a bug of ours: the client learns that, the log learns which
            log.exception("internal error")
            return _refusal(ApiError(500, "internal_error", "internal error"))

    async def _report_load(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self.reporter.in_band(request))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        with self.in_flight:
            body = await self._read(request, ChatRequest)
            messages = [message.plain() for message in body.messages]
            self._check_length(sum(len(message.content) for message in messages), "messages")
            try:
                prompt = await asyncio.to_thread(self._tokenizer.encode_chat, messages)
            except TemplateRefused as error:
                raise ApiError(400, "bad_request", str(error), param="messages") from error
            return await self._answer(request, body, prompt, ChatAnswer)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        with self.in_flight:
            body = await self._read(request, CompletionRequest)
            self._check_length(len(body.text()), "prompt")
            prompt = await asyncio.to_thread(self._tokenizer.encode, body.text())
            if not prompt:
                raise ApiError(400, "bad_request", "the prompt is empty", param="prompt")
            return await self._answer(request, body, prompt, CompletionAnswer)

    async def _read(self, request: web.Request, form: type[Request]) -> Request:
        """The request's body, decoded, for the model that is served here."""
        if self.phase is Phase.CLOSED:
            raise protocol.not_started(503, "draining", "this backend is ending and takes no new requests")
        if not self._worker.is_ready:
            raise protocol.loading()
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "unsupported_encoding", "compressed request bodies are not supported")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                content = await request.read()
        except TimeoutError as error:
            raise ApiError(408, "client_timeout", "the request's body came too slowly") from error
        body = protocol.decode(content, form)
        self._check_model(body.model)
        return body

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"model {name[: protocol.LONGEST_SHOWN]!r} is not served here; {self.model!r} is"
            raise ApiError(404, "model_not_found", message, param="model")

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse what cannot fit whatever its tokens are: to find those out can take seconds."""
        if self._tokenizer.is_hopeless(characters, self._worker.context):
            message = f"{characters} characters are more than a context of {self._worker.context} tokens holds"
            raise ApiError(400, "context_length_exceeded", message, param=param)

    async def _answer(
        self, request: web.Request, body: GenerationRequest, prompt: list[int], kind: type[Answer]
    ) -> web.StreamResponse:
        room = self._worker.context - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, the context has room for {self._worker.context - 1}"
            raise ApiError(400, "context_length_exceeded", message, param=kind.prompt_field)
        answer = kind(f"{kind.id_prefix}-{uuid4().hex}", int(self._wall()), self.model, body.wants_usage())
        asked = Asked(
            self._deadline(request),
            _priority(request),
            request.headers.get(CONSUMER_HEADER, ""),
            (body.cache_salt or "").encode(),
        )
        with Generation(self._worker, self.reporter, prompt, body.sampling(room), asked) as generation:
            reader = Reader(generation, self._tokenizer, body.stops(), len(prompt))
            try:
                return await (self._stream if body.stream else self._whole)(request, answer, reader)
            finally:
                request[USAGE] = reader.usage

    def _deadline(self, request: web.Request) -> float | None:
        """When the answer will be of no use any more, on the worker's clock."""
        left = request.headers.get(DEADLINE_HEADER)
        if left is None:
            return None
        if not (left.isascii() and left.isdigit() and len(left) < 12):
            raise ApiError(400, "bad_request", f"{DEADLINE_HEADER} is not a number of milliseconds")
        return self._worker.clock() + int(left) / 1000

    async def _whole(self, _request: web.Request, answer: Answer, reader: Reader) -> web.StreamResponse:
        piece = await _first(reader)
        text, logprobs = piece.text, piece.logprobs
        while piece.finish is None:
            piece = await reader.next()
            text += piece.text
            if piece.logprobs is not None:
                logprobs = [*(logprobs or []), *piece.logprobs]
        return _json(answer.whole(text, protocol.finish_reason(piece.finish), reader.usage, logprobs))

    async def _stream(self, request: web.Request, answer: Answer, reader: Reader) -> web.StreamResponse:
        first = await _first(reader)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        is_complete = False
        try:
            await response.prepare(request)
            await _write(response, answer, first, reader, lambda: self.reporter.beside_usage(request))
            is_complete = True
        except ConnectionResetError:
            log.debug("the client left")
        except GenerationError as error:
            with contextlib.suppress(ConnectionResetError):
                await response.write(protocol.event(error.refusal.body()))
        finally:
            if not is_complete and request.transport is not None:
                request.transport.close()  # without the last chunk: nobody must take this for a complete answer
        return response

    async def _models(self, _request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return _json(self._model_card())

    def _model_card(self) -> protocol.Json:
        return {"id": self.model, "object": "model", "created": self._started_at, "owned_by": "weir"}

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.READY and self._worker.is_ready

    async def _health(self, _request: web.Request) -> web.Response:
        status = self.phase.value if self.phase is not Phase.READY or self._worker.is_ready else "loading"
        return _json({"status": status}, status=200 if self.is_ready else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        text = metrics_page(self._worker.load(), self.reporter.report(), self.model)
        return web.Response(text=text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _live(self, _request: web.Request) -> web.Response:
        return _json({"live": True})

    async def _ready(self, _request: web.Request) -> web.Response:
        return _json({"ready": self.is_ready}, status=200 if self.is_ready else 503)


def _priority(request: web.Request) -> Priority:
    name = request.headers.get(PRIORITY_HEADER, "normal")
    try:
        return Priority[name.upper()]
    except KeyError as error:
        raise ApiError(400, "bad_request", f"{PRIORITY_HEADER} is not high, normal or low") from error


async def _first(reader: Reader) -> Piece:
    """The first piece. Raises ApiError 504 when the deadline passed before there was any text."""
    piece = await reader.next()
    if piece.finish == "deadline" and not piece.text:
        raise ApiError(504, "deadline", "the deadline passed before the answer began")
    return piece


async def _write(
    response: web.StreamResponse,
    answer: Answer,
    first: Piece,
    reader: Reader,
    load: Callable[[], dict[str, LoadReport]],
) -> None:
    """An event for each piece, and the ending."""
    piece = first
    await response.write(b"".join(protocol.event(opening) for opening in answer.opening()))
    while piece.finish is None:
        await response.write(protocol.event(answer.chunk(piece.text, logprobs=piece.logprobs)))
        piece = await reader.next()
    await response.write(_ending(answer, piece, protocol.finish_reason(piece.finish), reader.usage, load()))


def _ending(answer: Answer, piece: Piece, finish: str, usage: Usage, load: dict[str, LoadReport]) -> bytes:
    """All that is left of a stream, in one write. `load` stands beside the usage."""
    events = [answer.chunk(piece.text, logprobs=piece.logprobs)] if piece.text or piece.logprobs else []
    events.append(answer.chunk(None, finish))
    if answer.with_usage:
        events.append(answer.usage_chunk(usage) | load)
    return b"".join(protocol.event(each) for each in events) + protocol.DONE


def _refused_by_router(status: int) -> ApiError:
    """What aiohttp refuses by itself, in our words."""
    code, message = {
        404: ("not_found", "there is no such path"),
        405: ("method_not_allowed", "this path does not take that method"),
        413: ("too_large", f"the body is longer than {LARGEST_BODY} bytes"),
    }.get(status, ("bad_request", "the request cannot be read"))
    return ApiError(status, code, message)


def _refusal(error: ApiError) -> web.Response:
    return _json(error.body(), error.status, error.headers)


def _json(body: protocol.Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    encoded = msgspec.json.encode(body)
    return web.Response(body=encoded, status=status, headers=headers, content_type="application/json")
