"""`weir up`: etcd, Redis, reference backends and the gateway on this machine, until Ctrl-C.

Stages start one after another: stores, backends, gateway. The start is over when the gateway lists a model to a caller
with a token: what the box then prints works as pasted. Every address is of loopback; ports that nobody has to know are
chosen at each start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich.console import Console

from gateway import children
from gateway.children import CannotRun, Program
from gateway.home import AUDIENCE, ISSUER, SERVICE, Home
from policies import identity

HOST = "127.0.0.1"
GRACE = 10.0  # for streams in flight; a second Ctrl-C does not wait for it
TOKEN_TTL = 24 * 3600.0
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    port: int = 8080
    admin_port: int = 8081
    backends: int = 2
    model: str = "tiny"
    redis: bool = True
    directory: Path = field(default_factory=lambda: Path(".weir"))


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports chosen at this start."""

    etcd: int
    etcd_peer: int
    redis: int
    backends: tuple[int, ...]

    @classmethod
    def choose(cls, backends: int) -> Ports:
        """Ports that nobody listens on now, all different."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(3 + backends)]
            etcd, peer, redis, *rest = (each.getsockname()[1] for each in sockets)
            return cls(etcd, peer, redis, tuple(rest))


async def up(options: Options, console: Console, wall: Callable[[], float]) -> None:
    """Runs until a signal. Raises CannotRun; leaves nothing running either way."""
    home = Home(options.directory)
    with home.locked():
        _check_needs(options)
        home.prepare()
        token = identity.mint(
            home.key.read_bytes(), sub="you", groups=["team"], issuer=ISSUER, audience=AUDIENCE, ttl=TOKEN_TTL, wall=wall()
        )  # fmt: skip
        async with aiohttp.ClientSession(timeout=PROBE_TIMEOUT) as session:
            await _run(options, home, Probe(session, token), console)
    console.print("everything is stopped", highlight=False)


async def _run(options: Options, home: Home, probe: Probe, console: Console) -> None:
    progress = Progress(console)

    async def show_box() -> None:
        progress.end()
        models = await probe.models(options.port)
        _print_box(console, options, probe.token, models[0])

    stages = plan(options, home, Ports.choose(options.backends), probe)
    for program in (program for stage in stages for program in stage):
        progress.follow(program)
    supervisor = children.Supervisor(stages, progress.say)
    ...
