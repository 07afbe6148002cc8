"""The OpenAI paths: from a request to an answer, whole or streamed.

The head of a stream goes out with the first token, so that everything that can be refused still has a status. What
fails later ends with an error event, no `[DONE]`, and a connection that is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from uuid import uuid4

from aiohttp import web

from reference_backend import protocol
from reference_backend.engine.request import PICTURE_SIDE, Picture
from reference_backend.generation import Asked, Generation, GenerationError, Piece, Reader
from reference_backend.images import PictureRefused, placed, read_picture
from reference_backend.incoming import SERVED, check_open, find, is_at, json_response, read_body, terms
from reference_backend.language import Language
from reference_backend.load_report import LoadReport, Reporter
from reference_backend.pool import Pool
from reference_backend.protocol import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    Choice,
    CompletionAnswer,
    CompletionRequest,
    GenerationRequest,
    Request,
    Usage,
)
from reference_backend.served import State
from reference_backend.structured import Trials, Unfit
from reference_backend.tokenizer import TemplateRefused
from reference_backend.tools import Form, form_of

LARGEST_BODY = 4 * 1024 * 1024
MOST_PICTURES = 16  # in one request: to decode one can take 50 ms
USAGE = web.RequestKey("usage", Usage)  # what a request has used, for whoever wraps the handler
log = logging.getLogger(__name__)


class OpenAi:
    """Handlers, by path."""

    def __init__(self, pool: Pool, *, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._wall = wall
        self._trials = Trials()
        self._started_at = int(wall())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self._chat),
            web.post("/v1/completions", self._completion),
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model}", self._model),
        ]

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request, ChatRequest)
        with self._using(request, body) as model:
            messages = [message.plain(sees=model.sees) for message in body.messages]
            form = form_of(model.tokenizer.template_source or "") if body.offered() else None
            grammar = await self._grammar(body, form)
            tools = protocol.builtins(body.offered())
            _check_length(model, sum(message.characters for message in messages) + len(str(tools)), "messages")
            try:
                prompt = await asyncio.to_thread(model.tokenizer.encode_chat, messages, tools)
                pictures = await asyncio.to_thread(_pictures, model, prompt, body) if model.sees else []
            except (TemplateRefused, PictureRefused) as error:
                raise ApiError(400, "bad_request", str(error), param="messages") from error
            return await self._answer(request, body, model, prompt, ChatAnswer, pictures, grammar, form)

    async def _grammar(self, body: ChatRequest, form: Form | None) -> str | None:
        """What the answer keeps to, if to anything. Raises ApiError for what it cannot keep to."""
        try:
            grammar, clauses = body.structure(form)
            if grammar is not None:
                await self._trials.check(grammar, clauses)
        except Unfit as error:
            message = f"{error.place}: {error}"
            raise ApiError(400, "bad_schema", message[: protocol.LONGEST_SHOWN], param=error.place) from error
        return grammar

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request, CompletionRequest)
        with self._using(request, body) as model:
            _check_length(model, len(body.text()), "prompt")
            prompt = await asyncio.to_thread(model.tokenizer.encode, body.text())
            if not prompt:
                raise ApiError(400, "bad_request", "the prompt is empty", param="prompt")
            return await self._answer(request, body, model, prompt, CompletionAnswer)

    async def _read(self, request: web.Request, form: type[Request]) -> Request:
        """The request's body, decoded."""
        check_open(self._pool)
        return protocol.decode(await read_body(request, LARGEST_BODY), form)

    def _using(self, request: web.Request, body: GenerationRequest) -> AbstractContextManager[Language]:
        return find(self._pool, request, body.model).use(Language)

    async def _answer(
        self,
        request: web.Request,
        body: GenerationRequest,
        model: Language,
        prompt: list[int],
        kind: type[Answer],
        pictures: Sequence[Picture] = (),
        grammar: str | None = None,
        form: Form | None = None,
    ) -> web.StreamResponse:
        room = model.worker.context - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, the context has room for {model.worker.context - 1}"
            raise ApiError(400, "context_length_exceeded", message, param=kind.prompt_field)
        name = str(request[SERVED].entry)
        answer = kind(f"{kind.id_prefix}-{uuid4().hex}", int(self._wall()), name, body.wants_usage())
        wanted = terms(request.headers, model.worker.clock())
        salt = (body.cache_salt or "").encode()
        asked = Asked(wanted.deadline, wanted.priority, wanted.tenant, salt, list(pictures))
        samplings = body.samplings(room, model.tokenizer.largest_token, grammar)
        if len(samplings) > model.bound:
            message = f"n is {len(samplings)}, and this backend takes {model.bound} requests at a time"
            raise ApiError(400, "bad_request", message, param="n")
        with Generation(model.worker, model.reporter, prompt, samplings, asked) as generation:
            reader = Reader(generation, model.tokenizer, body.stops(), len(prompt), form)
            try:
                return await (self._stream if body.stream else self._whole)(request, answer, reader, model.reporter)
            finally:
                request[USAGE] = reader.usage

    async def _whole(
        self, _request: web.Request, answer: Answer, reader: Reader, _reporter: Reporter
    ) -> web.StreamResponse:
        choices = [Choice() for _ in reader.choices]
        piece = await _first(reader)
        choices[piece.choice].add(piece.text, piece.finish, piece.logprobs, piece.calls)
        while reader.choices:
            piece = await reader.next()
            choices[piece.choice].add(piece.text, piece.finish, piece.logprobs, piece.calls)
        return json_response(answer.whole(choices, reader.usage))

    async def _stream(
        self, request: web.Request, answer: Answer, reader: Reader, reporter: Reporter
    ) -> web.StreamResponse:
        choices = len(reader.choices)
        first = await _first(reader)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        is_complete = False
        try:
            await response.prepare(request)
            await _write(response, answer, choices, first, reader, lambda: reporter.beside_usage(request))
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

    async def _models(self, request: web.Request) -> web.Response:
        served = [each for each in self._pool if each.state is not State.FAILED and is_at(request, each)]
        ids = dict.fromkeys(name for each in served for name in (each.entry.name, str(each.entry)))
        return json_response({"object": "list", "data": [self._card(name) for name in ids]})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        find(self._pool, request, name)
        return json_response(self._card(name))

    def _card(self, name: str) -> protocol.Json:
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": "weir"}


def _pictures(model: Language, prompt: list[int], body: ChatRequest) -> list[Picture]:
    """What a prompt shows. Raises PictureRefused."""
    urls = [url for message in body.messages for url in message.pictures()]
    if len(urls) > MOST_PICTURES:
        raise PictureRefused(f"the messages have {len(urls)} pictures; at most {MOST_PICTURES} are read")
    return placed(prompt, model.tokenizer.picture_token, [read_picture(url, PICTURE_SIDE) for url in urls])


def _check_length(model: Language, characters: int, param: str) -> None:
    """Refuse what cannot fit whatever its tokens are: to find those out can take seconds."""
    if model.tokenizer.is_hopeless(characters, model.worker.context):
        message = f"{characters} characters are more than a context of {model.worker.context} tokens holds"
        raise ApiError(400, "context_length_exceeded", message, param=param)


async def _first(reader: Reader) -> Piece:
    """The first piece. Raises ApiError 504 when the deadline passed before there was any text."""
    piece = await reader.next()
    if piece.is_late and not piece.text:
        raise ApiError(504, "deadline", "the deadline passed before the answer began")
    return piece


async def _write(
    response: web.StreamResponse,
    answer: Answer,
    choices: int,
    first: Piece,
    reader: Reader,
    load: Callable[[], dict[str, LoadReport]],
) -> None:
    """An event for each piece, and the ending."""
    piece = first
    await response.write(b"".join(protocol.event(opening) for opening in answer.opening(choices)))
    while reader.choices:
        await response.write(_events(answer, piece))
        piece = await reader.next()
    ending = protocol.event(answer.usage_chunk(reader.usage) | load()) if answer.with_usage else b""
    await response.write(_events(answer, piece) + ending + protocol.DONE)


def _events(answer: Answer, piece: Piece) -> bytes:
    """What a piece brings, and the end of its choice behind it."""
    events = []
    if piece.text or piece.calls or piece.logprobs:
        events.append(answer.chunk(piece.choice, piece.text, logprobs=piece.logprobs, calls=piece.calls))
    if piece.finish is not None:
        events.append(answer.chunk(piece.choice, None, piece.finish))
    return b"".join(map(protocol.event, events))
