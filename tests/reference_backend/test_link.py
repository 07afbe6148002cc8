"""The socket to a process, with and without one: what comes in pieces, what ends, and that nothing is left behind."""

import asyncio
import os
import signal
import socket

import pytest

from reference_backend import link as subject
from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Abort, encode, framed
from reference_backend.link import Link, linked, spawned


class Told(Link[bytes]):
    def __init__(self):
        super().__init__()
        self.taken, self.ends = [], 0

    def take(self, body):
        self.taken.append(body)
        if not self.opened.done():
            self.opened.set_result(body)

    def end(self):
        assert not self.lost.is_set()  # whoever sees that it is has been told
        self.ends += 1


async def test_messages_come_whole_and_its_end_is_told_once():
    ours, theirs = socket.socketpair()
    async with asyncio.timeout(20), linked(Told, ours) as link:
        link.send(Abort(7))
        assert theirs.recv(100) == framed(Abort(7))
        for byte in framed(Abort(1)) + framed(Abort(2)):
            theirs.send(bytes([byte]))
        assert await link.opened == encode(Abort(1))
        while len(link.taken) < 2:
            await asyncio.sleep(0.001)
        theirs.close()
        await link.lost.wait()
        link.send(Abort(7))
        link.cut()
    assert link.ends == 1


async def test_it_is_cut_when_nobody_wants_it_any_more():
    ours, theirs = socket.socketpair()
    async with linked(Told, ours) as link:
        pass
    assert theirs.recv(1) == b""
    theirs.close()
    with pytest.raises(ModelError, match="ended while it loaded"):
        await link.opened


@pytest.mark.integration
async def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(subject, "END_WITHIN", 0.1)
    async with asyncio.timeout(60), spawned("reference_backend.tensor_service"):
        [child] = _children()
        os.kill(child, signal.SIGSTOP)
    assert _children() == []


async def test_a_process_that_the_system_does_not_give_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="no process can be started for the model: .*No such file"):
        async with spawned("reference_backend.tensor_service"):
            raise AssertionError("there is none")


def _children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
