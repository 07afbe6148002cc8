"""The OpenAI path for pictures from text, `/v1/images/generations`.

What a model paints is small; a larger `size` shows each of its pixels as a square. Without a `seed` chance gives one.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

import msgspec
import numpy as np
from aiohttp import web

from reference_backend.images import png
from reference_backend.incoming import WALL, find, json_response, read, terms
from reference_backend.refusals import LONGEST_SHOWN, bad
from reference_backend.stateless import Painter

LARGEST_BODY = 64 * 1024
SEEDS = 2**63 - 1000  # room for the seeds of the pictures behind the first
DEFAULT_SIDE = 256  # pixels
LARGEST_SIDE = 1024


class ImageRequest(msgspec.Struct, kw_only=True):
    """Fields that would change the answer and are not known are refused, others ignored."""

    model: str
    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    n: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=SEEDS)] | None = None  # of the first; the next ones count on
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    background: Any = None
    stream: Any = None

    def __post_init__(self) -> None:
        """Raises ApiError for what was asked for and cannot be done."""
        known = {"response_format": "b64_json", "output_format": "png", "background": "opaque", "stream": False}
        for name, only in known.items():
            if getattr(self, name) not in (None, "auto", only):
                raise bad(f"{name} can only be {only!r} here", name, "unsupported_parameter")

    def side(self, own: int) -> int:
        """The pixels in a row of a picture that has `own` of them. Raises ApiError 400."""
        if self.size in (None, "auto"):
            return max(own, DEFAULT_SIDE // own * own)
        sides = {f"{side}x{side}": side for side in range(own, LARGEST_SIDE + 1, own)}
        if self.size not in sides:
            message = f"size is {str(self.size)[:LONGEST_SHOWN]!r}; it can be {own}x{own}, or a multiple up to "
            raise bad(f"{message}{LARGEST_SIDE}x{LARGEST_SIDE}", "size")
        return sides[self.size]


routes = web.RouteTableDef()


@routes.post("/v1/images/generations")
async def _generate(request: web.Request) -> web.StreamResponse:
    body = await read(request, ImageRequest, LARGEST_BODY)
    with find(request, body.model).use(Painter) as model:
        own = model.outputs[0].shape[1]
        side, count = body.side(own), body.n or 1
        first = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        tensors = {
            "prompt": np.array([body.prompt.encode()] * count, object),
            "seed": np.arange(first, first + count, dtype=np.int64),
        }
        outputs = await model.infer(tensors, terms(request.headers, model.clock()), param="prompt")
        pictures = [picture.tobytes() for picture in outputs["image"]]
        shown = await asyncio.to_thread(lambda: [png(pixels, own, side) for pixels in pictures])
    data = [{"b64_json": content} for content in shown]
    created = int(request.app[WALL]())
    return json_response({"created": created, "output_format": "png", "size": f"{side}x{side}", "data": data})
