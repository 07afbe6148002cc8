"""Reading a request's body: whole, within a size and a time. Nothing of it is decoded here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from policies.errors import BadRequest, BodyTooLarge, ClientTimeout

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.server import ClientConnection

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def is_at_hand(call: Call, most: int) -> bool:
    """Whether the whole body came together with the head, as most do; else it must be waited for, `read_body`.

    Raises BodyTooLarge, from the Content-Length alone where there is one: then no more of it is read.
    """
    length = call.content_length
    if call.size > most or (length and (len(length) > 15 or int(length) > most)):
        raise BodyTooLarge(f"The body is larger than {most} bytes.")
    return call.is_whole


async def read_body(call: Call, most: int, seconds: float) -> None:
    """Wait until `call.body` is whole. Raises BodyTooLarge, ClientTimeout, BadRequest."""
    connection = cast("ClientConnection", call.connection)
    if call.head.expects_continue and not call.http10:
        connection.write(_CONTINUE)
    try:
        async with asyncio.timeout(seconds):
            await connection.receive_body(call, most)
    except TimeoutError:
        raise ClientTimeout(f"The body did not come within {seconds:g} s.") from None
    if call.size > most:
        raise BodyTooLarge(f"The body is larger than {most} bytes.")
    if call.is_broken:
        raise BadRequest("The body is not framed as HTTP/1.1 says.")
