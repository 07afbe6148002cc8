"""`weir register` as a process, with a real etcd: what gateways see while its command lives, drains and ends."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import pytest

from discovery.endpoint import id_of_place
from discovery.etcd import EtcdClient, EtcdSettings, EtcdSource
from tests.support.etcd_server import EtcdServer

pytestmark = pytest.mark.integration

KEY = f"s/{id_of_place('http://127.0.0.1:9')}"

# Notes each signal; ends on SIGTERM with code 7.
COMMAND = """
import signal, sys, time
def note(text): open(sys.argv[1], "a").write(text + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (note("term"), time.sleep(0.2), sys.exit(7)))
signal.signal(signal.SIGHUP, lambda *_: note("hup"))
note("ready")
while True: time.sleep(60)
"""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def registered(etcd):
    """Reads what is registered: id -> value."""
    async with EtcdClient(EtcdSettings(endpoints=(etcd.url,))) as client:
        source = EtcdSource(client, "/weir/v1/backends/", 1 << 20)

        async def read():
            return {item.key: json.loads(item.value) for item in (await source.list()).items}

        yield read


async def start(*arguments):
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.cli", "register", *arguments, stderr=asyncio.subprocess.PIPE
    )


async def until(condition):
    async with asyncio.timeout(60):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
    return value


async def test_registered_while_the_command_runs_draining_before_it_ends(etcd, registered, tmp_path):
    notes = tmp_path / "notes"
    process = await start(
        "--service", "s", "--url", "http://127.0.0.1:9", "--model", "m", "--etcd", etcd.url,
        "--", sys.executable, "-c", COMMAND, str(notes),
    )  # fmt: skip
    assert await process.stderr.readline() == f"weir: {KEY} is registered\n".encode()
    value = (await registered())[KEY]
    assert (value["url"], value["models"]) == ("http://127.0.0.1:9", [{"name": "m"}])

    async def has_noted(word):
        return notes.exists() and word in notes.read_text()

    await until(lambda: has_noted("ready"))
    # One after the other has arrived: two that are pending together have no order.
    process.send_signal(signal.SIGHUP)
    await until(lambda: has_noted("hup"))
    process.send_signal(signal.SIGTERM)

    async def is_draining():
        return (await registered()).get(KEY, {}).get("state") == "draining"

    await until(is_draining)
    assert await process.wait() == 7
    assert await registered() == {}
    assert notes.read_text().split() == ["ready", "hup", "term"]
    assert await process.stderr.read() == b""


async def test_the_end_of_the_command_is_the_end(etcd, registered):
    process = await start(
        "--service", "s", "--url", "http://127.0.0.1:9", "--etcd", etcd.url, "--", "/bin/sh", "-c", "kill -KILL $$"
    )
    await process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert await registered() == {}


async def test_without_a_command_until_it_is_told_to_end(etcd, registered):
    process = await start("--service", "s", "--url", "http://127.0.0.1:9", "--etcd", etcd.url)
    assert b"is registered" in await process.stderr.readline()
    assert KEY in await registered()
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 0
    assert await registered() == {}


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--url", "ftp://a", "--", "true"), 2, "weir: no gateway would take this registration: "),
        (("--url", "nonsense"), 2, "weir: no gateway would take this registration: url: expected http:// or https://"),
        (("--url", "http://a:1", "--", "/no/such"), 3, "weir: cannot start /no/such: No such file or directory"),
        (
            ("--url", "http://a:1", "--etcd", "127.0.0.1:2379"),
            2,
            "weir: --etcd: `127.0.0.1:2379` is not an http(s) URL",
        ),
    ],
)
async def test_what_cannot_be(arguments, code, line):
    process = await start("--service", "s", *arguments)
    _, told = await process.communicate()
    assert process.returncode == code
    assert told.decode().startswith(line)
    assert told.count(b"\n") == 1
