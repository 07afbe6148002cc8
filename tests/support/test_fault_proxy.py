"""The faults are what they say: each seen from both ends of a connection that passes through the proxy."""

import asyncio
import contextlib

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.running_gateway import until


class Server:
    """Answers each byte string with itself, and remembers what came and how each connection ended."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[str] = []

    @property
    def received(self) -> bytes:
        return b"".join(self.pieces)

    async def serve(self, reader, writer) -> None:
        try:
            while data := await reader.read(65536):
                self.pieces.append(data)
                writer.write(data)
                await writer.drain()
            self.ends.append("fin")
        except ConnectionError:
            self.ends.append("rst")
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def echo(**options):
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener, FaultProxy(listener.sockets[0].getsockname()[1], **options) as proxy:
        yield server, proxy


@contextlib.asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ended(reader) -> str:
    try:
        while await reader.read(65536):
            pass
    except ConnectionResetError:
        return "rst"
    return "fin"


async def test_without_faults_bytes_pass_both_ways_and_ends_do_too():
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert (proxy.accepted, proxy.open, proxy.to_server.passed, proxy.to_client.passed) == (1, 1, 5, 5)
        writer.write_eof()
        assert await ended(reader) == "fin"
        assert server.ends == ["fin"]
        await until(lambda: not proxy.open)


async def test_a_reset_by_the_client_reaches_the_server():
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        writer.write(b"hello")
        await reader.readexactly(5)
        proxy.to_client.stop()  # what is unread when a socket closes makes its end a reset
        writer.write(b"more")
        await until(lambda: proxy.to_server.passed == 9)
        await proxy.reset()
        await until(lambda: server.ends)
        assert server.ends == ["rst"]


async def test_one_byte_slices():
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        proxy.to_server.slices = 1
        writer.write(b"0123456789")
        assert await reader.readexactly(10) == b"0123456789"
        assert len(server.pieces) > 1


async def test_latency_and_bandwidth_hold_bytes_back():
    async with echo() as (_, proxy), connected(proxy) as (reader, writer):
        loop = asyncio.get_running_loop()
        proxy.to_server.latency = proxy.to_client.latency = 0.05
        before = loop.time()
        writer.write(b"hello")
        await reader.readexactly(5)
        assert loop.time() - before >= 0.099
        proxy.to_server.latency = proxy.to_client.latency = 0.0
        proxy.to_client.bandwidth, proxy.to_client.slices = 1000, 10
        before = loop.time()
        writer.write(b"x" * 100)
        await reader.readexactly(100)
        assert loop.time() - before >= 0.089  # after the last piece nobody waits


async def test_a_direction_that_is_stopped_is_felt_by_who_sends_and_goes_on_later():
    async with echo(buffer=4096) as (server, proxy), connected(proxy) as (reader, writer):
        proxy.to_server.stop()
        writer.write(b"x" * 8_000_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.1)
        assert server.received == b""
        proxy.to_server.go()
        assert len(await reader.readexactly(8_000_000)) == 8_000_000


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_after_so_many_bytes(how):
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        proxy.to_client.cut_after, proxy.to_client.cut_by = 7, how
        writer.write(b"0123456789")
        if how == "fin":
            assert await reader.read(10) == b"0123456"
        assert await ended(reader) == how
        await until(lambda: server.ends)
        assert proxy.to_client.passed == 7
        async with connected(proxy) as (another, sender):  # each connection is cut there
            sender.write(b"0123456")
            assert await ended(another) == how


async def test_one_byte_is_corrupted():
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        proxy.to_server.corrupts = 7
        writer.write(b"01234")
        await reader.readexactly(5)
        writer.write(b"56789")
        await reader.readexactly(5)
        assert server.received == b"0123456" + bytes([ord("7") ^ 0xFF]) + b"89"


async def test_what_is_swallowed_never_arrives():
    async with echo() as (server, proxy), connected(proxy) as (reader, writer):
        writer.write(b"one")
        await reader.readexactly(3)
        proxy.to_client.swallows = True
        writer.write(b"two")
        await until(lambda: server.received == b"onetwo")
        writer.write_eof()
        assert await reader.read() == b""
        assert proxy.to_client.passed == 3


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_connections_that_stand_end(how):
    async with echo() as (_, proxy), connected(proxy) as (reader, writer):
        writer.write(b"hello")
        await reader.readexactly(5)
        await (proxy.finish() if how == "fin" else proxy.reset())
        assert proxy.open == 0
        assert await ended(reader) == how
        async with connected(proxy) as (again, sender):  # new ones pass
            sender.write(b"hello")
            assert await again.readexactly(5) == b"hello"


async def test_a_reset_does_not_wait_for_those_who_come_meanwhile():
    async def come(stack):
        while True:
            await stack.enter_async_context(connected(proxy))
            await asyncio.sleep(0)

    async with echo() as (_, proxy), contextlib.AsyncExitStack() as stack:
        coming = asyncio.create_task(come(stack))
        await until(lambda: proxy.open > 2)
        async with asyncio.timeout(10):
            await proxy.reset()
        coming.cancel()
        await asyncio.wait([coming])


async def test_a_black_hole_accepts_and_says_nothing():
    async with echo() as (server, proxy):
        proxy.black_hole = True
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            assert (proxy.accepted, server.pieces) == (1, [])
        await until(lambda: not proxy.open)


async def test_refused_and_back_on_the_same_port():
    async with echo() as (_, proxy), connected(proxy) as (reader, writer):
        writer.write(b"hello")
        await reader.readexactly(5)
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"still")  # what stands goes on
        assert await reader.readexactly(5) == b"still"
        await proxy.listen()
        async with connected(proxy) as (again, sender):
            sender.write(b"hello")
            assert await again.readexactly(5) == b"hello"


async def test_connections_that_nobody_accepts():
    async with echo() as (_, proxy):
        await proxy.ignore()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection("127.0.0.1", proxy.port), 0.1)
        await proxy.listen()
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"


async def test_healed_it_is_as_in_the_beginning():
    async with echo() as (_, proxy):
        proxy.to_client.cut_after, proxy.to_server.slices, proxy.black_hole = 1, 1, True
        proxy.to_client.stop()
        await proxy.refuse()
        assert proxy.is_faulty
        await proxy.heal()
        assert not proxy.is_faulty
        async with connected(proxy) as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
        assert "accepted=1" in repr(proxy)


async def test_a_server_that_is_not_there_resets():
    async with echo() as (_, first):
        port = first.port
    async with FaultProxy(port) as proxy, connected(proxy) as (reader, _):
        assert await ended(reader) == "rst"
