"""The socket to a process, with and without one: what comes in pieces, what ends, and that nothing is left behind."""

import asyncio
import os
import signal
import socket

import pytest

from reference_backend import link as subject
from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Abort, Ping, decode_for_worker, framed
from reference_backend.link import Link, linked, spawned


class Told(Link[Abort]):
    def __init__(self):
        super().__init__(decode_for_worker)
        self.taken, self.ends = [], 0

    def take(self, message):
        self.taken.append(message)
        if not self.opened.done():
            self.opened.set_result(message)

    def end(self):
        assert not self.lost.is_set()  # whoever sees that it is has been told
        self.ends += 1


async def test_messages_come_whole_and_its_end_is_told_once():
    ours, theirs = socket.socketpair()
    theirs.send(framed(Abort(1)))
    async with asyncio.timeout(20), linked(Told, ours, Abort(7)) as link:
        assert theirs.recv(100) == framed(Abort(7)) + framed(Ping())
        assert link.opened.result() == Abort(1)
        for byte in framed(Abort(2)) + framed(Abort(3)):
            theirs.send(bytes([byte]))
        while len(link.taken) < 3:
            await asyncio.sleep(0.001)
        assert link.taken == [Abort(1), Abort(2), Abort(3)]
        theirs.close()
        await link.lost.wait()
        link.send(Abort(7))
        link.cut()
    assert link.ends == 1


async def test_it_is_cut_when_nobody_wants_it_any_more():
    ours, theirs = socket.socketpair()
    theirs.send(framed(Abort(1)))
    async with linked(Told, ours, Abort(7)) as link:
        assert theirs.recv(100) == framed(Abort(7)) + framed(Ping())
    assert (theirs.recv(1), link.ends) == (b"", 1)
    theirs.close()


async def test_one_that_opens_nothing_is_told():
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ModelError, match="ended while it loaded"):
        async with linked(Told, ours, Abort(7)):
            raise AssertionError("it is gone")


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
