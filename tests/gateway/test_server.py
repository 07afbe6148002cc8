"""The data listener's protocol on a transport in memory: real parsing, no sockets."""

import asyncio
import contextlib

import pytest

from gateway.call import Call
from gateway.server import LINGER_BYTES, LINGER_SECONDS, MOST_AHEAD, UNREAD_SECONDS
from policies.errors import LoopDetected
from tests.support.http_message import heard
from tests.support.listener import Listener
from tests.support.virtual_clock import virtual_time

GET = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@virtual_time
async def test_requests_are_served_in_order_on_one_connection() -> None:
    client, transport = Listener().connect()
    client.data_received(b"".join(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % number for number in range(50)))
    await settle()
    assert transport.written == b"".join(b"/%d" % number for number in range(50))
    assert transport.limits == (16 * 1024, 64 * 1024)


@virtual_time
async def test_backends_are_told_who_calls() -> None:
    client, _ = Listener().connect()
    assert client.forwarded_lines == b"via: 1.1 weir\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\n"


@pytest.mark.parametrize(
    ("via", "is_refused"),
    [
        ("1.1 weir-00000000000000aa", True),
        ("1.1 weir-00000000000000bb, 1.1 weir-00000000000000aa", True),
        ("1.1 weir-00000000000000bb", False),
        (", ".join(["1.1 weir-00000000000000bb"] * 9), False),
        (", ".join(["1.1 weir-00000000000000bb"] * 11), True),
        ("1.1 aa", False),
    ],
)
@virtual_time
async def test_a_request_that_comes_by_again_is_refused_each_time(via, is_refused) -> None:
    listener = Listener()
    listener.server.name = b"weir-00000000000000aa"
    client, _ = listener.connect()
    lines = [(b"host", b"a"), (b"via", via.encode())]
    for _ in range(2):
        with pytest.raises(LoopDetected) if is_refused else contextlib.nullcontext():
            client.head_of(lines)


@virtual_time
async def test_a_request_that_may_not_be_followed_closes() -> None:
    async def last(call) -> bool:
        return False

    client, transport = Listener(last).connect()
    client.data_received(GET + GET)
    await settle()
    assert transport.closed == "close"


POST = b"POST /y HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
CHUNKED = b"POST /z HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "reads",
    [
        [GET, GET, GET],
        [POST, POST, GET, POST],
        [CHUNKED, CHUNKED],
        [POST, POST[:-1] + b"d", POST],
        [POST, POST[:-1], POST[-1:], POST],  # begins as one that is known
        [POST, POST + GET[:20], GET[20:], POST],
        [POST, GET + POST, POST],
        [POST, POST[:-3], POST, b"c", GET],  # a body that looks like the request before
        [POST[:-3], POST[-3:], POST, POST],
        [POST.replace(b"3", b"5000"), b"a" * 5000, GET, GET],
        [GET + b"\r\n", GET + b"\r\n", GET],
    ],
    ids=range(11),
)
@virtual_time
async def test_reads_that_repeat_themselves_are_read_as_at_first(reads) -> None:
    def told(call: Call) -> tuple[object, ...]:
        return call.method, call.resource, call.version, call.lines, call.content_length, call.body, call.size

    served: list[tuple[object, ...]] = []

    async def tell(call: Call) -> bool:
        await call.connection.receive_body(call, 10_000)
        served.append(told(call))
        return True

    client, _ = Listener(tell).connect()
    for read in reads:
        client.data_received(read)
        await settle()
    at_once, served = served, []
    client, _ = Listener(tell).connect()
    for byte in b"".join(reads):
        client.data_received(bytes([byte]))
        await settle()
    assert served == at_once


@virtual_time
async def test_a_request_that_is_known_again_is_one_of_its_own() -> None:
    calls: list[Call] = []

    async def keep(call: Call) -> bool:
        calls.append(call)
        return True

    client, transport = Listener(keep).connect()
    for _ in range(3):
        client.data_received(POST)
        await settle()
    assert len(set(map(id, calls))) == 3
    transport.lose()
    client.data_received(POST)
    await settle()
    assert len(calls) == 3


@virtual_time
async def test_connections_beyond_the_limit_are_dropped_and_counted() -> None:
    listener = Listener(connections=2)
    kept = [listener.connect() for _ in range(2)]
    client, transport = listener.connect()
    assert transport.closed == "abort"
    transport.lose()
    assert (len(listener.server.connections), listener.server.refused_connections) == (2, 1)
    kept[0][1].lose()
    assert len(listener.server.connections) == 1
    assert listener.connect()[1].closed == ""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\n", 400),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 10_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431),
    ],
)
@virtual_time
async def test_a_head_that_cannot_be_parsed_is_refused_once_and_closed(sent, status) -> None:
    listener = Listener()
    client, transport = listener.connect()
    client.data_received(sent + GET)
    await settle()
    assert [refusal.status for refusal in listener.refusals] == [status]
    assert (transport.written, transport.closed) == (b"refused", "close")
    assert "aaaa" not in listener.refusals[0].message


@pytest.mark.parametrize(
    "sent", [b"junk\r\n\r\n", b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\njunk\r\n"]
)
@virtual_time
async def test_who_is_still_sending_gets_to_read_the_refusal(sent) -> None:
    client, transport = Listener().connect()
    transport.half_closes = True
    client.data_received(sent)
    await settle()
    assert (transport.is_half_closed, transport.closed) == (True, "")
    client.data_received(b"more" * 100_000)
    await asyncio.sleep(LINGER_SECONDS - 0.1)
    assert transport.closed == ""
    await asyncio.sleep(0.2)
    assert transport.closed == "close"


@virtual_time
async def test_who_closes_after_a_refusal_is_not_waited_for() -> None:
    client, transport = Listener().connect()
    transport.half_closes = True
    client.data_received(b"junk\r\n\r\n")
    await settle()
    transport.lose()
    await settle()
    assert client._task is None


@pytest.mark.parametrize("cut", [100, 1000, 8000, 8900])
@virtual_time
async def test_a_head_too_large_is_refused_however_it_is_cut(cut) -> None:
    listener = Listener()
    client, _ = listener.connect()
    head = b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 8900 + b"\r\n\r\n"
    for data in (head[:cut], head[cut:]):
        client.data_received(data)
        await settle()
    assert [refusal.status for refusal in listener.refusals] == [431]


@pytest.mark.parametrize("cut", [1, 100])
@virtual_time
async def test_a_head_too_large_is_refused_before_it_is_whole(cut) -> None:
    listener = Listener()
    client, _ = listener.connect()
    sent = 0
    for _ in range(10_000):
        client.data_received(b"GET / HTTP/1.1\r\nx: "[sent : sent + cut] or b"a" * cut)
        sent += cut
        if client._ahead:
            break
    assert 8192 <= sent <= 8192 + 200
    await settle()
    assert [refusal.status for refusal in listener.refusals] == [431]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\r\n" + GET, [b"/x"]),
        (GET + b"GET /y HTTP/1.1\r\nHost: a\r\n\r\n", [b"/x", b"/y"]),
        (GET + b"\x00junk", [b"/x", 400]),
        (b"GET /x HTTP/1.1\r\nconnection: close\r\n\r\n" + GET, [b"/x", 400]),
        (b"GET /up HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + GET, [b"/up"]),
        (b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n" + GET, [b"a:443"]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
        (b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nhost: b\r\n\r\n" + GET, [b"/x", b"/x"]),
        (b"POST /x HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + GET, [400]),
        (b"POST /x HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc" + GET, [400]),
        (b"GET /x HTTP/1.1\r\nhost: a\r\n b\r\n\r\n", [400]),
        (b"GET /x HTTP/1.1\r\nhost : a\r\n\r\n", [400]),
        (b"GET /x HTTP/1.1\nhost: a\n\n", [400]),
    ],
)
def test_what_a_connection_hears(data, found) -> None:
    assert [call.resource.encoded if isinstance(call, Call) else call.status for call in heard(data)] == found


UPGRADE = b"POST /x HTTP/1.1\r\nhost: a\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"


@pytest.mark.parametrize("cut", [1000, 40, 1])
@pytest.mark.parametrize(
    "framed",
    [b"content-length: 3\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\nx: y\r\n\r\n"],
)
@virtual_time
async def test_a_request_that_asks_for_another_protocol_keeps_its_body(framed, cut) -> None:
    calls = []

    async def remember(call) -> bool:
        await call.connection.receive_body(call, 100)
        calls.append(call)
        return False

    client, transport = Listener(remember).connect()
    sent = UPGRADE + framed
    for start in range(0, len(sent), cut):
        client.data_received(sent[start : start + cut])
        await settle()
    assert [(call.body, call.is_whole, len(call.lines)) for call in calls] == [(b"abc", True, len(calls[0].lines))]
    assert (b"x", b"y") not in calls[0].lines
    assert transport.closed == "close"


def test_requests_behind_one_that_asks_for_another_protocol_are_read_as_http_if_it_has_a_body() -> None:
    post = UPGRADE + b"content-length: 3\r\n\r\nabc"
    assert [call.body for call in heard(post * 3 + GET)] == [b"abc", b"abc", b"abc", b""]
    assert [call.body for call in heard(post + UPGRADE + b"\r\n" + GET)] == [b"abc", b""]


@pytest.mark.parametrize("head", [UPGRADE, b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n"])
def test_a_body_is_broken_where_the_parser_leaves_a_framing_that_is_none_to_others(head) -> None:
    [call] = heard(head + b"transfer-encoding: websocket\r\n\r\nGET /hidden HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (call.is_whole, call.is_broken, call.body) == (False, True, b"")


def test_trailers_are_no_header_lines() -> None:
    [call] = heard(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nauthorization: b\r\n\r\n")
    assert (call.lines, call.is_whole) == ([(b"host", b"a"), (b"transfer-encoding", b"chunked")], True)


@virtual_time
async def test_requests_sent_far_ahead_are_served_up_to_a_bound_and_the_connection_closes() -> None:
    listener = Listener()
    client, transport = listener.connect()
    client.data_received(GET * (MOST_AHEAD + 100))
    await settle()
    assert (transport.written, transport.closed) == (b"/x" * MOST_AHEAD, "close")
    assert listener.refusals == []


@virtual_time
async def test_who_sends_ahead_is_held_back_until_it_is_served() -> None:
    go = asyncio.Event()

    async def wait(call) -> bool:
        await go.wait()
        return True

    client, transport = Listener(wait).connect()
    client.data_received(GET * 20)
    assert transport.is_reading_paused
    go.set()
    await settle()
    assert not transport.is_reading_paused


@virtual_time
async def test_a_head_that_repeats_the_last_one_is_vetted_once() -> None:
    heads = []

    async def remember(call) -> bool:
        heads.append(call.connection.head_of(call.lines))
        return True

    client, _ = Listener(remember).connect()
    for request in (GET, GET, GET.replace(b"host: a", b"host: b"), GET):
        client.data_received(request)
        await settle()
    assert heads[0] is heads[1]
    assert [head.host for head in heads] == [b"a", b"a", b"b", b"a"]


@virtual_time
async def test_a_caller_is_remembered_only_as_long_as_its_header_lines_repeat() -> None:
    client, _ = Listener().connect()
    client.head_of([(b"authorization", b"a")])
    client.caller = caller = object()
    client.head_of([(b"authorization", b"a")])
    assert client.caller is caller
    client.head_of([(b"authorization", b"b")])
    assert client.caller is None


@virtual_time
async def test_requests_before_a_broken_one_are_served() -> None:
    listener = Listener()
    client, transport = listener.connect()
    client.data_received(GET)
    client.data_received(b"junk\r\n\r\n")
    await settle()
    assert transport.written == b"/xrefused"


@virtual_time
async def test_a_head_has_ten_seconds_however_it_dribbles() -> None:
    listener = Listener()
    client, transport = listener.connect()
    for byte in GET[:-9]:
        client.data_received(bytes([byte]))
        await asyncio.sleep(1)
        if listener.refusals:
            break
    assert asyncio.get_running_loop().time() == pytest.approx(10, abs=1)
    assert (listener.refusals[0].status, transport.closed) == (408, "close")


@virtual_time
async def test_a_head_in_two_pieces_is_in_time() -> None:
    listener = Listener()
    client, transport = listener.connect()
    client.data_received(GET[:9])
    await asyncio.sleep(9)
    client.data_received(GET[9:])
    await asyncio.sleep(9)
    assert (transport.written, listener.refusals) == (b"/x", [])


@pytest.mark.parametrize("sent", [b"", GET])
@virtual_time
async def test_an_idle_connection_is_closed(sent) -> None:
    client, transport = Listener().connect()
    if sent:
        client.data_received(sent)
    await asyncio.sleep(74)
    assert not transport.closed
    await asyncio.sleep(2)
    assert transport.closed == "close"


@virtual_time
async def test_a_connection_that_is_serving_is_not_idle() -> None:
    async def slow(call) -> bool:
        await asyncio.sleep(100)
        return True

    client, transport = Listener(slow).connect()
    client.data_received(GET)
    await asyncio.sleep(101)
    assert not transport.closed
    await asyncio.sleep(76)
    assert transport.closed == "close"


@virtual_time
async def test_when_the_server_closes_what_is_idle_the_rest_goes_on() -> None:
    async def slow(call) -> bool:
        await asyncio.sleep(10)
        return False

    listener = Listener(slow)
    (_, idle), (busy, serving), (begun, coming) = [listener.connect() for _ in range(3)]
    busy.data_received(GET)
    begun.data_received(GET[:5])
    await settle()
    listener.server.close_idle()
    assert [one.closed for one in (idle, serving, coming)] == ["close", "", ""]
    await asyncio.sleep(11)
    assert serving.closed == "close"
    listener.server.abort()
    assert coming.closed in ("abort", "close")


@virtual_time
async def test_when_the_client_leaves_its_request_is_cancelled() -> None:
    ends = []

    async def wait(call) -> bool:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    client, transport = Listener(wait).connect()
    client.data_received(GET)
    await settle()
    transport.lose()
    await settle()
    assert ends == ["cancelled"]
    client.write(b"late")
    client.cut()
    client.abort()


@virtual_time
async def test_a_body_that_nobody_read_is_thrown_away_so_that_the_answer_arrives() -> None:
    client, transport = Listener().connect()
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n12345")
    await settle()
    assert (transport.written, transport.closed) == (b"/x", "")
    client.data_received(b"67890")
    await settle()
    client.data_received(GET)
    await settle()
    assert transport.written == b"/x/x"


@virtual_time
async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    client, transport = Listener().connect()
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n12345")
    await asyncio.sleep(3)
    assert transport.closed == "close"


@virtual_time
async def test_of_a_body_that_nobody_wants_little_is_read() -> None:
    client, transport = Listener().connect()
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\n")
    await settle()
    sent = 0
    while not transport.is_reading_paused:
        client.data_received(b"x" * 1000)
        sent += 1000
    assert LINGER_BYTES < sent <= LINGER_BYTES + 1000
    await asyncio.sleep(LINGER_SECONDS - 0.1)
    assert (transport.written, transport.closed) == (b"/x", "")  # time to read the answer
    await asyncio.sleep(0.2)
    assert transport.closed == "close"


@pytest.mark.parametrize(
    "endless",
    [b"5;a=", b"5\r\nhello\r\n0\r\nx: ", b"5\r\nhello\r\n0\r\n" + b"x: y\r\n" * 10],
    ids=["a chunk extension", "a trailer", "trailers"],
)
@virtual_time
async def test_what_frames_a_body_is_bounded(endless) -> None:
    async def read(call) -> bool:
        await call.connection.receive_body(call, 1_000_000)
        call.connection.write(b"broken" if call.is_broken else b"whole")
        return False

    client, transport = Listener(read).connect()
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    client.data_received(endless)
    sent = 0
    while not transport.closed and sent < 1_000_000:
        client.data_received(b"x" * 100)
        sent += 100
        await settle()
    assert (transport.written, transport.closed) == (b"broken", "close")
    assert sent <= 8192 + 200


@virtual_time
async def test_small_chunks_are_no_framing_without_end() -> None:
    async def read(call) -> bool:
        await call.connection.receive_body(call, 1_000_000)
        call.connection.write(b"%d" % len(call.body))
        return True

    client, transport = Listener(read).connect()
    client.data_received(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(10_000):
        client.data_received(b"1\r\na\r\n")
    client.data_received(b"0\r\n\r\n")
    await settle()
    assert transport.written == b"10000"


# Clients that do not read


@virtual_time
async def test_who_does_not_read_answers_is_served_no_more_of_them() -> None:
    served = 0

    async def much(call) -> bool:
        nonlocal served
        served += 1
        call.connection.pause_writing()  # as a transport does whose buffer is full
        return True

    client, transport = Listener(much).connect()
    client.data_received(GET * 10)
    await asyncio.sleep(1)
    assert served == 1
    client.resume_writing()
    await asyncio.sleep(1)
    assert served == 2
    await asyncio.sleep(UNREAD_SECONDS)
    assert (served, transport.closed) == (2, "abort")


@virtual_time
async def test_a_cut_connection_that_is_not_read_to_its_end_is_aborted() -> None:
    client, transport = Listener().connect()
    aborts = []
    transport.abort = lambda: aborts.append(asyncio.get_running_loop().time())
    transport.unsent = 1000
    client.cut()
    assert transport.closed == "close"
    await asyncio.sleep(UNREAD_SECONDS + 1)
    assert aborts == [UNREAD_SECONDS]


@virtual_time
async def test_the_relay_hears_when_the_client_does_not_keep_up() -> None:
    class Relay:
        heard = []

        def pause(self):
            self.heard.append("pause")

        def resume(self):
            self.heard.append("resume")

    client, _ = Listener().connect()
    client.relay = Relay()
    client.pause_writing()
    client.resume_writing()
    assert Relay.heard == ["pause", "resume"]
