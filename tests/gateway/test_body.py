import asyncio

import pytest

from gateway.body import is_at_hand, read_body
from gateway.call import Call
from gateway.server import HELD_BYTES
from policies import errors
from tests.support.listener import Listener
from tests.support.virtual_clock import virtual_time

CONTINUE = "expect: 100-continue"


class Upload:
    """A request whose body a test feeds, in chunks, to a real connection; `read` is what the handler does with it."""

    def __init__(self, *lines: str, version: str = "1.1", length: int | None = None, most: int = 100) -> None:
        self.most = most
        self.outcome: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.client, self.transport = Listener(self._handle).connect()
        self._is_chunked = length is None
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        self._head = "\r\n".join([f"POST /x HTTP/{version}", "host: a", framing, *lines, "", ""]).encode()

    async def _handle(self, call: Call) -> bool:
        call.head = call.connection.head_of(call.lines)
        try:
            if not is_at_hand(call, self.most):
                await read_body(call, self.most, 10.0)
            self.outcome.set_result(call.body)
        except errors.Refusal as refusal:
            self.outcome.set_exception(refusal)
        return True

    def feed(self, *pieces: bytes, end: bool = True) -> None:
        data, self._head = self._head, b""
        for piece in pieces:
            data += b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece
        if end and self._is_chunked:
            data += b"0\r\n\r\n"
        self.client.data_received(data)


@pytest.mark.parametrize(
    ("length", "most", "fits"),
    [(b"", 5, True), (b"5", 5, True), (b"6", 5, False), (b"9" * 5000, 5, False), (b"005", 5, True)],
)
def test_a_length_that_is_told_is_believed(length, most, fits) -> None:
    call = Call(None, "POST", b"/x", "1.1", [], length)
    if fits:
        assert is_at_hand(call, most) is False
    else:
        with pytest.raises(errors.BodyTooLarge, match="larger than 5 bytes"):
            is_at_hand(call, most)


@pytest.mark.parametrize("pieces", [[b"abcd"], [b"ab", b"cd"], [b"a", b"b", b"c", b"d"]])
@virtual_time
async def test_a_body_that_came_with_its_head_is_there_at_once(pieces) -> None:
    upload = Upload(CONTINUE)
    upload.feed(*pieces)
    assert await upload.outcome == b"abcd"
    assert upload.transport.written == b""  # it was not asked for


@virtual_time
async def test_no_body_is_an_empty_one() -> None:
    upload = Upload(length=0)
    upload.feed()
    assert await upload.outcome == b""


@pytest.mark.parametrize("length", [None, 4])
@virtual_time
async def test_a_body_in_pieces_is_put_together(length) -> None:
    upload = Upload(length=length)
    upload.feed(end=False)
    for piece in (b"ab", b"cd"):
        await asyncio.sleep(1)
        assert not upload.outcome.done()
        upload.feed(piece, end=False)
    upload.feed()
    assert await upload.outcome == b"abcd"


@virtual_time
async def test_the_next_request_may_come_with_the_end_of_a_body() -> None:
    upload = Upload(length=4)
    upload.feed(b"ab")
    await asyncio.sleep(1)
    upload.client.data_received(b"cdPOST /y HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nx")
    assert await upload.outcome == b"abcd"


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
@virtual_time
async def test_a_body_that_grows_too_large_is_refused_without_waiting_for_its_end(end, at_once) -> None:
    upload = Upload()
    if not at_once:
        upload.feed(end=False)
        await asyncio.sleep(1)
    upload.feed(b"x" * 101, end=end)
    with pytest.raises(errors.BodyTooLarge):
        await upload.outcome


@virtual_time
async def test_a_large_body_is_held_back_until_it_is_asked_for() -> None:
    asked = asyncio.Event()

    async def later(call: Call) -> bool:
        await asked.wait()
        call.head = call.connection.head_of(call.lines)
        await read_body(call, 10**7, 10.0)
        done.set_result(len(call.body))
        return True

    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    client, transport = Listener(later).connect()
    size = 10 * HELD_BYTES
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size)
    sent = 0
    while not transport.is_reading_paused:
        client.data_received(b"x" * 1000)
        sent += 1000
    assert sent <= HELD_BYTES + 1000
    asked.set()
    await asyncio.sleep(1)
    assert not transport.is_reading_paused
    client.data_received(b"x" * (size - sent))
    assert await done == size


@virtual_time
async def test_a_body_has_its_time_in_all_however_it_dribbles() -> None:
    upload = Upload()
    while not upload.outcome.done():
        upload.feed(b"x", end=False)
        await asyncio.sleep(1)
    with pytest.raises(errors.ClientTimeout):
        await upload.outcome
    assert asyncio.get_running_loop().time() == pytest.approx(10, abs=1)


@pytest.mark.parametrize("at_once", [True, False])
@virtual_time
async def test_a_body_that_is_framed_wrongly_is_a_bad_request(at_once) -> None:
    upload = Upload()
    upload.feed(b"ab", end=False)
    if not at_once:
        await asyncio.sleep(1)
    upload.client.data_received(b"junk\r\n")
    with pytest.raises(errors.BadRequest):
        await upload.outcome


@pytest.mark.parametrize(
    ("lines", "version", "sent"),
    [([CONTINUE], "1.1", b"HTTP/1.1 100 Continue\r\n\r\n"), ([], "1.1", b""), ([CONTINUE], "1.0", b"")],
)
@virtual_time
async def test_who_asks_whether_to_send_is_told_to(lines, version, sent) -> None:
    upload = Upload(*lines, version=version, length=2)
    upload.feed(end=False)
    await asyncio.sleep(1)
    assert upload.transport.written == sent
    upload.feed(b"ab")
    assert await upload.outcome == b"ab"
    assert upload.transport.written == sent
