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
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reference_backend.engine.frames import Abort, Ask, Join, Lockstep, Sleep, Start, Wake, framed

END_WITHIN = 5.0  # seconds for a rank to see that its socket is closed


class RankGone(Exception):  # noqa: N818  what has happened, in a word
    """Another rank of this worker has ended."""


class Crew:
    """The first rank's side of the others; of none, most often."""

    def __init__(self, sockets: list[socket.socket], meeting: Path | None) -> None:
        self.sockets = sockets
        self.meeting = meeting

    @property
    def size(self) -> int:
        return 1 + len(self.sockets)

    def join(self, start: Start, seed: int) -> None:
        """Have them load the model. Raises RankGone."""
        for rank, each in enumerate(self.sockets, start=1):
            self._send(each, Join(start, rank, str(self.meeting), seed))

    def step(self, messages: list[Ask | Abort | Sleep | Wake], now: float, took: float | None) -> None:
        """Have them take the turn that this one takes. Raises RankGone."""
        for each in self.sockets:
            self._send(each, Lockstep(messages, now, took))

    @staticmethod
    def _send(connection: socket.socket, message: Join | Lockstep) -> None:
        try:
            connection.sendall(framed(message))
        except ConnectionError as error:
            raise RankGone from error


@contextlib.contextmanager
def crew_of(size: int) -> Iterator[Crew]:
    """So many ranks, this one counted; the others are processes that end with this block."""
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        if size == 1:
            yield Crew([], None)
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-ranks-")))
        crew = Crew([], folder / "meeting")
        for _ in range(size - 1):
            ours, theirs = socket.socketpair()
            crew.sockets.append(stack.enter_context(ours))
            with theirs:
                descriptor = theirs.fileno()
                command = [sys.executable, "-m", "reference_backend.engine.service", str(descriptor)]
                processes.append(subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL))  # noqa: S603  our own
        try:
            yield crew
        finally:
            for each in crew.sockets:
                each.close()
            for process in processes:
                try:
                    process.wait(END_WITHIN)
                except subprocess.TimeoutExpired:  # in a sum that nobody else will come to
                    process.kill()
                    process.wait()
