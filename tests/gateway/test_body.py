import asyncio

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestPayloadError

from gateway.body import body_at_hand, read_body
from gateway.server import Incoming
from policies import errors
from tests.support.call import MemoryClient, call_of
from tests.support.upstream import MemoryTransport
from tests.support.virtual_clock import virtual_time


class Upload:
    """A request whose body a test feeds."""

    def __init__(self, *lines: str, version: str = "1.1") -> None:
        loop = asyncio.get_running_loop()
        protocol = BaseProtocol(loop)
        protocol._upgraded = True  # there is no parser
        MemoryTransport(protocol)
        self.payload = StreamReader(protocol, 2**16, loop=loop)
        self.client = MemoryClient()
        self.call = call_of("/x", *lines, version=version)
        self.incoming = Incoming(None, self.payload, self.client)

    def feed(self, *pieces: bytes, end: bool = True) -> None:
        for piece in pieces:
            self.payload.feed_data(piece)
        if end:
            self.payload.feed_eof()

    async def read(self, most: int = 100, seconds: float = 10.0) -> bytes:
        body = body_at_hand(self.incoming, self.call, most)
        return body if body is not None else await read_body(self.incoming, self.call, most, seconds)


@pytest.mark.parametrize(
    ("length", "most", "fits"),
    [(b"", 5, True), (b"5", 5, True), (b"6", 5, False), (b"9" * 5000, 5, False), (b"005", 5, True)],
)
def test_a_length_that_is_told_is_believed(length, most, fits) -> None:
    incoming, call = Incoming(None, EMPTY_PAYLOAD, MemoryClient()), call_of("/x")
    call.content_length = length
    if fits:
        assert body_at_hand(incoming, call, most) == b""
    else:
        with pytest.raises(errors.BodyTooLarge, match="larger than 5 bytes"):
            body_at_hand(incoming, call, most)


@virtual_time
async def test_a_body_that_came_with_its_head_is_there_at_once() -> None:
    upload = Upload()
    assert body_at_hand(upload.incoming, upload.call, 100) is None
    upload.feed(b"ab", b"cd")
    assert body_at_hand(upload.incoming, upload.call, 100) == b"abcd"


@virtual_time
async def test_no_body_is_an_empty_one() -> None:
    incoming = Incoming(None, EMPTY_PAYLOAD, MemoryClient())
    assert body_at_hand(incoming, call_of("/x", method="GET"), 100) == b""


@virtual_time
async def test_a_body_in_pieces_is_put_together() -> None:
    upload = Upload()
    reading = asyncio.ensure_future(upload.read())
    for piece in (b"ab", b"cd"):
        await asyncio.sleep(1)
        upload.feed(piece, end=False)
    upload.feed()
    assert await reading == b"abcd"


@pytest.mark.parametrize("end", [True, False])
@virtual_time
async def test_a_body_that_grows_too_large_is_refused_without_waiting_for_its_end(end) -> None:
    upload = Upload()
    upload.feed(b"x" * 101, end=end)
    with pytest.raises(errors.BodyTooLarge):
        await upload.read(most=100)


@virtual_time
async def test_a_body_has_its_time_in_all_however_it_dribbles() -> None:
    upload = Upload()
    reading = asyncio.ensure_future(upload.read())
    while not reading.done():
        upload.feed(b"x", end=False)
        await asyncio.sleep(1)
    with pytest.raises(errors.ClientTimeout):
        await reading
    assert asyncio.get_running_loop().time() == pytest.approx(10, abs=1)


@virtual_time
async def test_a_body_that_is_framed_wrongly_is_a_bad_request() -> None:
    upload = Upload()
    upload.payload.set_exception(RequestPayloadError("broken"))
    with pytest.raises(errors.BadRequest):
        await upload.read()


@pytest.mark.parametrize(
    ("lines", "version", "sent"),
    [
        (["expect: 100-continue"], "1.1", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ([], "1.1", b""),
        (["expect: 100-continue"], "1.0", b""),
    ],
)
@virtual_time
async def test_who_asks_whether_to_send_is_told_to(lines, version, sent) -> None:
    upload = Upload(*lines, version=version)
    reading = asyncio.ensure_future(upload.read())
    await asyncio.sleep(1)
    assert upload.client.written == sent
    upload.feed(b"ab")
    assert await reading == b"ab"
    assert upload.client.written == sent


@virtual_time
async def test_a_body_that_is_here_already_is_not_asked_for() -> None:
    upload = Upload("expect: 100-continue")
    upload.feed(b"ab")
    await upload.read()
    assert upload.client.written == b""
