"""Reading a request's body: whole, within a size and a time. Nothing of it is decoded here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.web_protocol import RequestPayloadError

from policies.errors import BadRequest, BodyTooLarge, ClientTimeout

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.server import Incoming

_BADLY_FRAMED = "The body is not framed as HTTP/1.1 says."
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def body_at_hand(incoming: Incoming, call: Call, most: int) -> bytes | None:
    """The whole body if it came together with the head, as most do; None: it must be waited for, `read_body`.

    Raises BodyTooLarge, from the Content-Length alone where there is one: then not a byte of it is read.
    """
    length = call.content_length
    if length and (len(length) > 15 or int(length) > most):
        raise BodyTooLarge(f"The body is larger than {most} bytes.")
    payload = incoming.payload
    if not payload.is_eof():
        return None
    try:
        body = payload.read_nowait()
    except RequestPayloadError:
        raise BadRequest(_BADLY_FRAMED) from None
    if len(body) > most:
        raise BodyTooLarge(f"The body is larger than {most} bytes.")
    return body


async def read_body(incoming: Incoming, call: Call, most: int, seconds: float) -> bytes:
    """Wait for the whole body. Raises BodyTooLarge, ClientTimeout, BadRequest."""
    if call.expects_continue:
        incoming.connection.write(_CONTINUE)
    try:
        body = await _read_slowly(incoming, most, seconds)
    except TimeoutError:
        raise ClientTimeout(f"The body did not come within {seconds:g} s.") from None
    except RequestPayloadError:
        raise BadRequest(_BADLY_FRAMED) from None
    if len(body) > most:
        raise BodyTooLarge(f"The body is larger than {most} bytes.")
    return body


async def _read_slowly(incoming: Incoming, most: int, seconds: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async with asyncio.timeout(seconds):
        while not incoming.payload.at_eof():
            piece = await incoming.payload.readany()
            pieces.append(piece)
            size += len(piece)
            if size > most:
                break
    return b"".join(pieces)
