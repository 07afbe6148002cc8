"""Connections between accept and the first byte of HTTP: handed on whole, counted, and told when nothing comes of them.

On asyncio's own loop; tests/integration/test_tls.py has the whole gateway on uvloop.
"""

import asyncio
import contextlib
import ssl

import pytest

from gateway.handshake import TlsDoor, reason_of
from observability.events import HandshakeFailed
from tests.support.certificates import Authority, client_tls, server_tls


class Connection:
    """Stands for a ClientConnection: writes down what it hears."""

    def __init__(self, server) -> None:
        self.server = server
        self.heard = b""
        self.is_lost = False

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.server.connections.add(self)
        self.server.made.append(self)

    def data_received(self, data) -> None:
        self.heard += data

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, error) -> None:
        self.is_lost = True
        self.server.connections.discard(self)


class Server:
    """Stands for the DataServer."""

    def __init__(self, most_connections=10) -> None:
        self.most_connections = most_connections
        self.refused_connections = 0
        self.connections: set[Connection] = set()
        self.made: list[Connection] = []

    def __call__(self) -> Connection:
        return Connection(self)


class Listening:
    def __init__(self, context, seconds=5.0, most_connections=10) -> None:
        self.told: list[HandshakeFailed] = []
        self.server = Server(most_connections)
        self.door = TlsDoor(self.server, context, seconds, self.told.append)
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self):
        self._listener = await asyncio.get_running_loop().create_server(self.door, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._listener.close()
        self.door.abort()
        for writer in self._writers:
            writer.transport.abort()
        for connection in self.server.made:
            connection.transport.abort()
        await asyncio.sleep(0)  # the transports hear of it
        await until(lambda: not self.door.shaking)

    async def connect(self, tls=None):
        name = "127.0.0.1" if tls else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name)
        self._writers.append(writer)
        return reader, writer


async def wait_ended(reader) -> None:
    with contextlib.suppress(OSError):
        assert await reader.read() == b""


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def context(authority):
    tls = server_tls(authority.issue("gateway", ["127.0.0.1"]))
    return lambda: tls


async def test_a_connection_is_handed_on_with_what_came_behind_its_handshake(authority, context):
    async with Listening(context) as listening:
        _, writer = await listening.connect(client_tls(authority.cert))
        writer.write(b"GET /1")
        await until(lambda: listening.server.made and listening.server.made[0].heard == b"GET /1")
        [connection] = listening.server.made
        assert connection.transport.get_extra_info("sslcontext") is context()
        assert connection.transport.get_extra_info("peername")[0] == "127.0.0.1"
        writer.close()
        await until(lambda: connection.is_lost)
        assert (listening.told, repr(listening.door)) == ([], "<TlsDoor 0 shaking hands>")


async def test_bytes_in_one_segment_with_the_end_of_the_handshake_are_not_lost(authority, context):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_tls(authority.cert).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    async with Listening(context) as listening:
        reader, writer = await listening.connect()
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        writer.write(outgoing.read())
        while True:
            incoming.write(await reader.read(65536))
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        client.write(b"GET /early")
        writer.write(outgoing.read())  # Finished and the request together
        await until(lambda: listening.server.made and listening.server.made[0].heard == b"GET /early")
        writer.close()


async def test_who_is_connected_without_a_handshake_counts_and_is_ended_in_time(context):
    async with Listening(context, seconds=0.2, most_connections=2) as listening:
        idle = [await listening.connect() for _ in range(2)]
        await until(lambda: len(listening.door.shaking) == 2)
        reader, _ = await listening.connect()
        await wait_ended(reader)
        assert listening.server.refused_connections == 1
        for reader, _ in idle:
            await wait_ended(reader)
        await until(lambda: len(listening.told) == 2)
        assert {each.reason for each in listening.told} == {"timeout"}
        assert not listening.server.made


async def test_who_leaves_or_is_sent_away_in_the_middle_leaves_nothing_behind(context):
    async with Listening(context) as listening:
        _, writer = await listening.connect()
        await until(lambda: listening.door.shaking)
        writer.close()
        await until(lambda: not listening.door.shaking)
        await listening.connect()
        await until(lambda: listening.door.shaking)
        listening.door.abort()
        await until(lambda: not listening.door.shaking)
        assert not listening.server.made
        assert not listening.told  # a port check, again and again, is no news


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "not_tls"),
        (b"\x00" * 64, "not_tls"),
        (b"\x16\x03\x01\x00\x05\x14\x00\x00\x01\x00", "other"),
    ],
)
async def test_what_is_no_tls_is_told_as_that(context, sent, reason):
    async with Listening(context) as listening:
        reader, writer = await listening.connect()
        writer.write(sent)
        await wait_ended(reader)
        await until(lambda: listening.told)
        assert listening.told[0].reason == reason


async def test_a_client_without_the_certificate_that_is_asked_for(authority, tmp_path):
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("stranger", ["c"])
    tls = server_tls(authority.issue("gateway", ["127.0.0.1"]), believes=authority.cert)
    shown = [None, stranger, authority.issue("old", ["c"], days=-1), authority.issue("client", ["c"])]
    async with Listening(lambda: tls) as listening:
        for each in shown:
            with contextlib.suppress(OSError):  # with TLS 1.2 it is refused in the handshake
                reader, writer = await listening.connect(client_tls(authority.cert, each))
                writer.write(b"x")
                if each is not shown[-1]:
                    await wait_ended(reader)
        await until(lambda: len(listening.told) == 3 and listening.server.made)
        assert [(each.reason, each.detail) for each in listening.told] == [
            ("no_certificate", "peer did not return a certificate"),
            ("certificate_refused", "certificate signature failure"),  # both authorities have one name
            ("certificate_refused", "certificate has expired"),
        ]
        writer.close()


def error(reason):
    found = ssl.SSLError(1, "x")
    found.reason = reason
    return found


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (error("PEER_DID_NOT_RETURN_A_CERTIFICATE"), ("no_certificate", "peer did not return a certificate")),
        (error("CERTIFICATE_VERIFY_FAILED"), ("certificate_refused", "certificate verify failed")),
        (error("TLSV1_ALERT_UNKNOWN_CA"), ("refused_by_client", "tlsv1 alert unknown ca")),
        (error("SSLV3_ALERT_BAD_CERTIFICATE"), ("refused_by_client", "sslv3 alert bad certificate")),
        (error("UNSUPPORTED_PROTOCOL"), ("old_version", "unsupported protocol")),
        (error("NO_SHARED_CIPHER"), ("no_shared_cipher", "no shared cipher")),
        (error("HTTP_REQUEST"), ("not_tls", "http request")),
        (error("WRONG_VERSION_NUMBER"), ("not_tls", "wrong version number")),
        (error("SOMETHING_NEW"), ("other", "something new")),
        (error(None), ("other", "unknown")),
        (ConnectionAbortedError("late"), ("timeout", "")),
        (TimeoutError(), ("timeout", "")),
        (ConnectionResetError(), ("gone", "")),
        (BrokenPipeError(), ("gone", "")),
    ],
)
def test_why_a_handshake_failed(failure, told):
    assert reason_of(failure) == told
