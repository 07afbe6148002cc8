"""Processes of the rig: started on one core, told when they serve, accounted by the kernel, ended by their id.

Each is the leader of a session of its own, so that whatever it forks is counted with it and ends with it: a session is
what `/proc/PID/stat` names in its sixth field (proc(5)). CPU is `utime + stime` of every process of that session. The
kernel dies them with this process (PR_SET_PDEATHSIG), so that an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.children import die_with

HOST = "127.0.0.1"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
END_SECONDS = 5.0


class Failed(Exception):  # noqa: N818  one line for the user
    """Something of the rig does not run: what, and where its last words are."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a session have used until now, and hold."""

    cpu_seconds: float
    rss_bytes: int


class Process:
    """A program that runs on `cores`, its output in `log`."""

    def __init__(
        self, name: str, argv: Sequence[str], *, cores: set[int], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        bind = die_with(os.getpid())

        def prepare() -> None:
            os.sched_setaffinity(0, cores)
            if bind is not None:
                bind()

        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                cwd=log.parent,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509  no thread of ours runs while programs are started
            )

    def __repr__(self) -> str:
        return f"<Process {self.name} pid {self._popen.pid} code {self._popen.returncode}>"

    @property
    def pid(self) -> int:
        """Its own id, and that of its session."""
        return self._popen.pid

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def usage(self) -> Usage:
        """CPU and memory of everything that it started and still runs. Raises Failed when it has ended."""
        if self.has_ended():
            raise Failed(f"{self.name} ended with code {self._popen.returncode}{self.last_words()}")
        found = [stat for stat in _stats() if stat.session == self.pid]
        return Usage(sum(stat.ticks for stat in found) / TICKS, sum(stat.pages for stat in found) * PAGE)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Everything that it started stands still meanwhile: some do not rest while they have nothing to do."""
        stopped = [stat.pid for stat in _stats() if stat.session == self.pid]
        try:
            for pid in stopped:
                _send(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                _send(pid, signal.SIGCONT)

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f" ({lines[-1].strip()[:200]})" if lines else ""

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to its session and to nobody else."""
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(END_SECONDS)
        finally:  # whoever is told to end a second time while it waits leaves nothing, either
            self._signal(signal.SIGKILL)
            self._popen.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    session: int
    ticks: int
    pages: int


def parse_stat(text: str) -> _Stat:
    """One /proc/PID/stat. The second field is a name in brackets that may hold anything, brackets and spaces too."""
    fields = text.rpartition(")")[2].split()
    return _Stat(
        int(text.partition(" ")[0]),
        session=int(fields[3]),
        ticks=int(fields[11]) + int(fields[12]),
        pages=int(fields[21]),
    )


def _stats() -> Iterator[_Stat]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield parse_stat(Path(entry.path, "stat").read_text())


def core_busy_seconds(core: int) -> float:
    """What this core has worked until now, what the hypervisor took from it included."""
    with open("/proc/stat") as file:
        return parse_busy(file.read(), core) / TICKS


def parse_busy(text: str, core: int) -> int:
    """The ticks of one core in /proc/stat that were not idle (fields 4 and 5 are; the last two are in others)."""
    for line in text.splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, *rest = map(int, fields[:8])
            return user + nice + system + sum(rest)
    raise Failed(f"/proc/stat does not know core {core}")


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_healthy(url: str, seconds: float) -> None:
    """Until what is there answers with 200. Raises Failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):  # other statuses are OSErrors, too
            return
        time.sleep(0.05)
    raise Failed(f"{url} is not healthy after {seconds:.0f} s")


def wait_port(port: int, seconds: float = 20.0) -> None:
    """Until something accepts there. Raises Failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.05)
    raise Failed(f"nothing listens on port {port} after {seconds:.0f} s")
