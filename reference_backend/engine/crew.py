"""The ranks of one worker: the first one starts the others, and has them do whatever it does.

All run the same engine. The first hands on what it hears from the server, together with what no two processes would
see alike: its clock at the turn, and how long the one before took. From equal messages follow equal turns, and within
them equal sums (`ranks.py`), so nothing else is said.

A rank that is gone ends the worker, as a crash does: the first sees the socket of another close, or a sum fail; the
others see the first one's. Messages go through sockets and not through torch's process group, in which nobody may
wait longer than a sum may take.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe

from msgspec.structs import replace

from reference_backend.engine.frames import Start, encode

END_WITHIN = 5.0  # seconds for a rank to see that its socket is closed


@contextlib.contextmanager
def crew_of(start: Start) -> Iterator[tuple[Start, list[Connection]]]:
    """What this process is to load, and the sockets to other ranks: if it is the first of several, it starts them.

    They end with this block.
    """
    if start.rank or start.ranks == 1:
        yield start, []
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-ranks-"))
        start = replace(start, meeting=f"{folder}/meeting", seed=secrets.randbits(64))
        others = [stack.enter_context(_another()) for _ in range(1, start.ranks)]
        for rank, each in enumerate(others, start=1):
            each.send_bytes(encode(replace(start, rank=rank)))
        yield start, others


@contextlib.contextmanager
def _another() -> Iterator[Connection]:
    """Another process like this one, and the socket to it."""
    ours, theirs = Pipe()
    with ours:
        with theirs:
            command = [sys.executable, "-m", "reference_backend.engine.service", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603  our own
        try:
            yield ours
        finally:
            ours.close()
            try:
                process.wait(END_WITHIN)
            except subprocess.TimeoutExpired:  # in a sum that nobody else will come to
                process.kill()
                process.wait()
