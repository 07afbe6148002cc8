"""What must hold whatever broke: the fixture `row` checks it after each row of the fault matrix.

    async def test_A05_...(row):
        async with ScriptedBackend(script) as backend, row.gateway(backend.url, policy=...) as gateway:
            async with RawClient(gateway.data_address) as client:
                ...                             # the fault, and what the client sees
        assert row.lines[0]["end_reason"] == "upstream_protocol"    # the access log, once the gateway has stopped

`row.gateway` takes what `running_gateway` takes. Any other gateway of this process is watched by
`row.around(etcd_gateway(...))`, and the log of one that runs as a process of its own is looked at by `row.read_log(text)`.
Every ScriptedBackend, FaultProxy and RawClient that the test makes is known to the row; nothing has to be told to it.

During the test a **bystander**, another tenant with a token and a backend of its own (service and model `calm`), asks
again and again; `bystander=False` goes without, for rows where nobody can be served. `row.policy(text)` is any policy
with that tenant's issuer, plan and route added, and a plan for everybody else where it has none (PLAN, which never
refills, so that what was charged can be counted). A row that writes policies of its own passes them through it. Where
backends come from etcd the row announces `row.calm.url` as "calm/1" with the models ("calm",).

When the body of the `with` has ended, clients closed, this holds, or the test fails:

    I1  each request has one access line, with one end_reason, and the status that its client saw
    I2  no more attempts than its route allows, none for what was refused; no backend saw a request more often than that
        (one more where a connection from the pool was found dead)
    I3  what was charged to each plan that never refills is what its requests came to
    I4  no token, no Authorization and nothing in `row.secrets` in any answer, log line, metric or span; no backend's
        address either, and no traceback unless `row.expects_traceback`
    I5  requests, relays, places, gauges, tasks and descriptors are back where they were (`row.more_tasks` and
        `row.more_descriptors` say how many more a row leaves on purpose); memory grew by less than MOST_GROWTH
    I6  all requests of the bystander were answered with 200

`row.token(sub)` is a token that such a policy accepts. `row.requests(gateway)` are the records of requests that are not the bystander's, newest first. A test prints nothing to
stdout: that is where the gateway's log goes, and each line of it must be JSON.
"""

import asyncio
import contextlib
import gc
import json
import os
import re
import time
from collections import Counter

import pytest
import uvloop
import yaml

from gateway.meter import LocalMeter
from observability.events import END_REASONS
from observability.tracing import spans
from policies.identity import generate_signing_key, jwks_of, mint
from tests.support.admin_client import scrape
from tests.support.fault_proxy import FaultProxy
from tests.support.raw_client import Answer, RawClient
from tests.support.running_gateway import OPEN_POLICY, running_gateway, until
from tests.support.scripted_backend import ScriptedBackend

ISSUER = "https://row.example"
BYSTANDER = "bystander"
CALM = {"model": "calm", "messages": [{"role": "user", "content": "good day"}]}
PLAN = {"requests": "1/month", "burst": 100_000}
MOST_GROWTH = 64 * 2**20
WATCHES = 2  # of etcd: backends and gateways
PATIENCE_SECONDS = 30.0  # for what has to come back
NOT_CHARGED = {  # a request that ended so, without work for a backend, did not cost its caller anything
    "rate_limited", "concurrency", "client_timeout", "no_backend", "circuit_open", "queue_full", "overloaded",
}  # fmt: skip


def pytest_asyncio_loop_factories(config, item):
    """The gateway runs on uvloop."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def row(tmp_path, monkeypatch, capfd):
    row = Row(tmp_path, monkeypatch, lambda: capfd.readouterr().out)
    yield row
    row.check()


class Row:
    """One row of the matrix. See above."""

    def __init__(self, home, monkeypatch, read_log) -> None:
        self.home = home
        self.secrets: list[str] = []
        self.expects_traceback = False
        self.more_tasks = self.more_descriptors = 0
        self.lines: list[dict] = []  # of the access log, without the bystander's, in the order of their ends
        self.log: list[dict] = []  # what else was logged
        self.calm = ScriptedBackend()
        self._read_log = read_log
        self._key = generate_signing_key()
        self._answers: list[Answer] = []
        self._backends: list[ScriptedBackend] = []
        self._proxies: list[FaultProxy] = []
        self._policy = ""
        self._every_line: list[dict] = []
        self._turns: dict[str, int] = {}  # in which order requests ended, as far as it is remembered
        self._told = ""  # in metrics and spans
        self._logs = ""
        self._of_etcd: list[str] = []  # URLs that the log may tell: of no backend, and named by who reads it
        self._watched = 0  # gateways that have not ended well so far
        self._notice_everything(monkeypatch)

    def _notice_everything(self, monkeypatch) -> None:
        heard, answer = self._answers, RawClient.answer

        async def noted(client, *arguments, **options):
            heard.append(await answer(client, *arguments, **options))
            return heard[-1]

        monkeypatch.setattr(RawClient, "answer", noted)
        for kind, known in ((ScriptedBackend, self._backends), (FaultProxy, self._proxies)):
            monkeypatch.setattr(kind, "__aenter__", _noting(kind.__aenter__, known))

    # What a test uses

    def gateway(self, *urls, policy: str = OPEN_POLICY, bystander: bool = True, **options):
        """`running_gateway` before backends of these URLs, watched."""
        return self._gateway(urls, self.policy(policy), bystander, options)

    @contextlib.asynccontextmanager
    async def _gateway(self, urls, policy, bystander, options):
        async with self.calm:
            others = {"calm": self.calm.url, **options.pop("others", {})}
            running = running_gateway(self.home, *urls, policy=policy, others=others, **options)
            async with self.around(running, bystander=bystander) as gateway:
                yield gateway

    def policy(self, text: str) -> str:
        """This policy with the bystander in it, and a plan for everybody else."""
        keys = self.home / "row-keys.json"
        keys.write_bytes(jwks_of(self._key))
        document = yaml.safe_load(text)
        issuer = {"issuer": ISSUER, "audience": "weir", "algorithms": ["ES256"], "jwks": str(keys)}
        document["issuers"] = [*document.get("issuers", []), issuer]
        plans = document.setdefault("plans", {})
        others = document.get("consumers", []) if plans else [{"match": {"any": True}, "plan": "row"}]
        if not plans:
            plans["row"] = PLAN
        plans[BYSTANDER] = {"requests": "1000/second", "burst": 1000}
        document["consumers"] = [{"match": {"consumer": BYSTANDER}, "plan": BYSTANDER}, *others]
        route = {"name": BYSTANDER, "match": {"model": "calm"}, "to": [{"service": "calm"}]}
        document["routes"] = [route, *document["routes"]]
        self._policy = yaml.safe_dump(document, sort_keys=False)
        return self._policy

    def token(self, sub: str) -> str:
        """A token of the row's own issuer, which must not turn up anywhere."""
        token = mint(self._key, sub=sub, issuer=ISSUER, audience="weir", ttl=600.0, wall=time.time())
        self.secrets.append(token)
        return token

    @contextlib.asynccontextmanager
    async def around(self, running, *, bystander: bool = True):
        """Watch the gateway of a context manager, which is entered here."""
        self._watched += 1
        async with running as gateway:
            if (etcd := gateway.config.discovery.etcd) is not None:
                self._of_etcd += etcd.endpoints
                if gateway.discovery.watch.revision:  # it has listed, and both are about to watch
                    await until(_are_watching)
            before = _Resources()
            if bystander:
                async with _Bystander(gateway.data_address, self.token(BYSTANDER)) as other:
                    yield gateway
                other.check()
            else:
                yield gateway
            await self._wait_given_back(gateway, before)
            self._check_charges(gateway)
            ended = [request["request_id"] for request in reversed(gateway.recent.requests())]
            self._turns |= {request_id: turn for turn, request_id in enumerate(ended)}
            self._told += (await scrape(gateway)).text
            self._told += "".join(repr(span) for request in gateway.recent._kept for span in spans(request))
        self.read_log(self._read_log())
        self._watched -= 1

    def requests(self, gateway) -> list[dict]:
        """Records of requests that have ended, newest first."""
        return [request for request in gateway.recent.requests() if request["consumer"] != BYSTANDER]

    async def last(self, gateway) -> dict:
        """The record of the newest of them; waits for one."""
        await until(lambda: self.requests(gateway))
        return self.requests(gateway)[0]

    def read_log(self, text: str) -> None:
        """Take in the log of a gateway that has stopped."""
        records = [json.loads(line) for line in text.splitlines()]
        lines = [record for record in records if "end_reason" in record]
        lines.sort(key=lambda line: (self._turns.get(line["request_id"], 0), line["time"]))  # errors are written first
        self.lines += [line for line in lines if line["consumer"] != BYSTANDER]
        self.log += [record for record in records if "end_reason" not in record]
        self._every_line += lines
        self._logs += text

    # What is checked

    def check(self) -> None:
        """What can only be looked at when all has been said."""
        if self._watched:
            return  # the test has failed
        self._check_lines()
        self._check_attempts()
        self._check_secrets(self._told, "a metric or span")
        logs = self._logs
        for url in self._of_etcd:
            logs = logs.replace(url, "etcd")
        self._check_secrets(logs, "the log")
        for answer in self._answers:
            self._check_secrets(f"{answer.headers}{answer.body.decode('latin-1')}", "an answer")
        assert self.expects_traceback or "Traceback" not in self._logs
        assert [failure for backend in self._backends for failure in backend.failures] == []

    def _check_lines(self) -> None:
        """I1."""
        counts = Counter(line["request_id"] for line in self._every_line)
        assert [line for line in self._every_line if counts[line["request_id"]] > 1] == []
        assert [line for line in self._every_line if line["end_reason"] not in END_REASONS] == []
        statuses = {line["request_id"]: line["status"] for line in self._every_line}
        answered = {answer.headers["x-request-id"]: answer.status for answer in self._answers}
        assert {
            key: (status, statuses.get(key)) for key, status in answered.items() if statuses.get(key) != status
        } == {}

    def _check_attempts(self) -> None:
        """I2."""
        most = max((route.get("retry", {}).get("attempts", 2) for route in _routes(self._policy)), default=2)
        assert [line for line in self._every_line if line["attempts"] > most] == []
        attempts = {line["request_id"]: line["attempts"] for line in self._every_line}
        seen = Counter(_request_id(head) for backend in self._backends for head in backend.heads)
        # One more than its attempts may have been sent: on a connection of the pool that turned out to be dead.
        too_often = {
            key: count for key, count in seen.items() if count > attempts.get(key, 0) + bool(attempts.get(key))
        }
        assert too_often == {}

    def _check_charges(self, gateway) -> None:
        """I3, of accounts whose bucket does not refill in the time of a test."""
        ended = gateway.recent.requests()
        for (plan, consumer), account in gateway.pipeline._admission._accounts.items():
            rate = account.plan.requests
            if not isinstance(account.meter, LocalMeter) or rate is None or rate.per_second > 0.001:
                continue
            of_this = [one for one in ended if (one["consumer"], one["plan"]) == (consumer, plan)]
            if len(ended) == gateway.recent._kept.maxlen:
                continue  # there were more than are remembered
            charged = round(account.plan.burst - account.meter.remaining(gateway.clock()))
            cost = [one for one in of_this if one["code"] not in NOT_CHARGED or _had_work(one)]
            assert charged == len(cost), f"{charged} charged of {of_this}"

    async def _wait_given_back(self, gateway, before) -> None:
        """I5. Connections that wait in pools are closed first: they are kept on purpose."""
        for proxy in self._proxies:
            if proxy.is_faulty:
                await proxy.heal()
        backends, accounts = gateway.fleet.backends.values(), gateway.pipeline._admission._accounts.values()
        await _until_equal(lambda: gateway.pipeline.inflight, 0, "requests in flight")
        await _until_equal(lambda: len(gateway.forwarder.relays), 0, "answers on their way")
        assert {backend.key: backend.inflight for backend in backends if backend.inflight} == {}
        assert [account for account in accounts if account.in_flight] == []
        for backend in backends:
            backend.pool.close()
        for gauge in ("weir_connections", "weir_inflight"):
            await _wait_zero(gateway, gauge)
        await before.wait_back(self.more_tasks, self.more_descriptors)

    def _check_secrets(self, text: str, where: str) -> None:
        addresses = [f"127.0.0.1:{port}" for port in (each.port for each in (*self._backends, *self._proxies))]
        for secret in (*self.secrets, *addresses):
            assert not secret or secret not in text, f"{secret} is told in {where}"
        assert not re.search(r"(?i)bearer\s+(?!error=|TOKEN`)\S{20}|BEGIN [A-Z ]*PRIVATE KEY", text), (
            f"a credential is told in {where}"
        )


class _Bystander:
    """A tenant that has nothing to do with what breaks."""

    def __init__(self, address, token: str) -> None:
        self._address = address
        self._line = f"authorization: Bearer {token}"
        self._ending = asyncio.Event()
        self._statuses: Counter[str] = Counter()

    async def __aenter__(self):
        self._task = asyncio.create_task(self._ask(), name=BYSTANDER)
        await until(lambda: self._statuses or self._task.done())
        return self

    async def __aexit__(self, *_) -> None:
        self._ending.set()
        await self._task

    def check(self) -> None:
        assert set(self._statuses) == {"200"}, f"the bystander was answered {dict(self._statuses)}"

    async def _ask(self) -> None:
        async with RawClient(self._address) as client:
            is_last = False
            while not is_last:
                is_last = self._ending.is_set()  # so the last one is sent after the fault
                answer = await asyncio.wait_for(client.ask(CALM, self._line), 60)
                self._statuses[f"{answer.status}" if answer.whole else "cut"] += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._ending.wait()


class _Resources:
    """What of the gateway's stands open at a moment. Tasks of the test's own servers are not looked at."""

    def __init__(self) -> None:
        self.names, self.descriptors, self.bytes = Counter(_tasks()), _descriptors(), _resident()

    async def wait_back(self, more_tasks: int, more_descriptors: int) -> None:
        most_tasks, most_descriptors = self.names.total() + more_tasks, self.descriptors + more_descriptors
        with contextlib.suppress(TimeoutError):
            await until(lambda: len(_tasks()) <= most_tasks and _descriptors() <= most_descriptors, PATIENCE_SECONDS)
        assert len(_tasks()) <= most_tasks, (
            f"{self.names.total()} tasks became {_tasks()}: {Counter(_tasks()) - self.names}"
        )
        assert _descriptors() <= most_descriptors, f"{self.descriptors} descriptors became more"
        grown = _resident() - self.bytes
        if grown >= MOST_GROWTH:
            gc.collect()
            grown = _resident() - self.bytes
        assert grown < MOST_GROWTH, f"memory grew by {grown / 2**20:.0f} MiB"


def _are_watching() -> bool:
    tasks = Counter(_tasks())
    return tasks["Stream._read"] >= WATCHES <= tasks["_AioCall._handle_status_once_received"]


def _tasks() -> list[str]:
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
    return [
        name
        for name in names
        if not name.startswith(("ScriptedBackend.", "FaultProxy.", "_Link.", "StreamReaderProtocol."))
    ]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _wait_zero(gateway, gauge: str) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while value := (await scrape(gateway)).value(gauge):
                await asyncio.sleep(0.1)  # asked more often, the admin listener refuses
    assert not value, f"{gauge} is {value}"


async def _until_equal(read, wanted, what: str) -> None:
    with contextlib.suppress(TimeoutError):
        await until(lambda: read() == wanted, PATIENCE_SECONDS)
    assert read() == wanted, f"{what}: {read()}, not {wanted}"


def _had_work(request: dict) -> bool:
    return any(attempt["outcome"] not in ("connect_fail", "shed") for attempt in request["attempts"])


def _noting(enter, known: list):
    async def noted(self):
        known.append(self)
        return await enter(self)

    return noted


def _routes(policy: str) -> list[dict]:
    return yaml.safe_load(policy)["routes"] if policy else []


def _request_id(head: bytes) -> str:
    return re.search(rb"\r\nx-request-id: ([^\r]*)\r\n", head)[1].decode()
