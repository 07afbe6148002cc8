"""Reading a request's body: whole, within a size and a time. Nothing of it is decoded here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.web_protocol import RequestPayloadError

from policies.errors import BadRequest, BodyTooLarge, ClientTimeout

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.server import Incoming

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def check_length(call: Call, most: int) -> None:
    """Raise BodyTooLarge from the Content-Length alone, before a byte of the body is read."""
    length = call.content_length
    if length and (len(length) > 15 or int(length) > most):
        raise BodyTooLarge(f"The body is larger than {most} bytes.")


async def read_body(incoming: Incoming, call: Call, most: int, seconds: float) -> bytes:
    """The whole body. Raises BodyTooLarge, ClientTimeout, BadRequest."""
    payload = incoming.payload
    if call.expects_continue and not payload.is_eof():
        incoming.connection.write(_CONTINUE)
    try:
        if payload.is_eof():  # it came together with the head
            body = payload.read_nowait()
        else:
            body = await _read_slowly(incoming, most, seconds)
    except TimeoutError:
        raise ClientTimeout(f"The body did not come within {seconds:g} s.") from None
    except RequestPayloadError:
        raise BadRequest("The body is not framed as HTTP/1.1 says.") from None
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
