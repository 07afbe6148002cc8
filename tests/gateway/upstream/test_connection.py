import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream.connection import MAX_HEAD_BYTES
from gateway.upstream.pool import Pool
from tests.support.upstream import Listener, connected, endpoint
from tests.support.virtual_clock import virtual_time

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def pool() -> Pool:
    return Pool(endpoint())


def exchange(connection, *pieces: bytes) -> Listener:
    listener = Listener()
    connection.start(listener, b"GET / HTTP/1.1\r\n\r\n")
    for piece in pieces:
        connection.data_received(piece)
    return listener


def test_a_whole_answer_is_told_piece_by_piece_and_the_connection_goes_back(pool) -> None:
    connection = connected(pool)
    listener = exchange(connection, OK[:20], OK[20:-1], OK[-1:])
    assert connection.transport.written == b"GET / HTTP/1.1\r\n\r\n"
    assert listener.heard == ["flush", 200, b"h", "flush", b"i", "end", "flush"]
    assert listener.headers == [(b"content-length", b"2")]
    connection.finish(1.0)
    assert pool.take(1.0) is connection
    assert connection.reused


def test_one_connection_carries_many_answers(pool) -> None:
    connection = connected(pool)
    for answer in (OK, CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", OK):
        listener = exchange(connection, answer)
        assert listener.heard == [200, b"hi", "end", "flush"]
        connection.finish(0.0)
        assert pool.take(0.0) is connection


@given(
    chunks=st.lists(
        st.sampled_from(
            [
                b"2\r\nhi\r\n", b"2;a=b\r\nhi\r\n", b"02\r\nhi\r\n", b"5\r\n2\r\n\r\n\r\n", b"a\r\n0123456789\r\n",
                b"A\r\n0123456789\r\n",
                b"c\r\n1\r\nx\r\n0\r\n\r\n\r\n", b"2\r\nhi", b"\r\n", b"1\r\n", b"+2\r\nhi\r\n", b"3\r\nhi\r\n",
                b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"2 \r\nhi\r\n",
            ]
        ),
        max_size=6,
    ),
    ends=st.lists(st.integers(0, 60), max_size=4),
)  # fmt: skip
def test_chunks_are_read_alike_however_they_come(chunks, ends) -> None:
    def told(*pieces: bytes) -> tuple[bytes, list[object], bool, bool]:
        """The content and the other things heard; whether the answer is whole, and something is left."""
        connection = connected(Pool(endpoint()))
        heard = exchange(connection, CHUNKED, *pieces).heard
        content = b"".join(one for one in heard if isinstance(one, bytes))
        events = [one for one in heard if not isinstance(one, bytes) and one != "flush"]
        return content, list(dict.fromkeys(events)), connection.whole, connection.leftover

    stream = b"".join(chunks)
    cuts = sorted({0, *(end for end in ends if end < len(stream)), len(stream)})
    pieces = [stream[start:end] for start, end in itertools.pairwise(cuts)]
    byte_by_byte = told(*(stream[at : at + 1] for at in range(len(stream))))
    assert told(*chunks) == told(*pieces) == byte_by_byte


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", id="the backend closes"),
        pytest.param(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", id="an old backend"),
        pytest.param(OK + OK, id="an answer that nobody asked for"),
        pytest.param(OK + b"HTT", id="half of one"),
        pytest.param(OK + b"junk", id="junk"),
        pytest.param(OK[:-1], id="half an answer"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="an interim answer"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n", id="another"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", id="no body, unless one follows"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n", id="no body, but the length of one"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nto the end", id="an answer that only the end of the connection ends"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", id="an upgrade"),
    ],
)
def test_what_is_not_a_whole_answer_alone_costs_the_connection(pool, answer) -> None:
    connection = connected(pool)
    exchange(connection, *([answer] if answer else []))
    connection.finish(0.0)
    assert connection.transport.closed == "abort"
    assert pool.take(0.0) is None


def test_an_answer_that_came_before_the_request_was_sent_costs_the_connection(pool) -> None:
    connection = connected(pool)
    connection.transport.unsent = 30_000_000
    exchange(connection, OK)
    connection.finish(0.0)
    assert pool.take(0.0) is None


def test_junk_behind_an_answer_does_not_break_it(pool) -> None:
    listener = exchange(connected(pool), OK + b"junk")
    assert listener.heard == [200, b"hi", "end", "flush"]


def test_bytes_on_an_idle_connection_close_it(pool) -> None:
    connection = connected(pool)
    exchange(connection, OK)
    connection.finish(0.0)
    connection.data_received(OK)
    assert connection.transport.closed == "abort"
    connection.transport.lose()
    assert pool.take(0.0) is None


def test_a_connection_that_the_backend_closed_while_idle_is_forgotten(pool) -> None:
    connection = connected(pool)
    exchange(connection, OK)
    connection.finish(0.0)
    assert connection.eof_received() is False
    connection.transport.lose()
    assert pool.take(0.0) is None


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (b"", None, ["eof"]),
        (b"", ConnectionResetError(), ["upstream_reset"]),
        (OK[:-1], None, [200, b"h", "flush", "eof"]),
        (CHUNKED + b"5\r\nhel", ConnectionResetError(), [200, b"hel", "flush", "upstream_reset"]),
        (OK, None, [200, b"hi", "end", "flush"]),
        (OK, ConnectionResetError(), [200, b"hi", "end", "flush"]),
    ],
)
def test_how_a_connection_ends_is_told_unless_the_answer_was_whole(pool, answer, error, told) -> None:
    connection = connected(pool)
    listener = exchange(connection, *([answer] if answer else []))
    connection.transport.lose(error)
    assert listener.heard == told
    connection.finish(0.0)
    assert pool.take(0.0) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nz\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
    ],
)
def test_what_is_no_http_breaks_the_answer(pool, answer) -> None:
    connection = connected(pool)
    listener = exchange(connection, answer)
    assert listener.heard[-1] == "upstream_protocol"
    connection.finish(0.0)
    assert connection.transport.closed == "abort"


@pytest.mark.parametrize("piece", [b"x: y\r\n", b"x" * 999], ids=["many headers", "one long header"])
def test_a_head_that_does_not_end_is_bounded(pool, piece) -> None:
    connection = connected(pool)
    listener = exchange(connection, b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(2 * MAX_HEAD_BYTES // len(piece)):
        connection.data_received(piece)
        if listener.heard[-1] == "upstream_protocol":
            break
    assert connection._bodyless_bytes <= MAX_HEAD_BYTES + len(piece)
    assert listener.heard[-1] == "upstream_protocol"


def test_a_head_in_one_piece_is_bounded_too(pool) -> None:
    connection = connected(pool)
    listener = exchange(connection, OK[:17] + b"x: %b\r\n" % (b"y" * 999) * (MAX_HEAD_BYTES // 999 + 1) + OK[17:])
    assert listener.heard == ["upstream_protocol"]
    connection.finish(0.0)
    assert connection.transport.closed == "abort"


@pytest.mark.parametrize("endless", [b"2;evil=", b"2\r\nhi\r\n0\r\nx-evil: "], ids=["an extension", "a trailer"])
def test_what_frames_a_body_is_bounded_too(pool, endless) -> None:
    connection = connected(pool)
    listener = exchange(connection, CHUNKED + endless)
    for _ in range(MAX_HEAD_BYTES // 1000 + 1):
        assert listener.heard[-1] == "flush"
        connection.data_received(b"x" * 1000)
    assert listener.heard[-1] == "upstream_protocol"


def test_the_head_bound_is_of_each_answer_and_not_of_its_body(pool) -> None:
    connection = connected(pool)
    for _ in range(3):
        size = 2 * MAX_HEAD_BYTES
        listener = exchange(connection, b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, b"x" * size)
        assert listener.heard[-2:] == ["end", "flush"]
        connection.finish(0.0)
        assert pool.take(0.0) is connection


def test_trailers_and_chunk_extensions_are_heard_by_nobody(pool) -> None:
    answer = CHUNKED + b"2;evil=1\r\nhi\r\n0\r\nx-evil: 1\r\n\r\n"
    listener = exchange(connected(pool), answer)
    assert listener.heard == [200, b"hi", "end", "flush"]
    assert listener.headers == [(b"transfer-encoding", b"chunked")]


def test_a_connection_that_was_paused_reads_again_when_it_goes_back(pool) -> None:
    connection = connected(pool)
    exchange(connection, OK)
    connection.pause()
    connection.pause()
    assert connection.transport.is_reading_paused
    connection.finish(0.0)
    assert pool.take(0.0) is connection
    assert not connection.transport.is_reading_paused


def test_pausing_a_connection_that_is_closing_does_nothing(pool) -> None:
    connection = connected(pool)
    connection.close()
    connection.pause()
    connection.resume()
    assert not connection.transport.is_reading_paused


async def test_a_backend_that_takes_a_large_request_slowly(pool) -> None:
    """The event loop tells a protocol so, whether it listens or not."""
    wanted, failures = b"x" * 4_000_000, []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    async def take(reader, writer) -> None:
        await reader.readexactly(len(wanted))
        writer.write(OK)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        pool = Pool(endpoint(port=server.sockets[0].getsockname()[1]))
        connection, listener = await pool.connect(), Listener()
        connection.start(listener, wanted)
        while "end" not in listener.heard:
            await asyncio.sleep(0.005)
        connection.finish(0.0)
    assert (listener.heard, failures) == ([200, b"hi", "end", "flush"], [])


def test_a_bug_of_ours_is_not_blamed_on_the_backend(pool) -> None:
    connection = connected(pool)
    listener = Listener()
    listener.on_body = lambda data: 1 / 0
    connection.start(listener, b"")
    with pytest.raises(Exception, match="on_body"):
        connection.data_received(OK)
    assert "upstream_protocol" not in listener.heard


@virtual_time
async def test_an_alarm_of_an_earlier_answer_serves_the_next_one() -> None:
    connection = connected(Pool(endpoint()))
    rung = []

    class Patient(Listener):
        def on_alarm(self) -> None:
            rung.append((self, asyncio.get_running_loop().time()))

    first, second = Patient(), Patient()
    connection.start(first, b"")
    connection.wake_in(10.0, asyncio.get_running_loop().time())
    connection.answer = None
    await asyncio.sleep(4)
    connection.start(second, b"")
    connection.wake_in(10.0, asyncio.get_running_loop().time())  # later than the alarm that is set
    await asyncio.sleep(7)
    assert rung == [(second, 10.0)]
    connection.wake_in(5.0, asyncio.get_running_loop().time())
    connection.wake_in(1.0, asyncio.get_running_loop().time())  # sooner than the one that is set
    await asyncio.sleep(6)
    assert rung[1:] == [(second, 12.0)]


@virtual_time
async def test_a_connection_that_is_gone_leaves_no_alarm() -> None:
    connection = connected(Pool(endpoint()))
    exchange(connection)
    connection.wake_in(10.0, asyncio.get_running_loop().time())
    alarm = connection._alarm
    connection.transport.lose()
    assert alarm.cancelled()
