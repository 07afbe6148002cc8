"""Worker processes, shown on a small server that binds as a worker does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import SimpleNamespace

import aiohttp
import pytest

from gateway import children, workers
from gateway.children import CannotRun, ChildFailed, Program
from gateway.config_fields import Address
from tests.support.ports import free_ports
from tests.support.running_gateway import until

pytestmark = pytest.mark.integration

# Answers its pid on the shared port and 200 on its own.
WORKER = """
import asyncio, os, signal, socket, sys
data, admin = map(int, sys.argv[1:])
async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    pid = str(os.getpid()).encode()
    writer.write(b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\ncontent-length: %d\\r\\n\\r\\n%b" % (len(pid), pid))
    await writer.drain()
    writer.close()
async def main():
    await asyncio.start_server(answer, "127.0.0.1", data, reuse_port=True)
    await asyncio.start_server(answer, "127.0.0.1", admin)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
asyncio.run(main())
"""


@pytest.fixture
def config():
    first = free_ports(3)[0]  # worker i listens on the admin port + i
    admin = SimpleNamespace(listen=Address("127.0.0.1", first + 1))
    return SimpleNamespace(listen=Address("127.0.0.1", first), admin=admin, grpc=None, workers=2)


@pytest.fixture
def small_worker(config, monkeypatch):
    def worker(path, number, kept, is_ready):
        admin = config.admin.listen.port + number
        argv = (sys.executable, "-I", "-S", "-c", WORKER, str(config.listen.port), str(admin))
        return Program(f"worker-{number}", argv, is_ready=is_ready)

    monkeypatch.setattr(workers, "worker", worker)
    monkeypatch.setattr(children, "FIRST_PAUSE", 0.01)


async def pids_of(port, count):
    """Who answers there, asked until so many different ones have."""
    found = set()
    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        while len(found) < count:
            try:
                async with session.get(f"http://127.0.0.1:{port}/") as answer:
                    found.add(int(await answer.text()))
            except aiohttp.ClientError:
                await asyncio.sleep(0.005)
    return found


async def test_all_answer_on_one_port_and_one_that_dies_is_replaced(config, small_worker):
    said = []
    running = asyncio.create_task(workers.run_workers(None, config, said.append))
    admin = config.admin.listen.port
    [first], [second] = await pids_of(admin, 1), await pids_of(admin + 1, 1)
    assert await pids_of(config.listen.port, 2) == {first, second}
    await until(lambda: {"worker-0 is ready", "worker-1 is ready"} <= set(said))  # before it, an end is a failed start
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        while (successor := (await pids_of(admin, 1)).pop()) == first:
            await asyncio.sleep(0.005)
    assert await pids_of(config.listen.port, 2) == {successor, second}
    assert "worker-0 was ended by SIGKILL; starting it again" in said
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    for pid in (successor, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_worker_that_cannot_start_ends_the_whole(config, monkeypatch):
    def worker(path, number, kept, is_ready):
        return Program(f"worker-{number}", (sys.executable, "-c", f"raise SystemExit({3 * number})"), is_ready=is_ready)

    config.workers = 2
    monkeypatch.setattr(workers, "worker", worker)
    with pytest.raises(ChildFailed, match="ended with exit code"):
        await workers.run_workers(None, config, print)


async def test_port_0_cannot_be_shared(config):
    config.grpc = SimpleNamespace(listen=Address("127.0.0.1", 0))
    with pytest.raises(CannotRun, match="several workers cannot share port 0"):
        await workers.run_workers(None, config, print)
    config.grpc, config.listen = None, Address("127.0.0.1", 0)
    with pytest.raises(CannotRun, match="several workers cannot share port 0"):
        await workers.run_workers(None, config, print)


def test_a_worker_is_serve_with_its_number(tmp_path):
    program = workers.worker(tmp_path / "weir.yaml", 2, 5, None)
    command = f"-m gateway.cli serve --config {tmp_path}/weir.yaml --worker 2 --last-good 5"
    assert program.argv[1:] == tuple(command.split())
    assert (program.descriptors, program.log) == ((5,), None)
