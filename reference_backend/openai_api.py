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
from reference_backend.engine.request import PICTURE_SIDE, Picture, Priority
from reference_backend.generation import Asked, Generation, GenerationError, Piece, Reader
from reference_backend.images import PictureRefused, placed, read_picture
from reference_backend.incoming import SERVED, check_open, deadline, find, is_at, json_response, read_body
from reference_backend.language import Language
from reference_backend.load_report import LoadReport, Reporter
from reference_backend.pool import Pool
from reference_backend.protocol import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    GenerationRequest,
    Request,
    Usage,
)
from reference_backend.served import State
from reference_backend.tokenizer import TemplateRefused

LARGEST_BODY = 4 * 1024 * 1024
MOST_PICTURES = 16  # in one request: to decode one can take 50 ms
CONSUMER_HEADER = "x-weir-consumer"  # who shares this backend fairly with others
PRIORITY_HEADER = "x-weir-priority"
USAGE = web.RequestKey("usage", Usage)  # what a request has used, for whoever wraps the handler
log = logging.getLogger(__name__)


class OpenAi:
    """Handlers, by path."""

    def __init__(self, pool: Pool, *, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._wall = wall
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
            _check_length(model, sum(len(message.content) for message in messages), "messages")
            try:
                prompt = await asyncio.to_thread(model.tokenizer.encode_chat, messages)
                pictures = await asyncio.to_thread(_pictures, model, prompt, body) if model.sees else []
            except (TemplateRefused, PictureRefused) as error:
                raise ApiError(400, "bad_request", str(error), param="messages") from error
            return await self._answer(request, body, model, prompt, ChatAnswer, pictures)

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
    ) -> web.StreamResponse:
        room = model.worker.context - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, the context has room for {model.worker.context - 1}"
            raise ApiError(400, "context_length_exceeded", message, param=kind.prompt_field)
        name = str(request[SERVED].entry)
        answer = kind(f"{kind.id_prefix}-{uuid4().hex}", int(self._wall()), name, body.wants_usage())
        asked = Asked(
            deadline(request, model.worker.clock()),
            _priority(request),
            request.headers.get(CONSUMER_HEADER, ""),
            (body.cache_salt or "").encode(),
            list(pictures),
        )
        with Generation(model.worker, model.reporter, prompt, body.sampling(room), asked) as generation:
            reader = Reader(generation, model.tokenizer, body.stops(), len(prompt))
            try:
                return await (self._stream if body.stream else self._whole)(request, answer, reader, model.reporter)
            finally:
                request[USAGE] = reader.usage

    async def _whole(
        self, _request: web.Request, answer: Answer, reader: Reader, _reporter: Reporter
    ) -> web.StreamResponse:
        piece = await _first(reader)
        text, logprobs = piece.text, piece.logprobs
        while piece.finish is None:
            piece = await reader.next()
            text += piece.text
            if piece.logprobs is not None:
                logprobs = [*(logprobs or []), *piece.logprobs]
        return json_response(answer.whole(text, protocol.finish_reason(piece.finish), reader.usage, logprobs))

    async def _stream(
        self, request: web.Request, answer: Answer, reader: Reader, reporter: Reporter
    ) -> web.StreamResponse:
        first = await _first(reader)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        is_complete = False
        try:
            await response.prepare(request)
            await _write(response, answer, first, reader, lambda: reporter.beside_usage(request))
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
