"""Parse request bytes the way the data listener does: with aiohttp's C parser."""

import asyncio

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser


def parse(head: bytes):
    """The RawRequestMessage of one head; the body, if any, is ignored."""
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, auto_decompress=False)
        messages, _, _ = parser.feed_data(head)
        return messages[0][0]
    finally:
        loop.close()
