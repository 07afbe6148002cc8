"""What stands behind the gateways: nginx with a fixed JSON answer, a source of events, and a sink for traces.

They share the load generator's core. Each kind listens on two ports, which are two backends to whoever balances.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.payloads import ANSWER
from benchmarks.processes import HOST, Failed, Process, free_ports, wait_port

PORTS = 2

NGINX = """\
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 100000000; keepalive_timeout 3600s; client_max_body_size 64m;
    client_body_temp_path temp; default_type application/json;
    server {{ {listen} location / {{ return 200 '{answer}'; }} }}
}}
"""


@dataclass(frozen=True, slots=True)
class Backends:
    """Two addresses, and the process behind them."""

    ports: tuple[int, ...]
    process: Process

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(f"http://{HOST}:{port}" for port in self.ports)


def json_backends(folder: Path, cores: set[int]) -> Backends:
    """nginx: the same answer to every method and path, health checks and trace exports too."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise Failed("nginx is not there, and it is the backend of every workload; apt-get install nginx-light")
    folder.mkdir()
    ports = free_ports(PORTS)
    listen = " ".join(f"listen {HOST}:{port} reuseport backlog=4096;" for port in ports)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(listen=listen, answer=ANSWER.decode()))
    process = Process(
        "mock backend", [nginx, "-p", str(folder), "-c", str(config)], cores=cores, log=folder / "mock.log"
    )
    wait_port(ports[-1])
    return Backends(tuple(ports), process)


def event_backends(folder: Path, cores: set[int], *, interval: float, events: int) -> Backends:
    """Streams of `events` events, `interval` seconds apart."""
    folder.mkdir()
    ports = free_ports(PORTS)
    argv = [sys.executable, "-m", "benchmarks.event_source", str(interval), str(events), *map(str, ports)]
    root = str(Path(__file__).parent.parent)
    process = Process("event source", argv, cores=cores, log=folder / "events.log", env={"PYTHONPATH": root})
    wait_port(ports[-1])
    return Backends(tuple(ports), process)
