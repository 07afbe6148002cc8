"""All that stands around the clients: two gateways as programs, six backends, etcd, Redis, an identity provider.

Gateway `a` has two workers, of which the second may be killed; gateway `b` is one process that is drained and started
again. Both find etcd and Redis behind proxies that may break. `World.broken` puts one fault into force for as long as
it is entered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Self

import aiohttp

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import DEFAULT_PREFIX, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from gateway.children import die_with
from gateway.config_fields import Address
from policies.identity import generate_signing_key, jwks_of, mint
from tests.soak.backends import SoakBackend
from tests.soak.judgement import INTRUDER, LIMITED, NOMAD
from tests.soak.schedule import SERVICES, Fault, Kind
from tests.soak.vitals import Vitals, children_of, read_vitals
from tests.support.admin_client import Scrape
from tests.support.etcd_server import EtcdServer
from tests.support.fault_proxy import FaultProxy
from tests.support.jwks_server import JwksServer, jwks_server, silence
from tests.support.ports import free_ports
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).parent.parent.parent
HOST = "127.0.0.1"
IDP = "https://idp.soak.example"
READY_SECONDS = 300.0  # the policy may be bad at each of a worker's starts, which come 30 s apart then
TOKEN_SECONDS = 20_000.0

POLICY = """\
version: 1
issuers:
  - {{issuer: "{idp}", audience: weir, algorithms: [ES256], jwks: "{jwks}"}}
plans:
  gold: {{concurrency: 1000}}
  silver: {{requests: 1000/second, burst: 1000, concurrency: 1000}}
  small: {{requests: 3/second, burst: 3}}
consumers:
  - {{match: {{consumer: silver}}, plan: silver}}
  - {{match: {{consumer: {limited}}}, plan: small}}
  - {{match: {{any: true}}, plan: gold}}
routes:
  - name: chat
    match: {{path: /v1/chat/completions}}
    to: [{{service: chat}}]
    timeout: {{connect: 1s, first_byte: 4s, idle: 4s, total: 30s}}
    retry: {{attempts: 3, budget: 100%}}
    breaker: {{of_at_least: 5, open: {rest}s}}
  - name: embed
    match: {{path: /v1/embeddings}}
    to: [{{service: embed}}]
    timeout: {{connect: 1s, first_byte: 4s, idle: 4s, total: 30s}}
    retry: {{attempts: 3, budget: 100%, idempotent: true}}
    breaker: {{of_at_least: 5, open: {rest}s}}
"""


class GatewayProcess:
    """A `weir serve` with its configuration in `folder`. `ready`: it may be called, as a balancer would know it."""

    def __init__(self, name: str, folder: Path, workers: int, etcd: str, redis: str) -> None:
        self.name, self.folder, self.workers = name, folder, workers
        folder.mkdir()
        first = free_ports(1 + workers)[0]
        self.address, self.admin = Address(HOST, first), first + 1
        self.ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        [nobody] = free_ports(1)
        config = {
            "listen": str(self.address),
            "admin": {"listen": f"{HOST}:{self.admin}"},
            "workers": workers,
            "policy": "policy.yaml",
            "discovery": {"etcd": {"endpoints": [etcd]}},
            "redis": {"url": redis},
            "telemetry": {"otlp": f"http://{HOST}:{nobody}", "sample": 0.05},  # a collector that is never there
        }
        (folder / "weir.yaml").write_text(json.dumps(config))  # YAML holds JSON

    @property
    def log(self) -> Path:
        return self.folder / "access.log"

    @property
    def complaints(self) -> Path:
        return self.folder / "stderr.log"

    async def start(self) -> None:
        """Start it, again and again as an operator's supervisor would: with a bad policy it ends at once."""
        async with asyncio.timeout(READY_SECONDS):
            process = self._process = await self._spawn()
            for number in range(self.workers):
                while not await _is_ready(f"http://{HOST}:{self.admin + number}/readyz"):
                    if process.returncode is not None:
                        process = self._process = await self._spawn()
                    await asyncio.sleep(0.1)
        self.ready.set()

    async def _spawn(self) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log, self.complaints.open("ab") as complaints:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway.cli", "serve", "--config", str(self.folder / "weir.yaml")),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=complaints,
                cwd=ROOT,
                preexec_fn=die_with(os.getpid()),
            )

    async def drain(self) -> None:
        """SIGTERM, and wait for its end. Clients go on calling until nobody listens any more."""
        assert self._process is not None
        self.ready.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(120):
            code = await self._process.wait()
        assert code == 0, f"gateway {self.name} ended with {code}: see {self.complaints}"

    async def kill_worker(self, number: int) -> None:
        """SIGKILL, and wait until its successor is ready."""
        killed = self.pid_of(number)
        os.kill(killed, signal.SIGKILL)
        while self.pid_of(number) in (0, killed):
            await asyncio.sleep(0.05)
        async with asyncio.timeout(READY_SECONDS):
            while not await _is_ready(f"http://{HOST}:{self.admin + number}/readyz"):
                await asyncio.sleep(0.1)

    def pid_of(self, worker: int) -> int:
        """The process of a worker; 0 while there is none. A gateway of one worker is that itself."""
        assert self._process is not None
        if self.workers == 1:
            return self._process.pid
        mark = f"--worker\0{worker}\0".encode()
        return next((pid for pid in children_of(self._process.pid) if mark in _command_line(pid)), 0)

    async def vitals(self) -> dict[str, Vitals]:
        """How each worker is, by its name."""
        found = {}
        for number in range(self.workers):
            scrape = Scrape(await _read(f"http://{HOST}:{self.admin + number}/metrics"))
            found[f"{self.name}{number}"] = read_vitals(self.pid_of(number), scrape)
        return found


class World:
    """`async with World(folder, rng) as world`: everything runs, and every gateway is ready."""

    def __init__(self, folder: Path, rng: Random) -> None:
        self._folder = folder
        self._rng = rng
        self._swaps = 0
        self._keys = [generate_signing_key()]
        self._tokens = {each: _token(each, self._keys[0]) for each in ("gold", "silver", LIMITED, NOMAD)}
        self._tokens[INTRUDER] = _token("gold", self._keys[0])[:-40] + "A" * 40  # the signature is not his
        self.backends = {name: SoakBackend(name, rng) for names in SERVICES.values() for name in names}
        self.gateways: dict[str, GatewayProcess] = {}

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for part in ("etcd", "redis"):
                (self._folder / part).mkdir()
            self._etcd = stack.enter_context(EtcdServer(self._folder / "etcd"))
            self._redis = stack.enter_context(RedisServer(self._folder / "redis"))
            self._etcd_line = await stack.enter_async_context(FaultProxy(self._etcd.port))
            self._redis_line = await stack.enter_async_context(FaultProxy(self._redis.port))
            self._idp: JwksServer = await stack.enter_async_context(jwks_server(_jwks(self._keys)))
            self._registered: dict[str, contextlib.AsyncExitStack] = {}
            for name, backend in self.backends.items():
                await stack.enter_async_context(backend)
                self._registered[name] = await stack.enter_async_context(contextlib.AsyncExitStack())
                announcement = await self._register(name)
                await announcement.wait_held()
            redis = f"redis://{HOST}:{self._redis_line.port}/0"
            for name, workers in (("a", 2), ("b", 1)):
                gateway = GatewayProcess(name, self._folder / name, workers, self._etcd_line.url, redis)
                self.gateways[name] = gateway
                self._put_policy(gateway)
                await gateway.start()
                stack.push_async_callback(gateway.drain)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def token(self, consumer: str) -> str:
        return self._tokens[consumer]

    async def vitals(self) -> dict[str, Vitals]:
        return {name: each for gateway in self.gateways.values() for name, each in (await gateway.vitals()).items()}

    # Faults

    @contextlib.asynccontextmanager
    async def broken(self, fault: Fault) -> AsyncIterator[None]:
        """This fault is in force as long as this is entered, and undone when it is left."""
        way: contextlib.AbstractAsyncContextManager[None]
        if fault.kind is Kind.FLAP:
            way = self._flapping(fault.target)
        elif fault.kind is Kind.WITHDRAW:
            way = self._withdrawn(fault.target)
        elif fault.target in self.backends:
            way = self.backends[fault.target].broken(fault.kind)
        else:
            way = self._ways[fault.kind](self)
        async with way:
            yield

    @contextlib.asynccontextmanager
    async def _withdrawn(self, name: str) -> AsyncIterator[None]:
        await self._registered[name].aclose()
        yield
        await self._register(name)

    @contextlib.asynccontextmanager
    async def _flapping(self, name: str) -> AsyncIterator[None]:
        flapping = asyncio.create_task(self._flap(name))
        yield
        flapping.cancel()
        await asyncio.wait([flapping])
        await self._registered[name].aclose()
        await self._register(name)

    async def _flap(self, name: str) -> None:
        while True:
            await self._registered[name].aclose()
            announcement = await self._register(name)
            with contextlib.suppress(TimeoutError):  # etcd is away, too
                async with asyncio.timeout(1):
                    await announcement.wait_held()
            await asyncio.sleep(0.05)

    async def _register(self, name: str) -> Announcement:
        """Registered as soon as etcd is there."""
        key = f"{name.partition('-')[0]}/{name}"
        client = await self._registered[name].enter_async_context(EtcdClient(EtcdSettings((self._etcd.url,))))
        announcement = backend_announcement(client, key, Registration(self.backends[name].url), rng=self._rng)
        return await self._registered[name].enter_async_context(announcement)

    @contextlib.asynccontextmanager
    async def _etcd_killed(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self._etcd.kill)
        yield
        await asyncio.to_thread(self._etcd.start)

    @contextlib.asynccontextmanager
    async def _etcd_frozen(self) -> AsyncIterator[None]:
        self._etcd.pause()
        yield
        self._etcd.resume()

    @contextlib.asynccontextmanager
    async def _etcd_wiped(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self._etcd.wipe)
        yield

    @contextlib.asynccontextmanager
    async def _etcd_compacted(self) -> AsyncIterator[None]:
        async with self._refused(self._etcd_line):
            yield
            await asyncio.to_thread(_compact, self._etcd.url)

    @contextlib.asynccontextmanager
    async def _hole(self, line: FaultProxy) -> AsyncIterator[None]:
        line.black_hole = line.to_server.swallows = line.to_client.swallows = True
        yield
        await line.heal()

    @contextlib.asynccontextmanager
    async def _refused(self, line: FaultProxy) -> AsyncIterator[None]:
        await line.refuse()
        await line.reset()
        yield
        await line.listen()

    @contextlib.asynccontextmanager
    async def _redis_killed(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self._redis.kill)
        yield
        await asyncio.to_thread(self._redis.start)

    @contextlib.asynccontextmanager
    async def _redis_frozen(self) -> AsyncIterator[None]:
        self._redis.pause()
        yield
        self._redis.resume()

    @contextlib.asynccontextmanager
    async def _redis_flushed(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self._redis.flush)
        yield

    @contextlib.asynccontextmanager
    async def _redis_slow(self) -> AsyncIterator[None]:
        self._redis_line.to_client.latency = 1.0
        yield
        self._redis_line.to_client.latency = 0.0

    @contextlib.asynccontextmanager
    async def _policy_swapped(self) -> AsyncIterator[None]:
        for gateway in self.gateways.values():
            self._put_policy(gateway)
        yield

    @contextlib.asynccontextmanager
    async def _policy_bad(self) -> AsyncIterator[None]:
        for gateway in self.gateways.values():
            _rename_over(gateway.folder / "policy.yaml", "version: 1\nroutes: []\nrouts: 7\n")
        yield
        for gateway in self.gateways.values():
            self._put_policy(gateway)

    @contextlib.asynccontextmanager
    async def _policy_half(self) -> AsyncIterator[None]:
        text = self._policy()
        for gateway in self.gateways.values():
            (gateway.folder / "policy.yaml").write_text(text[: len(text) // 2])
        yield
        for gateway in self.gateways.values():
            with (gateway.folder / "policy.yaml").open("a") as file:
                file.write(text[len(text) // 2 :])

    @contextlib.asynccontextmanager
    async def _policy_gone(self) -> AsyncIterator[None]:
        for gateway in self.gateways.values():
            (gateway.folder / "policy.yaml").unlink()
        yield
        for gateway in self.gateways.values():
            self._put_policy(gateway)

    @contextlib.asynccontextmanager
    async def _keys_error(self) -> AsyncIterator[None]:
        self._idp.status = 500
        self._rotate()
        yield
        self._idp.status = 200

    @contextlib.asynccontextmanager
    async def _keys_silent(self) -> AsyncIterator[None]:
        self._idp.answer = silence
        self._rotate()
        yield
        self._idp.answer = None

    @contextlib.asynccontextmanager
    async def _keys_rotated(self) -> AsyncIterator[None]:
        self._rotate()
        yield

    @contextlib.asynccontextmanager
    async def _worker_killed(self) -> AsyncIterator[None]:
        await self.gateways["a"].kill_worker(1)
        yield

    @contextlib.asynccontextmanager
    async def _drained(self) -> AsyncIterator[None]:
        await self.gateways["b"].drain()
        await self.gateways["b"].start()
        yield

    _ways: dict[Kind, Callable[[World], contextlib.AbstractAsyncContextManager[None]]] = {
        Kind.ETCD_KILL: _etcd_killed,
        Kind.ETCD_FREEZE: _etcd_frozen,
        Kind.ETCD_HOLE: lambda self: self._hole(self._etcd_line),
        Kind.ETCD_RESET: lambda self: self._refused(self._etcd_line),
        Kind.ETCD_COMPACT: _etcd_compacted,
        Kind.ETCD_WIPE: _etcd_wiped,
        Kind.REDIS_KILL: _redis_killed,
        Kind.REDIS_FREEZE: _redis_frozen,
        Kind.REDIS_FLUSH: _redis_flushed,
        Kind.REDIS_SLOW: _redis_slow,
        Kind.REDIS_RESET: lambda self: self._refused(self._redis_line),
        Kind.POLICY_SWAP: _policy_swapped,
        Kind.POLICY_BAD: _policy_bad,
        Kind.POLICY_HALF: _policy_half,
        Kind.POLICY_GONE: _policy_gone,
        Kind.KEYS_ERROR: _keys_error,
        Kind.KEYS_SILENT: _keys_silent,
        Kind.KEYS_ROTATE: _keys_rotated,
        Kind.WORKER_KILL: _worker_killed,
        Kind.DRAIN: _drained,
    }

    def _policy(self) -> str:
        """Another one each time: how long a breaker rests differs."""
        self._swaps += 1
        text = POLICY.format(idp=IDP, jwks=self._idp.url, limited=LIMITED, rest=2 + self._swaps % 2)
        return f"{text}# {self._swaps}\n"

    def _put_policy(self, gateway: GatewayProcess) -> None:
        _rename_over(gateway.folder / "policy.yaml", self._policy())

    def _rotate(self) -> None:
        """A new key beside the last two; the nomad's next token is of it."""
        self._keys = [*self._keys[:1], *self._keys[-1:], generate_signing_key()]
        self._idp.document = _jwks(self._keys)
        self._tokens[NOMAD] = _token(NOMAD, self._keys[-1])


def _token(consumer: str, key: bytes) -> str:
    return mint(key, sub=consumer, issuer=IDP, audience="weir", ttl=TOKEN_SECONDS, wall=time.time())


def _jwks(keys: list[bytes]) -> bytes:
    """The key set that an identity provider publishes for these."""
    unique = dict.fromkeys(keys)
    return json.dumps({"keys": [key for each in unique for key in json.loads(jwks_of(each))["keys"]]}).encode()


def _rename_over(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def _compact(etcd: str) -> None:
    """A backend comes and goes, and the history of it is thrown away."""
    key = b64encode(f"{DEFAULT_PREFIX}/backends/other/ghost".encode()).decode()
    _post(f"{etcd}/v3/kv/put", {"key": key, "value": b64encode(b'{"url": "http://127.0.0.1:9"}').decode()})
    gone = _post(f"{etcd}/v3/kv/deleterange", {"key": key})
    _post(f"{etcd}/v3/kv/compaction", {"revision": gone["header"]["revision"], "physical": True})


def _post(url: str, document: object) -> dict[str, dict[str, str]]:
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(document).encode()), timeout=5) as answer:
        told: dict[str, dict[str, str]] = json.load(answer)
        return told


async def _read(url: str) -> str:
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
        return await answer.text()


async def _is_ready(url: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=1)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
