"""Several processes behind one port, for more than one core.

Each worker is `weir serve` with its number: all bind the data port with SO_REUSEPORT, so that the kernel shares out the
connections, and worker i has its admin listener at the admin port + i. A worker is a replica like any other: nothing
passes between workers, or between them and this process, but signals and the text of the last good policy.

A worker that dies is started again. One that cannot start at all ends the whole, because it would not start the next
time either.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from gateway.children import CannotRun, Program, Supervisor, run_until_signalled
from gateway.config import Config
from gateway.config_fields import Address
from gateway.last_good import unnamed_file
from gateway.stack import PROBE_TIMEOUT, Probe

REACHED_BY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  a listener on every address


async def run_workers(path: Path, config: Config, say: Callable[[str], None]) -> None:
    """Runs `config.workers` of them until SIGTERM or SIGINT, which let them drain. Raises CannotRun.

    SIGHUP is passed on; a second SIGTERM ends them at once.
    """
    admin = config.admin.listen
    if 0 in (admin.port, config.listen.port, config.grpc.listen.port if config.grpc is not None else -1):
        raise CannotRun(
            "several workers cannot share port 0; name the ports in `listen`, `admin.listen` and `grpc.listen`"
        )
    host = REACHED_BY.get(admin.host, admin.host)
    with unnamed_file() as kept:
        async with aiohttp.ClientSession(timeout=PROBE_TIMEOUT) as session:
            probe = Probe(session)
            programs = [
                worker(path, number, kept, probe.answers(f"http://{Address(host, admin.port + number)}/livez"))
                for number in range(config.workers)
            ]
            await run_until_signalled(Supervisor([programs], say), nothing_more, pass_on=[signal.SIGHUP])


def worker(path: Path, number: int, kept: int, is_ready: Callable[[], Awaitable[bool]]) -> Program:
    """One worker. It writes where we write, and drains as long as its requests take."""
    argv = (
        sys.executable, "-m", "gateway.cli", "serve", "--config", str(path), "--worker", str(number),
        "--last-good", str(kept),
    )  # fmt: skip
    return Program(f"worker-{number}", argv, descriptors=(kept,), is_ready=is_ready)


async def nothing_more() -> None:
    """Workers that are ready need nothing else."""
