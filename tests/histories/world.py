"""One run: etcd, Redis, backends, two gateways as processes, clients, and what the run does to them.

    async with World(home, seed=1) as world:
        await world.play(register=5, withdraw=3, sicken=2, restart_etcd=1)
        history = await world.end()

Everything that happens is written down as `history.py` has it. All choices are the seed's; what comes of them is not, for
processes and sockets have a mind of their own: a history that fails is kept whole in the failure's message, not replayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from discovery.endpoint import ModelEntry, encode
from discovery.endpoint import Registration as Written
from gateway.admission import bucket_key
from gateway.config_fields import Address
from policies.identity import generate_signing_key, jwks_of, mint
from tests.histories.etcd_writer import EtcdWriter
from tests.histories.history import (
    Answered,
    Attempt,
    BreakerChange,
    Change,
    Ended,
    History,
    Registration,
    Seen,
    Trouble,
    View,
)
from tests.support.etcd_server import EtcdServer
from tests.support.namespaces import Node
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

ROOT = Path(__file__).parents[2]
PREFIX = "/weir/v1/backends/"
ISSUER = "https://idp.example"
PACED_RATE, PACED_BURST, COUNTED_BURST, PROBES = 60, 30, 100_000, 2
GATEWAYS = ("g1", "g2")
BACKENDS = 4
SETTLE_SECONDS = 20.0

POLICY = f"""
version: 1
issuers: [{{issuer: "{ISSUER}", audience: weir, algorithms: [ES256], jwks: keys.json}}]
plans:
  paced: {{requests: {PACED_RATE}/second, burst: {PACED_BURST}}}
  counted: {{requests: 1/month, burst: {COUNTED_BURST}}}
consumers:
  - {{match: {{consumer: counted}}, plan: counted}}
  - {{match: {{any: true}}, plan: paced}}
routes:
  - name: all
    to: [{{service: tiny}}]
    balance: round_robin
    timeout: {{connect: 1s, first_byte: 2s, idle: 2s, total: 5s}}
    retry: {{attempts: 2, budget: 50%, idempotent: true}}
    breaker: {{failures: 50%, of_at_least: 3, window: 500ms, open: 500ms, probes: {PROBES}, eject_at_most: 60%}}
"""


class World:
    """`nodes` are machines of their own for the gateways (tests/support/namespaces.py); without, all is on loopback."""

    def __init__(
        self,
        home: Path,
        *,
        seed: int,
        nodes: Iterable[Node] = (),
        here: str = "127.0.0.1",
        store_seconds: float = 5.0,
    ) -> None:
        self.rng = random.Random(seed)  # of the steps alone: how many requests there were changes none of them
        self._chance = random.Random(seed + 1)
        self.history = History(gateways=GATEWAYS)
        self.nodes = {node.name: node for node in nodes}
        self._home = home
        self._store_seconds = store_seconds  # how long a request waits for Redis
        self._here = here  # where gateways reach the backends
        self._key = generate_signing_key()
        self._numbers = iter(range(1, 1_000_000))
        self._stack = contextlib.AsyncExitStack()
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._addresses: dict[str, Address] = {}
        self._ending = False
        self._clients: list[asyncio.Task[None]] = []
        self._moods: dict[int, str] = {}  # of a backend: well | sick | slow
        self.backends: list[ScriptedBackend] = []
        self.registered = self.history.registered  # what etcd has

    # Beginning and end

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            listen = "0.0.0.0" if self.nodes else "127.0.0.1"
            self.etcd = stack.enter_context(EtcdServer(self._home, listen=listen))
            open_to_all = ("--protected-mode", "no")
            self.redis = stack.enter_context(RedisServer(self._home, listen=listen, arguments=open_to_all))
            self.writer = await stack.enter_async_context(EtcdWriter(self.etcd.url))
            for number in range(BACKENDS):
                backend = ScriptedBackend(self._script(number), host=self._here)
                self.backends.append(await stack.enter_async_context(backend))
            (self._home / "keys.json").write_bytes(jwks_of(self._key))
            (self._home / "policy.yaml").write_text(POLICY)
            for number in range(BACKENDS):
                await self.put(f"tiny/{number}", number)
            for name in self.history.gateways:
                await self._start_gateway(name)
            for name in self.history.gateways:
                await self._wait_ready(name)
            self._stack = stack.pop_all()
        self._clients = [asyncio.create_task(client) for client in self._all_clients()]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()
        await self._stack.aclose()

    async def end(self) -> History:
        """Let everything come to rest, stop, and return what happened."""
        await self._wait_settled()
        self._ending = True
        await asyncio.gather(*self._clients)
        self._clients = []
        await self._wait_tokens_returned()
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for name, process in self._processes.items():
            assert await asyncio.wait_for(process.wait(), 20) == 0, (self._home / f"{name}.log").read_text()[-3000:]
        level = self.redis.command("HGET", bucket_key("counted", "counted"), "level")
        self.history.charged["counted"] = round(COUNTED_BURST - int(level or 0) / 1e6)
        for name in self.history.gateways:
            self._read_record(name)
        self.history.views.sort(key=lambda view: view.at)
        return self.history

    async def _start_gateway(self, name: str) -> None:
        node = self.nodes.get(name)
        at = node.own["data"] if node else "127.0.0.1"
        etcd = f"http://{node.addresses['etcd'] if node else '127.0.0.1'}:{self.etcd.port}"
        redis = f"redis://{node.addresses['redis'] if node else '127.0.0.1'}:{self.redis.port}/0"
        file = self._home / f"{name}.yaml"
        discovery = {"etcd": {"endpoints": [etcd]}, "allow_networks": ["127.0.0.0/8", "198.18.0.0/15"]}
        file.write_text(
            f"listen: {at}:0\nadmin: {{listen: 127.0.0.1:0}}\npolicy: policy.yaml\n"
            f"discovery: {json.dumps(discovery)}\nredis: {{url: {redis}}}\n"
        )
        words = [sys.executable, "-m", "tests.histories.recording_gateway", str(file), str(self._record(name)), name]
        words.append(str(self._store_seconds))
        with (self._home / f"{name}.log").open("wb") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *(node.command(words) if node else words),
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    async def _wait_ready(self, name: str) -> None:
        process = self._processes[name]

        def ready() -> bool:
            assert process.returncode is None, (self._home / f"{name}.log").read_text()[-3000:]
            return any(line["kind"] == "ready" for line in self._lines(name))

        await until(ready, 100)
        (line,) = (line for line in self._lines(name) if line["kind"] == "ready")
        host, _, port = line["data"].rpartition(":")
        self._addresses[name] = Address(host, int(port))

    async def _wait_settled(self) -> None:
        """Until each gateway shows what etcd has, and has nothing to wait for; or for as long as that may take."""
        _, found = await self.writer.list(PREFIX)
        assert {key.removeprefix(PREFIX) for key in found} == set(self.registered)
        wanted = {key: [seen.number, seen.address] for key, seen in self.registered.items()}

        def settled() -> bool:
            for name in self.history.gateways:
                lines = self._lines(name)
                view = next(line for line in reversed(lines) if line["kind"] == "view")
                pulse = next((line for line in reversed(lines) if line["kind"] == "pulse"), None)
                if {key: seen[:2] for key, seen in view["backends"].items()} != wanted:
                    return False
                if pulse is None or pulse["at"] < view["at"] or pulse["waiting"] or pulse["state"] != "watching":
                    return False
            return True

        with contextlib.suppress(TimeoutError):
            await until(settled, SETTLE_SECONDS)

    async def _wait_tokens_returned(self) -> None:
        """Until Redis has been told of every token that was not spent."""
        since = time.perf_counter()

        def returned() -> bool:
            beats = [next(line for line in reversed(self._lines(name)) if line["kind"] == "pulse") for name in GATEWAYS]
            return all(beat["at"] > since and not beat["unreturned"] for beat in beats)

        await until(returned, 15)

    # Doing things

    async def play(self, **deck: int) -> None:
        """Take each step so many times, in an order that the seed chooses, with pauses between."""
        steps = [name for name, count in deck.items() for _ in range(count)]
        self.rng.shuffle(steps)
        for step in steps:
            await getattr(self, step)()
            await asyncio.sleep(self.rng.uniform(0.02, 0.2))

    async def put(self, key: str, backend: int, lease: str = "0") -> None:
        registration = Registration(next(self._numbers), f"{self._here}:{self.backends[backend].port}")
        written = Written(self.backends[backend].url, models=(ModelEntry("tiny"),), zone=str(registration.number))
        revision = await self.writer.put(PREFIX + key, encode(written), lease)
        self.registered[key] = registration
        self.history.changes.append(Change(time.perf_counter(), revision, key, registration))

    async def delete(self, key: str) -> None:
        revision = await self.writer.delete(PREFIX + key)
        self._note_deleted(key, revision)

    def _note_deleted(self, key: str, revision: int) -> None:
        del self.registered[key]
        self.history.changes.append(Change(time.perf_counter(), revision, key, None))

    async def register(self) -> None:
        """A backend comes, or comes again, perhaps elsewhere."""
        await self.put(f"tiny/{self.rng.randrange(6)}", self.rng.randrange(BACKENDS))

    async def withdraw(self) -> None:
        if len(self.registered) > 1:
            await self.delete(self.rng.choice(sorted(self.registered)))

    async def flap(self) -> None:
        key, backend = f"tiny/{self.rng.randrange(6)}", self.rng.randrange(BACKENDS)
        for _ in range(self.rng.randrange(2, 6)):
            await self.put(key, backend)
            await self.delete(key)
        await self.put(key, backend)

    async def lapse(self) -> None:
        """A registration whose lease nobody renews."""
        key = f"tiny/{self.rng.randrange(6)}"
        await self.put(key, self.rng.randrange(BACKENDS), await self.writer.grant(1))
        async with asyncio.timeout(10):
            while True:
                revision, found = await self.writer.list(PREFIX + key)
                if not found:
                    break
                await asyncio.sleep(0.02)
        self._note_deleted(key, revision)

    async def restart_etcd(self) -> None:
        with self._trouble("etcd"):
            await asyncio.to_thread(self.etcd.kill)
            await asyncio.sleep(self.rng.uniform(0.0, 0.6))
            await asyncio.to_thread(self.etcd.start)

    async def freeze_etcd(self) -> None:
        with self._trouble("etcd"):
            self.etcd.pause()
            await asyncio.sleep(self.rng.uniform(0.2, 1.5))
            self.etcd.resume()

    async def restart_redis(self) -> None:
        with self._trouble("redis", lost=True):
            await asyncio.to_thread(self.redis.kill)
            await asyncio.sleep(self.rng.uniform(0.0, 0.6))
            await asyncio.to_thread(self.redis.start)

    async def freeze_redis(self) -> None:
        with self._trouble("redis"):
            self.redis.pause()
            await asyncio.sleep(self.rng.uniform(0.05, 1.0))
            self.redis.resume()

    async def flush_redis(self) -> None:
        with self._trouble("redis", lost=True):
            self.redis.flush()

    async def sicken(self) -> None:
        """A backend fails for a while, and not at once: others come while it is tried again."""
        await self._mood("sick")

    async def slow_down(self) -> None:
        await self._mood("slow")

    async def _mood(self, mood: str) -> None:
        asked = {registration.address for registration in self.registered.values()}
        number = self.rng.choice([n for n in range(BACKENDS) if f"{self._here}:{self.backends[n].port}" in asked])
        self._moods[number] = mood
        await asyncio.sleep(self.rng.uniform(0.8, 1.4))
        self._moods[number] = "well"

    async def cut(self, gateway: str, line: str, seconds: float) -> None:
        """One gateway is cut off from etcd, Redis or its peer, while registrations go on changing."""
        end = time.perf_counter() + seconds
        with self._trouble(line, gateway):
            self.nodes[gateway].cut(line)
            while time.perf_counter() < end:
                await self.play(register=2, withdraw=1)
            self.nodes[gateway].mend(line)

    @contextlib.contextmanager
    def _trouble(self, what: str, *gateways: str, lost: bool = False):
        begin = time.perf_counter()
        yield
        whom = frozenset(gateways or self.history.gateways)
        self.history.troubles.append(Trouble(what, whom, begin, time.perf_counter(), lost))

    # Backends and clients

    def _script(self, number: int):
        async def script(connection: BackendConnection) -> None:
            request = connection.header("x-request-id")
            self.history.arrivals[request] = self.history.arrivals.get(request, 0) + 1
            mood = self._moods.get(number, "well")
            if mood != "well":
                await asyncio.sleep(self._chance.uniform(0.05, 0.3))
            if mood == "sick" and self._chance.random() < 0.9:
                if self._chance.random() < 0.3:
                    raise Hangup
                await connection.json({"error": "sick"}, 500)
            elif json.loads(connection.body).get("stream"):
                await connection.events("{}", "{}")
            else:
                await connection.json({})

        return script

    def _all_clients(self):
        for gateway in self.history.gateways:
            for number in range(2):
                yield self._client(gateway, "paced", number)
                yield self._client(gateway, "counted", number)
            yield self._leaving_client(gateway, "counted")

    def _lines_of(self, request: str, consumer: str) -> tuple[str, str]:
        token = mint(self._key, sub=consumer, issuer=ISSUER, audience="weir", ttl=600.0, wall=time.time())
        return f"x-request-id: {request}", f"authorization: Bearer {token}"

    async def _client(self, gateway: str, consumer: str, number: int) -> None:
        _, login = self._lines_of("", consumer)
        asked = 0
        while not self._ending:
            with contextlib.suppress(OSError):
                async with RawClient(self._addresses[gateway]) as client:
                    going = True
                    while going and not self._ending:
                        asked += 1
                        going = await self._ask(
                            client, gateway, consumer, f"{gateway}-{consumer}-{number}-{asked}", login
                        )
                        await asyncio.sleep(self._chance.uniform(0.005, 0.04))

    async def _ask(self, client: RawClient, gateway: str, consumer: str, request: str, login: str) -> bool:
        """Whether the connection is good for another one."""
        sent, status, going = time.perf_counter(), 0, False
        document = {**CHAT, "stream": True} if self._chance.random() < 0.2 else None
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            answer = await asyncio.wait_for(client.ask(document, f"x-request-id: {request}", login), 15)
            if answer.whole:
                status, going = answer.status, answer.headers.get("connection") != "close"
        self.history.answered.append(Answered(request, gateway, consumer, sent, time.perf_counter(), status))
        return going

    async def _leaving_client(self, gateway: str, consumer: str) -> None:
        """Sends requests and does not wait for the answers."""
        _, login = self._lines_of("", consumer)
        asked = 0
        while not self._ending:
            asked += 1
            request, sent = f"{gateway}-{consumer}-leaving-{asked}", time.perf_counter()
            with contextlib.suppress(OSError):
                async with RawClient(self._addresses[gateway]) as client:
                    client.send(chat_request(None, f"x-request-id: {request}", login))
                    await asyncio.sleep(self._chance.uniform(0.0, 0.006))
                    client.writer.transport.abort()
            self.history.answered.append(Answered(request, gateway, consumer, sent, time.perf_counter(), 0))
            await asyncio.sleep(self._chance.uniform(0.02, 0.1))

    # Records of the gateways

    def _record(self, name: str) -> Path:
        return self._home / f"{name}.record"

    def _lines(self, name: str) -> list[dict]:
        file = self._record(name)
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def _read_record(self, name: str) -> None:
        history, beats = self.history, []
        for line in self._lines(name):
            match line["kind"]:
                case "view":
                    backends = {
                        key: Seen(Registration(number, address), life)
                        for key, (number, address, life) in line["backends"].items()
                    }
                    history.views.append(View(line["at"], name, line["revision"], backends))
                case "breaker":
                    history.breakers.append(BreakerChange(line["at"], name, line["key"], line["life"], line["state"]))
                case "pulse":
                    beats.append(line["at"])
                    if line["state"] == "stale":
                        history.noticed.add((name, "etcd"))
                    if not line["is_store_up"]:
                        history.noticed.add((name, "redis"))
                case "ended":
                    request = line["request"]
                    attempts = tuple(
                        Attempt(request, name, key, began, began + seconds, outcome)
                        for key, began, seconds, outcome in line["attempts"]
                    )
                    ended = Ended(request, name, line["consumer"], line["status"], line["code"], attempts)
                    history.ended.append(ended)
        gaps = (later - before for before, later in zip(beats, beats[1:], strict=False))
        history.stall = max(history.stall, *gaps, 0.0)
