"""Rows G of the fault matrix: policies that change, processes that end, bugs of our own, too little time and memory."""

import asyncio
import contextlib
import json
import os
import signal
import time

import pytest

from gateway.memory import Memory
from policies.identity import generate_signing_key, jwks_of, mint
from policies.overload import Overload
from tests.support.admin_client import page, scrape
from tests.support.jwks_server import jwks_server, slow
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, policy_with, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend
from tests.support.serving import serving
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

IDP = "https://idp.example.com"
STREAM = {**CHAT, "stream": True}
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"


def rename_over(path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def swap_link(path, text: str) -> None:
    """As Kubernetes mounts a ConfigMap: policy.yaml -> ..data/policy.yaml, and ..data -> a directory, swapped whole."""
    mount = path.parent
    directory = mount / f"..{time.time_ns()}"
    directory.mkdir()
    (directory / path.name).write_text(text)
    (mount / "..data_tmp").symlink_to(directory.name)
    (mount / "..data_tmp").rename(mount / "..data")
    if not path.is_symlink():
        path.unlink(missing_ok=True)
        path.symlink_to(f"..data/{path.name}")


class Held:
    """A backend's script: streams that begin, and end when `go_on` is set; anything else is answered at once."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.begun = 0

    async def __call__(self, connection: BackendConnection) -> None:
        if not json.loads(connection.body).get("stream"):
            await connection.json({})
            return
        await connection.begin_events()
        await connection.chunk(b'data: {"choices": []}\n\n')
        self.begun += 1
        await self.go_on.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")


async def ask(address, document=None, *lines: str, **options):
    async with RawClient(address) as client:
        return await client.ask(document, *lines, **options)


# The policy


async def test_G01_a_file_that_is_broken_half_written_deleted_swapped_and_flipped(row):
    path = row.home / "policy.yaml"

    def numbered(number: int) -> str:
        return row.policy(OPEN_POLICY.replace("name: chat", f"name: chat-{number}"))

    def in_force(gateway, number: int):
        return lambda: gateway.policy.policy.routes[-1].name == f"chat-{number}"

    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        async with Traffic(gateway.data_address, clients=2) as traffic:
            good = gateway.policy.policy.version
            rename_over(path, "routes: [")
            await until(lambda: gateway.policy.last_error)
            path.write_text(numbered(1)[:200])
            await until(lambda: "routes: [" not in repr(gateway.policy._seen))
            path.unlink()
            await until(lambda: "cannot be read" in gateway.policy.last_error.errors[0])
            assert {each.policy for each in await traffic.more(20)} == {good}
            rename_over(path, numbered(2))
            await until(in_force(gateway, 2))
            swap_link(path, numbered(3))
            await until(in_force(gateway, 3))
            for number in range(100):
                swap_link(path, numbered(100 + number) if number % 3 else "routes: [")
                await asyncio.sleep(0.002)
            swap_link(path, numbered(4))
            await until(in_force(gateway, 4))
            last = gateway.policy.policy.version
            assert {each.policy for each in await traffic.more(20)} == {last}
            told = await scrape(gateway)
            assert told.value("weir_policy_info", version=last) == 1
            assert told.value("weir_policy_reload_total", result="invalid") >= 2
            assert told.value("weir_policy_reload_total", result="unreadable") == 1
            assert gateway.policy.last_error is None
        assert traffic.failed == []
    policies = {line["request_id"]: line["policy"] for line in row.lines}
    for asked in traffic.asked:  # each request was under one version, and the log tells which
        assert policies[asked.answer.headers["x-request-id"]] == asked.policy


async def test_G02_a_policy_that_locks_everybody_out(row):
    path = row.home / "policy.yaml"
    async with ScriptedBackend() as backend, row.gateway(backend.url, bystander=False) as gateway:
        good = path.read_text()
        # Nobody could call at all: that is a mistake, and refused.
        rename_over(path, OPEN_POLICY.replace("anonymous: true\n", ""))
        await until(lambda: gateway.policy.last_error)
        assert "nobody could call" in gateway.policy.last_error.errors[0]
        assert (await ask(gateway.data_address)).status == 200
        # Whoever may call may do nothing: that can be meant, and one more swap takes it back.
        rename_over(path, row.policy(policy_with(allow='["group:nobody"]')))
        async with asyncio.timeout(10):
            while (refused := await ask(gateway.data_address)).status == 200:
                await asyncio.sleep(0.01)
        assert (refused.status, refused.json["error"]["rule"]) == (401, "routes.chat.allow")
        rename_over(path, good)
        async with asyncio.timeout(10):
            while (await ask(gateway.data_address)).status != 200:
                await asyncio.sleep(0.01)


async def test_G03_a_policy_that_takes_a_model_away_from_a_running_stream(row):
    held = Held()
    only_tiny = policy_with(match='{path: "/*", model: "tiny*"}')
    async with ScriptedBackend(held) as backend, row.gateway(backend.url, policy=only_tiny) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM))
            await until(lambda: held.begun)
            old = gateway.policy.policy.version
            rename_over(row.home / "policy.yaml", row.policy(policy_with(match='{path: "/*", model: "large*"}')))
            await until(lambda: gateway.policy.policy.version != old)
            refused = await ask(gateway.data_address)
            assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")
            held.go_on.set()
            answer = await client.answer()
            assert (answer.status, answer.whole, answer.headers["x-weir-policy"]) == (200, True, old)
            assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_G04_workers_on_different_policies(row):
    """One of two workers is stopped while the file changes: each tells the version it decides by."""

    async def versions() -> list[str]:
        told = [await scrape(Admin(address)) for address in weir.admin_addresses]
        return [one.series("weir_policy_info")[0]["version"] for one in told]

    async with ScriptedBackend() as backend, serving(row.home, backend.url, workers=2) as weir:
        first, second = await versions()
        assert first == second
        stopped = weir.children()[1]
        os.kill(stopped, signal.SIGSTOP)
        try:
            rename_over(row.home / "policy.yaml", policy_with(balance="round_robin"))
            alive = await the_one_that_answers(weir.admin_addresses)
            async with asyncio.timeout(20):
                while (await scrape(alive)).series("weir_policy_info")[0]["version"] == first:
                    await asyncio.sleep(0.1)
        finally:
            os.kill(stopped, signal.SIGCONT)
        async with asyncio.timeout(20):
            while (now := await versions())[0] != now[1] or first in now:
                await asyncio.sleep(0.1)
    row.read_log(weir.log)


class Admin:
    """What `scrape` needs of a gateway."""

    def __init__(self, address) -> None:
        self.admin_address = address


async def the_one_that_answers(addresses) -> Admin:
    asking = {asyncio.create_task(page(Admin(address), "/livez")): address for address in addresses}
    done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.wait(asking)
    return Admin(asking[done.pop()])


# The process

SHORT_DRAIN = "import gateway.drain as drain; drain.ACCEPT_SECONDS, drain.DRAIN_SECONDS = 0.5, 1.5"


async def test_G05_sigterm_with_fifty_streams(row):
    """5 s of accepting are 0.5 s here, 60 s for streams 1.5 s. Half of the streams end by themselves in that time."""
    ending, staying = Held(), Held()
    policy = row.policy(policy_with(match='{model: "tiny"}') + "  - {name: other, to: [{service: other}]}\n")
    config = "telemetry: {{otlp: '{}', sample: 100%}}\n"
    async with OtlpReceiver() as receiver, ScriptedBackend(ending) as ends, ScriptedBackend(staying) as stays:
        async with (
            serving(
                row.home, ends.url, others={"other": stays.url, "calm": ends.url}, policy=policy,
                config=config.format(receiver.url), setup=SHORT_DRAIN,
            ) as weir,
            contextlib.AsyncExitStack() as clients,
        ):  # fmt: skip
            streams = [await clients.enter_async_context(RawClient(weir.data_address)) for _ in range(50)]
            for number, client in enumerate(streams):
                client.send(chat_request({**STREAM, "model": "other" if number % 2 else "tiny"}))
            await until(lambda: ending.begun + staying.begun == 50, 30)
            weir.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while (ready := await page(weir, "/readyz")).status == 200:
                    await asyncio.sleep(0.01)
            assert (ready.status, ready.text) == (503, "the gateway is draining\n")
            ending.go_on.set()
            answers = [await asyncio.wait_for(client.answer(), 30) for client in streams]
            assert await weir.wait_ended() == 0
        for number, answer in enumerate(answers):
            if number % 2:
                last = answer.body.rstrip().rpartition(b"data: ")[2]
                assert json.loads(last)["error"]["code"] == "draining"
                assert not answer.whole
                assert b"[DONE]" not in answer.body
            else:
                assert (answer.whole, answer.body.endswith(b"data: [DONE]\n\n")) == (True, True)
        row.read_log(weir.log)
        ends_of = [line["end_reason"] for line in row.lines]
        assert (ends_of.count("ok"), ends_of.count("drain"), len(ends_of)) == (25, 25, 50)
        told = {span.attributes["weir.request_id"] for span in receiver.spans if span.kind == "server"}
        assert told == {line["request_id"] for line in row.lines}  # the last ones, too


async def test_G05_a_second_sigterm_ends_it_now(row):
    held = Held()
    async with ScriptedBackend(held) as backend, serving(row.home, backend.url) as weir:
        async with RawClient(weir.data_address) as client:
            client.send(chat_request(STREAM))
            await until(lambda: held.begun)
            weir.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while (await page(weir, "/readyz")).status == 200:
                    await asyncio.sleep(0.01)
            weir.process.send_signal(signal.SIGTERM)
            answer = await client.answer()
            assert await weir.wait_ended(30) == 0  # without the 65 s that it had
            assert not answer.whole
            assert json.loads(answer.body.rstrip().rpartition(b"data: ")[2])["error"]["code"] == "draining"
    row.read_log(weir.log)
    assert [line["end_reason"] for line in row.lines] == ["drain"]


async def test_G06_a_worker_is_killed(row):
    """Each request has a connection of its own, so either worker may get it."""
    statuses = []
    async with ScriptedBackend() as backend, serving(row.home, backend.url, workers=2) as weir:
        before = weir.children()
        os.kill(before[0], signal.SIGKILL)
        async with asyncio.timeout(60):
            while len(statuses) < 200 or len(weir.children()) < 2:
                try:
                    statuses.append((await ask(weir.data_address)).status)
                except ConnectionRefusedError as error:
                    raise AssertionError(f"nobody listens any more: {weir.errors}") from error
                except (ConnectionError, asyncio.IncompleteReadError):
                    pass  # it was in the queue of the one that died
                await asyncio.sleep(0)
        assert set(statuses) == {200}
        assert before[1] in weir.children()
        await weir.wait_listening()
    row.read_log(weir.log)
    assert weir.errors.count("was ended by SIGKILL; starting it again") == 1
    assert "Traceback" not in weir.errors


# Bugs of our own


async def test_G08_a_bug_before_the_answer_and_one_after_its_head(row, monkeypatch):
    row.expects_traceback = True

    def broken(*_):
        raise RuntimeError("a bug that knows a secret: hunter2")

    go_on = asyncio.Event()

    async def two_events(connection: BackendConnection) -> None:
        if not json.loads(connection.body).get("stream"):
            await connection.json({})
            return
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await go_on.wait()
        await connection.chunk(b"data: {}\n\n")
        await connection.wait_closed()
        raise Hangup

    policy = policy_with(timeout="{idle: 1s}")  # what ends a stream that nobody flushes any more
    async with (
        ScriptedBackend(two_events) as backend,
        row.gateway(backend.url, policy=policy, bystander=False) as gateway,
    ):
        with monkeypatch.context() as bug:
            bug.setattr("gateway.pipeline.peek", broken)
            answer = await ask(gateway.data_address)
        assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
        for told in (b"hunter2", b"Traceback", b"RuntimeError", b"peek"):
            assert told not in answer.body
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM))
            await client.reader.readuntil(b"data: ")
            with monkeypatch.context() as bug:
                bug.setattr("gateway.relay.Relay._flush_more", broken)
                go_on.set()
                rest = await asyncio.wait_for(client.reader.read(), 20)
            assert b"[DONE]" not in rest
            assert not rest.endswith(b"0\r\n\r\n")
            assert b"hunter2" not in rest
        assert (await ask(gateway.data_address)).status == 200
    bugs = [record for record in row.log if "hunter2" in record.get("exception", "")]
    assert [line["status"] for line in row.lines] == [500, 200, 200]
    assert row.lines[0]["end_reason"] == "internal"
    assert bugs[0]["request_id"] == row.lines[0]["request_id"]
    assert bugs[0]["level"] == "error"
    assert len(bugs) <= 3


# Too little time, too little memory


async def test_G09_the_event_loop_is_blocked_once_and_for_long(row, monkeypatch):
    """5 s of lateness are 1 s here, and it is measured each 0.1 s instead of each 0.5 s."""
    monkeypatch.setattr("gateway.pressure.LAG_PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(Overload.__init__, "__defaults__", (1.0,))
    held, may_stop = Held(), asyncio.Event()

    async def block() -> None:
        while not may_stop.is_set():
            time.sleep(0.4)
            await asyncio.sleep(0)

    patient = policy_with(timeout="{connect: 10s, first_byte: 60s, idle: 60s, total: 10m}")
    async with ScriptedBackend(held) as backend, row.gateway(backend.url, policy=patient, bystander=False) as gateway:
        async with RawClient(gateway.data_address) as stream, RawClient(gateway.data_address) as client:
            stream.send(chat_request(STREAM))
            await until(lambda: held.begun)
            client.send(chat_request())
            time.sleep(0.5)
            assert (await client.answer()).status == 200  # once: latency and nothing else
            await until(lambda: gateway.pressure.lag > 0.3)
            assert (await scrape(gateway)).value("weir_loop_lag_seconds") > 0.3
            assert gateway.pressure.overload.state == "normal"

            blocking = asyncio.create_task(block(), name="block")
            await until(lambda: gateway.pressure.overload.state == "shedding", 60)
            refused = await client.ask()
            assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
            assert "retry-after" in refused.headers
            client.send(HEALTH)
            assert (await client.answer()).status == 200
            may_stop.set()
            await blocking
            await until(lambda: gateway.pressure.overload.state == "normal")
            assert (await client.ask()).status == 200
            held.go_on.set()
            answer = await stream.answer()
            assert (answer.status, answer.whole) == (200, True)
    assert [line["end_reason"] for line in row.lines].count("shed") == 1
    assert {"shedding", "normal"} <= {record.get("state") for record in row.log if record["event"] == "overload"}


async def test_G10_memory_nears_the_limit_of_the_cgroup(row, monkeypatch):
    """The kernel's files are written by the test: a limit of 1000 bytes, and what is in use of it."""
    (row.home / "own").write_text("0::/\n")
    (row.home / "memory.max").write_text("1000\n")
    (row.home / "memory.stat").write_text("inactive_file 100\nactive_file 0\n")

    def use(share: float) -> None:
        (row.home / "memory.current").write_text(f"{1000 * share + 100:.0f}\n")

    use(0.5)
    monkeypatch.setattr("gateway.pressure.LAG_PERIOD_SECONDS", 0.05)
    monkeypatch.setattr("gateway.pressure.Memory", lambda: Memory(row.home, row.home / "own"))
    held = Held()
    async with ScriptedBackend(held) as backend, row.gateway(backend.url, bystander=False) as gateway:
        async with RawClient(gateway.data_address) as stream:
            stream.send(chat_request(STREAM))
            await until(lambda: held.begun)
            for share, state, number in ((0.93, "no_keep_alive", 1), (0.97, "shedding", 2), (0.5, "normal", 0)):
                use(share)
                await until(lambda state=state: gateway.pressure.overload.state == state)
                answer = await ask(gateway.data_address)
                assert answer.status == (503 if state == "shedding" else 200)
                assert (answer.headers.get("connection") == "close") is (state != "normal")
                told = await scrape(gateway)
                assert told.value("weir_overload_state") == number
                assert told.value("weir_memory_used_ratio") == share
                assert (await page(gateway, "/livez")).status == 200
            held.go_on.set()
            whole = await stream.answer()
            assert (whole.status, whole.whole) == (200, True)
    states = [(record["state"], record.get("reason")) for record in row.log if record["event"] == "overload"]
    assert states == [("no_keep_alive", "memory"), ("shedding", "memory"), ("normal", None)]


# The start


async def test_G18_workers_that_start_together_serve_once_they_say_so(row):
    """The keys come slowly: who is ready has them. Reads and checks are jittered (test_keys, test_probe, test_watch)."""
    key = generate_signing_key()
    async with jwks_server() as idp, ScriptedBackend() as backend:
        idp.answer = slow(jwks_of(key), 0.6)
        issuer = f'{{issuer: "{IDP}", audience: weir, algorithms: [ES256], jwks: "{idp.url}"}}'
        policy = OPEN_POLICY.replace("anonymous: true", f"issuers: [{issuer}]")
        async with serving(row.home, backend.url, workers=2, policy=policy) as weir:
            token = mint(key, sub="ann", issuer=IDP, audience="weir", ttl=600.0, wall=time.time())
            answers = [await ask(weir.data_address, None, f"authorization: Bearer {token}") for _ in range(100)]
            assert {answer.status for answer in answers} == {200}
            assert idp.finished >= 2
    row.read_log(weir.log)


@pytest.mark.parametrize(
    ("environ", "policy", "says"),
    [
        ({"AIOHTTP_NO_EXTENSIONS": "1"}, OPEN_POLICY, "aiohttp runs without its C parser"),
        ({}, OPEN_POLICY + 'issuers: [{issuer: "https://a", audience: w, algorithms: [HS256], jwks: a}]\n', "HS256"),
    ],
    ids=["no C parser", "a shared secret"],
)
async def test_G20_what_it_must_not_run_with(tmp_path, monkeypatch, environ, policy, says):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with serving(tmp_path, policy=policy, wait=False) as weir:
        assert await weir.wait_ended() in (2, 3)
    (line,) = weir.errors.strip().splitlines()
    assert line.startswith("weir: ")
    assert says in line
