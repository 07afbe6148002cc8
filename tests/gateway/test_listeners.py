"""Ports that cannot be taken, files that do not suffice, and others who serve."""

import asyncio
import errno
import json
import socket

import pytest

from gateway.config_fields import Address
from gateway.listeners import cannot_listen, most_connections, wait_useful
from tests.support.ports import free_port
from tests.support.running_gateway import running_gateway, until

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EADDRINUSE, "x"), "127.0.0.1:80 is in use; stop what listens there, or set another `listen`"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "cannot listen on 127.0.0.1:80: Permission denied; set another `listen`",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "cannot listen on 127.0.0.1:80: Name or service not known; set another `listen`",
        ),
        (
            OSError(errno.EADDRNOTAVAIL, "error while attempting to bind on address ('9.9.9.9', 80): cannot assign"),
            "cannot listen on 127.0.0.1:80: Cannot assign requested address; set another `listen`",
        ),
        (OSError("odd"), "cannot listen on 127.0.0.1:80: odd; set another `listen`"),
    ],
)
def test_why_it_cannot_listen(error, says) -> None:
    assert str(cannot_listen("listen", Address("127.0.0.1", 80), error)) == says


@pytest.mark.parametrize(
    ("wanted", "files", "most"),
    [
        (20_000, 1_048_576, 20_000),
        (20_000, 1024, 448),
        (20_000, 256, 64),
        (20_000, 20, 16),
        (10, 20, 10),
        (20_000, -1, 20_000),
    ],
)
def test_there_are_no_more_clients_than_files_can_be_opened_for(wanted, files, most) -> None:
    assert most_connections(wanted, files) == most


async def test_the_operator_is_told_that_files_allow_fewer_clients(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("gateway.listeners.resource.getrlimit", lambda _: (256, 256))
    async with running_gateway(tmp_path):
        pass
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["connections"], line["open_files"]) for line in lines if "fewer" in line["event"]] == [(64, 256)]


async def test_who_is_of_no_use_waits_as_long_as_somebody_else_serves() -> None:
    address, looks = Address("127.0.0.1", free_port()), []

    async def note(_, writer) -> None:
        looks.append(writer)
        writer.close()

    other = await asyncio.start_server(note, address.host, address.port)
    waiting = asyncio.create_task(wait_useful(address, lambda: False))
    await until(lambda: len(looks) == 2)
    assert not waiting.done()
    other.close()
    await asyncio.wait_for(waiting, 10)


async def test_who_is_of_use_looks_at_nobody() -> None:
    await wait_useful(Address("127.0.0.1", -1), lambda: True)
