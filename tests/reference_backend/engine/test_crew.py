"""A worker of two ranks: real processes, which say what one says and die together; and each end of it alone."""

import asyncio
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.crew import crew_of  # noqa: E402
from reference_backend.engine.frames import (  # noqa: E402
    Abort,
    Ask,
    Lockstep,
    Start,
    decode_for_server,
    decode_for_worker,
    framed,
)
from reference_backend.engine.request import Sampling, Sequence  # noqa: E402
from reference_backend.engine.service import Line, RankGone, follow, serve  # noqa: E402
from reference_backend.tensors import ANYHOW  # noqa: E402
from reference_backend.worker import Worker  # noqa: E402
from tests.support.tiny_model import DIRECTORY, tiny_engine  # noqa: E402

START = Start(str(DIRECTORY), [], 4, 256, None, ranks=2)
ASKED = [
    ([5, 9, 2], Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)),
    (list(range(30, 90)), Sampling(max_tokens=6, temperature=0.8, top_p=0.9, seed=4, ignore_eos=True)),
    ([7], Sampling(max_tokens=9, temperature=1.0, seed=5, repetition_penalty=1.2, ignore_eos=True)),
]


def alone():
    """What one process says."""
    engine = tiny_engine()
    sequences = [Sequence(list(prompt), sampling) for prompt, sampling in ASKED]
    for each in sequences:
        engine.submit(each)
    while engine.is_busy:
        engine.turn(0.0)
    return [each.generated for each in sequences]


@pytest.mark.integration
async def test_two_ranks_say_what_one_says_and_die_together():
    worker, heard = Worker(START, 8, time.monotonic), [[] for _ in ASKED]
    ended = [asyncio.Event() for _ in ASKED]

    def deliver(number):
        def take(delta):
            heard[number].append(delta.token)
            if delta.finish is not None:
                ended[number].set()

        return take

    def submit(number):
        prompt, sampling = ASKED[number]
        return worker.submit(list(prompt), sampling, ANYHOW, deliver(number))

    async with asyncio.timeout(110), worker.running():
        for _ in range(2):
            for number in range(len(ASKED)):
                submit(number)
            for each in ended:
                await each.wait()
                each.clear()
            assert heard == alone()
            for each in heard:
                each.clear()
            await worker.sleep()
            await worker.wake()
        worker.abort(submit(0))  # what is taken back is taken back on both
        [first] = children(os.getpid())
        [second] = children(first)
        os.kill(second, signal.SIGKILL)  # while nothing is asked
        await worker.wait_lost()
        assert not worker.is_ready
    assert children(os.getpid()) == []


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_the_first_hears_the_others_hear():
    server, ours = Pipe()
    others = [Pipe() for _ in range(2)]
    line = Line(ours, [end for end, _ in others])
    step = Lockstep([Abort(3)], 1.5, None)
    line.pass_on(step)
    assert [decode_for_worker(theirs.recv_bytes()) for _, theirs in others] == [step] * 2
    server.close()
    assert line.read(wait=True) is None


def test_a_rank_that_is_gone_is_noticed_when_it_should_hear():
    (_, ours), (end, theirs) = Pipe(), Pipe()
    line = Line(ours, [end])
    theirs.close()
    with pytest.raises(RankGone):
        line.pass_on(Lockstep([], 0.0, None))


def test_a_rank_that_is_gone_ends_who_waits_for_requests(caplog):
    (_server, ours), (end, theirs) = Pipe(), Pipe()
    theirs.close()
    assert serve(tiny_engine(), Line(ours, [end]), time.monotonic) == 1
    assert "another rank is gone" in caplog.text


@pytest.mark.parametrize("start", [replace(START, ranks=1), replace(START, rank=1)])
def test_one_alone_and_one_that_was_started_have_no_others(start):
    with crew_of(start) as (told, others):
        assert (told, others) == (start, [])


def test_who_follows_takes_the_same_turns():
    """Two engines in one process, without sums: deadlines, pieces of prompts and seeds are as the first decides."""
    ours, server = socket.socketpair()
    end, theirs = Pipe()
    leading, following = tiny_engine(), tiny_engine()
    for each in (leading, following):
        each._rng = Random(3)
    times, codes = iter(range(1000)), []
    line = Line(Connection(ours.detach()), [end])
    threads = [
        threading.Thread(target=lambda: codes.append(follow(following, Line(theirs)))),
        threading.Thread(target=lambda: codes.append(serve(leading, line, lambda: float(next(times))))),
    ]
    told = {}
    for name, engine in (("first", leading), ("second", following)):
        told[name] = []
        turn = engine.turn

        def turned(now, turn=turn, kept=told[name]):
            published = turn(now)
            kept.append((now, [(each.arrival, delta) for each, delta in published]))
            return published

        engine.turn = turned
    with theirs:
        for each in threads:
            each.start()
        with server:
            for number, deadline in enumerate([None, 40.0, None]):
                asked = Ask(number, [4 + number] * 40, Sampling(max_tokens=30, ignore_eos=True), deadline, 1, "", b"")
                server.sendall(framed(asked))
            ended = 0
            while ended < 3:
                size = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
                turn = decode_for_server(server.recv(size, socket.MSG_WAITALL))
                ended += sum(delta.finish is not None for _, delta in turn.deltas)
        threads[1].join()
        end.close()
        threads[0].join()
    assert codes == [0, 0]
    assert told["first"] == told["second"]
    assert {delta.finish for _, deltas in told["first"] for _, delta in deltas} == {None, "length", "deadline"}
    assert leading._pace.readable() == following._pace.readable()
