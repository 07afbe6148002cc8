"""`weir serve` with two workers: one port, no failed request while one of them dies and comes back knowing nothing, one
line when it cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import app
from gateway import config as configuration
from gateway.config_fields import Address
from tests.support.certificates import Authority, client_tls, serial_at
from tests.support.etcd_server import EtcdServer
from tests.support.ports import free_port, free_ports
from tests.support.running_gateway import announced

pytestmark = pytest.mark.integration

POLICY = """\
version: 1
anonymous: true
routes:
  - name: all
    to: [{service: llm}]
"""


def static(backend):
    return f"static: [{{service: llm, url: 'http://127.0.0.1:{backend}', models: [m]}}]"


def config(discovery, data, admin):
    return (
        f"listen: 127.0.0.1:{data}\nadmin: {{listen: '127.0.0.1:{admin}'}}\nworkers: 2\npolicy: policy.yaml\n"
        f"discovery:\n  {discovery}\n"
    )


@contextlib.asynccontextmanager
async def serve(folder, discovery, data, admin, more="", stderr=asyncio.subprocess.PIPE):
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "weir.yaml").write_text(config(discovery, data, admin) + more)
    command = (sys.executable, "-m", "gateway.cli", "serve", "--config", str(folder / "weir.yaml"))
    process = await asyncio.create_subprocess_exec(*command, stderr=stderr)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def worker_of(pid, number):
    """The process of this worker of a `weir serve`."""
    mark = f"--worker\0{number}\0".encode()
    return next(child for child in children_of(pid) if mark in Path(f"/proc/{child}/cmdline").read_bytes())


async def answer(request):
    return web.json_response({})


@pytest.fixture
async def backend():
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        yield server.port


async def ask(session, port):
    async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"model": "m"}) as reply:
        return reply.status


async def until_answered(session, port):
    while True:
        try:
            if await ask(session, port) == 200:
                return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)


async def page(session, port, path):
    try:
        async with session.get(f"http://127.0.0.1:{port}{path}") as reply:
            return f"{reply.status} {await reply.text()}"
    except aiohttp.ClientError:
        return ""


async def until_ready(session, port):
    while not (await page(session, port, "/readyz")).startswith("200"):
        await asyncio.sleep(0.05)


async def until_said(process, text, times=1):
    for _ in range(times):
        while text not in await process.stderr.readline():
            pass


async def test_a_worker_that_dies_is_replaced_while_the_other_serves(tmp_path, backend):
    port = free_ports(3)[0]
    fresh = aiohttp.TCPConnector(force_close=True)  # each request may meet either worker
    async with (
        asyncio.timeout(60),
        serve(tmp_path, static(backend), data=port, admin=port + 1) as process,
        aiohttp.ClientSession(connector=fresh) as session,
    ):
        await until_said(process, b"is ready", times=2)
        await until_answered(session, port)
        before = children_of(process.pid)
        os.kill(before[0], signal.SIGKILL)
        await until_said(process, b"was ended by SIGKILL; starting it again")
        assert [await ask(session, port) for _ in range(50)] == [200] * 50
        while len(children_of(process.pid)) < 2:
            await asyncio.sleep(0.02)
        assert before[1] in children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_worker_that_comes_back_while_etcd_is_away_leaves_requests_to_the_other(tmp_path, backend):
    port = free_ports(3)[0]
    with EtcdServer(tmp_path) as etcd:
        fresh = aiohttp.TCPConnector(force_close=True)
        async with (
            asyncio.timeout(90),
            announced(etcd.url, "llm/1", f"http://127.0.0.1:{backend}", models=("m",)),
            serve(tmp_path, f"etcd: {{endpoints: ['{etcd.url}']}}", data=port, admin=port + 1) as process,
            aiohttp.ClientSession(connector=fresh) as session,
        ):
            await until_said(process, b"is ready", times=2)
            for worker in range(2):
                await until_ready(session, port + 1 + worker)
            etcd.pause()
            os.kill(worker_of(process.pid, 1), signal.SIGKILL)
            await until_said(process, b"was ended by SIGKILL; starting it again")
            told = ""
            while "discovery has not listed the backends yet" not in told:
                assert await ask(session, port) == 200
                told = await page(session, port + 2, "/readyz")
            assert "the data port is not open yet" in told
            assert [await ask(session, port) for _ in range(50)] == [200] * 50
            etcd.resume()
            await until_ready(session, port + 2)
            os.kill(worker_of(process.pid, 0), signal.SIGKILL)
            await until_answered(session, port)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_the_first_worker_to_know_nothing_says_so_to_clients(tmp_path, monkeypatch):
    monkeypatch.setattr("gateway.sources.FIRST_LIST_SECONDS", 0.05)
    port, nobody = free_ports(3)[0], free_port()
    (tmp_path / "policy.yaml").write_text(POLICY)
    text = config(f"etcd: {{endpoints: ['http://127.0.0.1:{nobody}']}}", port, port + 1)
    gateway = app.Gateway(configuration.parse(text.encode(), {}, base=tmp_path), worker=1)
    async with gateway.running(), aiohttp.ClientSession() as session:
        async with asyncio.timeout(30):
            while not gateway.is_listening:
                await asyncio.sleep(0.01)
        assert await ask(session, port) == 503


@contextlib.asynccontextmanager
async def neighbour(port):
    """Somebody else who listens on the shared port; the set has what it takes for connections."""
    seen = []

    async def note(_, writer):
        seen.append(writer)
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", port, reuse_port=True):
        yield seen


@pytest.mark.parametrize("comes", ["a backend", "the end of its patience", "the end of the other"])
async def test_a_worker_that_finds_an_empty_etcd_leaves_requests_to_the_other_for_a_while(
    tmp_path, backend, monkeypatch, comes
):
    port = free_ports(3)[0]
    (tmp_path / "policy.yaml").write_text(POLICY)
    if comes == "the end of its patience":
        monkeypatch.setattr(app, "GRACE_SECONDS", 0.5)
    with EtcdServer(tmp_path) as etcd:
        text = config(f"etcd: {{endpoints: ['{etcd.url}']}}", port, port + 1)
        gateway = app.Gateway(configuration.parse(text.encode(), {}, base=tmp_path), worker=1)
        async with contextlib.AsyncExitStack() as stack, asyncio.timeout(30):
            other = contextlib.AsyncExitStack()
            seen = await other.enter_async_context(neighbour(port))
            stack.push_async_callback(other.aclose)
            await stack.enter_async_context(gateway.running())
            while len(seen) < 2:  # it has looked again
                await asyncio.sleep(0.01)
            assert gateway.discovery.watch.revision
            assert not gateway.is_listening
            if comes == "a backend":
                url = f"http://127.0.0.1:{backend}"
                await stack.enter_async_context(announced(etcd.url, "llm/1", url, models=("m",)))
            elif comes == "the end of the other":
                await other.aclose()
            while not gateway.is_listening:
                await asyncio.sleep(0.01)
            assert bool(gateway.fleet.backends) == (comes == "a backend")


async def test_a_worker_starts_while_the_policy_is_bad_and_serves_by_the_last_good_one(tmp_path, backend):
    port = free_ports(3)[0]
    async with (
        asyncio.timeout(90),
        serve(tmp_path, static(backend), data=port, admin=port + 1) as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
    ):
        await until_said(process, b"is ready", times=2)
        (tmp_path / "policy.yaml").write_text("version: 1\nroutes: [")
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        await until_said(process, b"was ended by SIGKILL; starting it again")
        await until_ready(session, port + 2)
        told = json.loads((await page(session, port + 2, "/api/policy")).partition(" ")[2])
        assert "policy.yaml:3:1 not YAML" in told["last_error"]["errors"][0]
        assert [await ask(session, port) for _ in range(50)] == [200] * 50
        (tmp_path / "policy.yaml").write_text(POLICY.replace("all", "everything"))
        while '"last_error":null' not in (await page(session, port + 2, "/api/policy")).replace(" ", ""):
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def fill(pipe):
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe, b" " * 65536):
            pass
    os.set_blocking(pipe, True)


async def test_workers_are_looked_after_while_nobody_takes_what_is_said_of_them(tmp_path, backend):
    port = free_ports(3)[0]
    reading, writing = os.pipe()
    with open(reading, "rb") as said, open(writing, "wb") as errors:
        async with (
            asyncio.timeout(90),
            serve(tmp_path, static(backend), data=port, admin=port + 1, stderr=errors) as process,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        ):
            for _ in range(2):
                assert b"is ready" in await asyncio.to_thread(said.readline)
            fill(writing)
            for _ in range(2):  # the first end is told, the second waits for that
                before = worker_of(process.pid, 1)
                os.kill(before, signal.SIGKILL)
                while before in children_of(process.pid):
                    await asyncio.sleep(0.02)
                await until_ready(session, port + 2)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def wait_certificates_read(session, admin, count):
    """Until both workers have read the listener's certificates that often."""
    for port in (admin, admin + 1):
        told = f'weir_tls_reload_total{{result="ok",use="listener"}} {count}.0'
        while True:
            async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                if told in await answer.text():
                    break
            await asyncio.sleep(0.05)


async def test_every_worker_takes_a_renewed_certificate_at_once_and_at_sighup(tmp_path, backend):
    port, authority = free_ports(3)[0], Authority(tmp_path)
    pair, tls, data = authority.issue("gateway", ["127.0.0.1"]), client_tls(authority.cert), Address("127.0.0.1", port)
    more = f"tls: {{cert: {pair.cert}, key: {pair.key}}}\n"
    async with (
        asyncio.timeout(60),
        serve(tmp_path, static(backend), data=port, admin=port + 1, more=more) as process,
        aiohttp.ClientSession() as session,
    ):
        await until_said(process, b"is ready", times=2)
        await wait_certificates_read(session, port + 1, 1)
        authority.issue("renewed", ["127.0.0.1"]).put_in_place_of(pair)
        await wait_certificates_read(session, port + 1, 2)
        assert {await serial_at(data, tls) for _ in range(20)} == {pair.serial}
        process.send_signal(signal.SIGHUP)
        await wait_certificates_read(session, port + 1, 3)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_port_in_use_ends_all_of_it_with_3(tmp_path, backend):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with serve(tmp_path, static(backend), data=taken.getsockname()[1], admin=free_ports(2)[0]) as process:
            _, told = await process.communicate()
    assert process.returncode == 3
    assert b"is in use; stop what listens there, or set another `listen`" in told
    assert b"Traceback" not in told
