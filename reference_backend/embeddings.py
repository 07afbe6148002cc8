"""/v1/embeddings: texts, or their tokens, to vectors, in the forms of the OpenAI API.

`dimensions` is refused unless it is what the model gives: to cut a vector short keeps its meaning only with models that
are trained for it, and those here are not.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal, cast

import msgspec
import numpy as np
from aiohttp import web

from reference_backend.answers import Json, Usage
from reference_backend.incoming import find, json_response, read, terms
from reference_backend.openai_api import USAGE
from reference_backend.refusals import ApiError, bad
from reference_backend.stateless import Embedding
from reference_backend.tensors import Array, Tensors

MOST_INPUTS = 2048  # in one request, as OpenAI has it


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """`input` is a text, the tokens of one, or a list of either."""

    model: str
    input: str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        """Raises ApiError for what was asked for and cannot be done."""
        self.tensors()

    def tensors(self) -> Tensors:
        """The input as the model takes it. Raises ApiError."""
        given: list[str | int | list[int]] = self.input if isinstance(self.input, list) else [self.input]
        if all(isinstance(each, int) for each in given):
            given = [cast("list[int]", given)]
        if len(given) > MOST_INPUTS:
            raise _bad_input(f"has {len(given)} texts; at most {MOST_INPUTS} go in one request")
        if not all(given):
            raise _bad_input("has an empty text")
        if all(isinstance(each, str) for each in given):
            return {"text": np.array([cast("str", each).encode() for each in given], np.object_)}
        if not all(isinstance(each, list) for each in given):
            raise _bad_input("mixes texts and tokens")
        rows = cast("list[list[int]]", given)
        try:
            ids = np.array([token for row in rows for token in row], np.int64)
        except OverflowError as error:
            raise _bad_input("has a token that no model has") from error
        return {"ids": ids, "lengths": np.array([len(row) for row in rows], np.int64)}


def _bad_input(what: str) -> ApiError:
    return bad(f"input {what}", "input")


routes = web.RouteTableDef()


@routes.post("/v1/embeddings")
async def _embed(request: web.Request) -> web.Response:
    body = await read(request, EmbeddingRequest)
    served = find(request, body.model)
    with served.use(Embedding) as model:
        size = next(spec.shape[-1] for spec in model.outputs if spec.name == "embedding")
        if body.dimensions not in (None, size):
            message = f"this model gives {size} dimensions and is not trained to be cut short; leave `dimensions` out"
            raise bad(message, "dimensions", "unsupported_parameter")
        outputs = await model.infer(body.tensors(), terms(request.headers, model.clock()), param="input")
    tokens = int(outputs["tokens"].sum())
    request[USAGE] = Usage(tokens, 0)
    return json_response(
        answer(str(served.entry), outputs["embedding"], tokens, as_text=body.encoding_format == "base64")
    )


def answer(model: str, vectors: Array, tokens: int, *, as_text: bool) -> Json:
    """`as_text`: each vector as base64 of its float32 numbers, little end first, which is a third of the size."""
    rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist() for row in vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
