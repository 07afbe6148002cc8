"""The OpenAI paths: from a request to an answer, whole or streamed.

The head of a stream goes out with the first token, so that everything that can be refused still has a status. What
fails later ends with an error event, no `[DONE]`, and a connection that is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from uuid import uuid4

import msgspec
from aiohttp import web

from reference_backend.answers import DONE, Answer, Json, Piece, Usage, events, joined
from reference_backend.engine.request import PICTURE_SIDE, Picture
from reference_backend.generation import Asked, Generation
from reference_backend.images import placed, read_picture
from reference_backend.incoming import POOL, SERVED, WALL, find, is_at, json_response, read, terms
from reference_backend.language import Language
from reference_backend.load_report import Reporter
from reference_backend.protocol import ChatRequest, CompletionRequest, GenerationRequest
from reference_backend.refusals import ApiError, bad
from reference_backend.served import State
from reference_backend.structured import Trials
from reference_backend.tools import Form, form_of

MOST_PICTURES = 16  # in one request: to decode one can take 50 ms
SHORT = 1024  # characters, of which tokens are made in half a millisecond
MARKUP = 32  # characters that a template puts around a message
TRIALS = web.AppKey("trials", Trials)
STARTED_AT = web.AppKey("started_at", int)
USAGE = web.RequestKey("usage", Usage)  # what a request has used, for whoever wraps the handler
log = logging.getLogger(__name__)


routes = web.RouteTableDef()


@routes.post("/v1/chat/completions")
async def _chat(request: web.Request) -> web.StreamResponse:
    body = await read(request, ChatRequest)
    with find(request, body.model).use(Language) as model:
        messages = body.turns(sees=model.sees)
        form = form_of(model.tokenizer.template_source or "") if body.offered() else None
        grammar, clauses = body.structure(form)
        if grammar is not None:
            await request.app[TRIALS].check(grammar, clauses)
        tools = msgspec.to_builtins(body.offered()) or None  # as templates know them
        characters = sum(message.characters for message in messages) + len(str(tools))
        _check_length(model, body, characters)
        prompt = await _soon(characters + MARKUP * len(messages), model.tokenizer.encode_chat, messages, tools)
        pictures = await asyncio.to_thread(_pictures, model, prompt, body) if model.sees else []
        return await _answer(request, body, model, prompt, grammar, form, pictures)


@routes.post("/v1/completions")
async def _completion(request: web.Request) -> web.StreamResponse:
    body = await read(request, CompletionRequest)
    with find(request, body.model).use(Language) as model:
        _check_length(model, body, len(body.text()))
        prompt = await _soon(len(body.text()), model.tokenizer.encode, body.text())
        if not prompt:
            raise bad("the prompt is empty", "prompt")
        return await _answer(request, body, model, prompt)


async def _answer(
    request: web.Request,
    body: GenerationRequest,
    model: Language,
    prompt: list[int],
    grammar: str | None = None,
    form: Form | None = None,
    pictures: Sequence[Picture] = (),
) -> web.StreamResponse:
    context = model.context
    if len(prompt) >= context:
        message = f"the prompt has {len(prompt)} tokens, the context has room for {context - 1}"
        raise bad(message, body.prompt_field, "context_length_exceeded")
    samplings = body.samplings(context - len(prompt), model.tokenizer.largest_token, grammar)
    if len(samplings) > model.bound:
        raise bad(f"n is {len(samplings)}, and this backend takes {model.bound} requests at a time", "n")
    how = terms(request.headers, model.clock())
    salt = (body.cache_salt or "").encode()
    asked = Asked(prompt, samplings, how, body.stops(), salt, form, pictures)
    name = f"{body.answer.id_prefix}-{uuid4().hex}"
    answer = body.answer(name, int(request.app[WALL]()), str(request[SERVED].entry), body.wants_usage())
    generation = Generation(model, asked)
    with generation.admitted():
        request[USAGE] = generation.usage
        if body.stream:
            return await _stream(request, answer, generation, model.reporter)
        pieces: list[list[Piece]] = [[] for _ in samplings]
        async for piece in generation:
            pieces[piece.choice].append(piece)
        return json_response(answer.whole(list(map(joined, pieces)), generation.usage))


@routes.get("/v1/models")
async def _models(request: web.Request) -> web.Response:
    served = [each for each in request.app[POOL] if each.state is not State.FAILED and is_at(request, each)]
    ids = dict.fromkeys(name for each in served for name in (each.entry.name, str(each.entry)))
    return json_response({"object": "list", "data": [_card(request, name) for name in ids]})


@routes.get("/v1/models/{model}")
async def _model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    find(request, name)
    return json_response(_card(request, name))


def _card(request: web.Request, name: str) -> Json:
    return {"id": name, "object": "model", "created": request.app[STARTED_AT], "owned_by": "weir"}


def _pictures(model: Language, prompt: list[int], body: ChatRequest) -> list[Picture]:
    """What a prompt shows. Raises ApiError 400."""
    urls = body.pictures()
    if len(urls) > MOST_PICTURES:
        raise bad(f"the messages have {len(urls)} pictures; at most {MOST_PICTURES} are read", "messages")
    shown = [read_picture(url, PICTURE_SIDE, place) for place, url in urls.items()]
    return placed(prompt, model.tokenizer.picture_token, shown)


async def _soon(size: int, encode: Callable[..., list[int]], *what: object) -> list[int]:
    """What is made of so many characters. In a thread only if it takes long: one would wait for the loop to rest."""
    return encode(*what) if size <= SHORT else await asyncio.to_thread(encode, *what)


def _check_length(model: Language, body: GenerationRequest, characters: int) -> None:
    """Refuse what cannot fit whatever its tokens are: to find those out can take seconds."""
    if model.tokenizer.is_hopeless(characters, model.context):
        message = f"{characters} characters are more than a context of {model.context} tokens holds"
        raise bad(message, body.prompt_field, "context_length_exceeded")


async def _stream(
    request: web.Request, answer: Answer, generation: Generation, reporter: Reporter
) -> web.StreamResponse:
    first = await anext(generation)  # until here it can be refused
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
    is_complete = False
    try:
        await response.prepare(request)
        await response.write(events(*answer.opening(generation.choices), *answer.chunks(first)))
        async for piece in generation:
            await response.write(events(*answer.chunks(piece)))
        if answer.with_usage:
            await response.write(events(answer.usage_chunk(generation.usage) | reporter.beside_usage(request)))
        await response.write(DONE)
        is_complete = True
    except ConnectionResetError:
        log.debug("the client left")
    except ApiError as error:
        with contextlib.suppress(ConnectionResetError):
            await response.write(events(error.body()))
    finally:
        if not is_complete and request.transport is not None:
            request.transport.close()  # without the last chunk: nobody must take this for a complete answer
    return response
