import asyncio
import ssl

import pytest

from gateway.upstream import pool as module
from gateway.upstream.connection import Connection
from gateway.upstream.pool import IDLE_SECONDS, Pool
from tests.support.certificates import Authority, client_tls, server_tls
from tests.support.upstream import connected, endpoint


def idle(pool: Pool, *since: float) -> list[Connection]:
    connections = [connected(pool) for _ in since]
    for connection, at in zip(connections, since, strict=True):
        connection.idle_since = at
        pool.put_back(connection)
    return connections


def test_the_youngest_is_taken_first() -> None:
    pool = Pool(endpoint())
    older, younger = idle(pool, 0.0, 1.0)
    assert [pool.take(1.0), pool.take(1.0), pool.take(1.0)] == [younger, older, None]


def test_one_that_idled_too_long_is_closed_and_not_used() -> None:
    pool = Pool(endpoint())
    older, younger = idle(pool, 0.0, 1.0)
    assert pool.take(1.0 + IDLE_SECONDS) is younger
    assert pool.take(1.0 + IDLE_SECONDS) is None
    assert older.transport.closed == "abort"


def test_tidying_closes_what_idled_too_long_and_no_more() -> None:
    pool = Pool(endpoint())
    connections = idle(pool, 0.0, 1.0, 2.0)
    pool.close_idle(1.5 + IDLE_SECONDS)
    assert [connection.transport.closed for connection in connections] == ["abort", "abort", ""]


def test_the_pool_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_IDLE", 2)
    pool = Pool(endpoint())
    connections = idle(pool, 0.0, 0.0, 0.0)
    assert connections[2].transport.closed == "abort"
    assert repr(pool) == "<Pool tiny/a idle=2>"


def test_a_closed_pool_keeps_nothing() -> None:
    pool = Pool(endpoint())
    (before,) = idle(pool, 0.0)
    pool.close()
    (after,) = idle(pool, 0.0)
    assert [before.transport.closed, after.transport.closed, pool.take(0.0)] == ["abort", "abort", None]
    assert repr(pool) == "<Pool tiny/a idle=0 closed>"


def test_what_the_backend_closed_is_forgotten_once() -> None:
    pool = Pool(endpoint())
    first, second = idle(pool, 0.0, 0.0)
    pool.forget(first)
    pool.forget(first)
    assert [pool.take(0.0), pool.take(0.0)] == [second, None]


async def test_it_connects_to_the_pinned_address_whatever_the_host_is() -> None:
    met = asyncio.Event()

    async def accept(reader, writer) -> None:
        met.set()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = await Pool(endpoint(host="elsewhere.example", port=port)).connect()
        await asyncio.wait_for(met.wait(), 2)
        connection.close()


async def test_nobody_there_is_an_os_error() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    with pytest.raises(OSError, match=str(port)):
        await Pool(endpoint(port=port)).connect()


def test_a_successor_starts_empty_and_what_was_connected_before_carries_nothing_more() -> None:
    pool = Pool(endpoint())
    idle_one, busy = idle(pool, 0.0)[0], connected(pool)
    successor = pool.successor()
    pool.put_back(busy)
    assert [idle_one.transport.closed, busy.transport.closed] == ["abort", "abort"]
    assert (repr(pool), repr(successor)) == ("<Pool tiny/a idle=0 closed>", "<Pool tiny/a idle=0>")


async def test_each_connection_is_made_with_the_tls_of_its_moment(tmp_path) -> None:
    authority = Authority(tmp_path)
    serving = server_tls(authority.issue("backend", ["gpu.example"]))
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=serving)
    port = server.sockets[0].getsockname()[1]
    contexts = [client_tls(authority.cert), ssl.create_default_context()]
    pool = Pool(endpoint(host="gpu.example", scheme="https", port=port), lambda: contexts.pop(0))
    async with server:
        connection = await pool.connect()
        assert connection.transport.get_extra_info("ssl_object").server_hostname == "gpu.example"
        with pytest.raises(ssl.SSLCertVerificationError):
            await pool.connect()
        connection.close()
        server.close()
