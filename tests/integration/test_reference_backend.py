"""`python -m reference_backend` as a process: the openai client against it, and its life in a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys

import aiohttp
import openai
import pytest

from discovery.etcd import EtcdClient, EtcdSettings, EtcdSource
from tests.support.etcd_server import EtcdServer
from tests.support.model_store import put
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import free_port

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "What is a circuit breaker?"}]
ENDLESS = {"model": "tiny", "messages": QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 1900}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextlib.asynccontextmanager
async def backend(*arguments):
    """The process and its URL; SIGTERM at the end, and a clean exit is asked for."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "reference_backend", "--model", "tiny", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):  # the import of torch takes seconds on a busy machine
            line = (await process.stdout.readline()).decode()
        assert line.startswith(("serving tiny at http://", "serving tiny@2 at http://")), line
        yield process, line.split()[-1]
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until(condition):
    async with asyncio.timeout(60):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
    return value


async def metric(session, url, name):
    async with session.get(f"{url}/metrics") as response:
        return float(re.search(rf'^vllm:{name}{{model_name="tiny"}} (.*)$', await response.text(), re.MULTILINE)[1])


def workers_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


async def test_the_openai_client_is_served():
    async with backend() as (_, url), openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]

        answer = await client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
        text = answer.choices[0].message.content
        assert text.startswith("A circuit breaker stops sending requests to a backend")
        assert answer.choices[0].finish_reason == "stop"

        stream = await client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == len(chunks) - 2

        completion = await client.completions.create(model="tiny", prompt="A canary is", temperature=0, stop=["."])
        assert completion.choices[0].text

        told = await client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            presence_penalty=-0.1,
            extra_body={"top_k": 3, "min_p": 0.1},
        )
        assert "".join(token.token for token in told.choices[0].logprobs.content) == told.choices[0].message.content
        assert told.usage.prompt_tokens_details.cached_tokens > 0

        together = await asyncio.gather(
            *(client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0) for _ in range(12))
        )
        assert {each.choices[0].message.content for each in together} == {text}

        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-7", messages=QUESTION)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=QUESTION, temperature=3)
        assert bad.value.param == "temperature"


async def test_clients_that_leave_and_clients_that_are_too_many():
    async with backend("--max-running", "2", "--max-waiting", "0") as (_, url), aiohttp.ClientSession() as session:
        chat = f"{url}/v1/chat/completions"
        running = [await session.post(chat, json=ENDLESS) for _ in range(2)]
        async with session.post(chat, json=ENDLESS) as refused:
            assert (refused.status, refused.headers["x-backend-not-started"]) == (429, "true")
        for response in running:
            response.close()

        async def is_idle():
            return await metric(session, url, "num_requests_running") == 0

        await until(is_idle)
        assert await metric(session, url, "generation_tokens_total") < 2 * ENDLESS["max_tokens"]


async def test_a_worker_that_is_killed_costs_its_requests_and_comes_back(tmp_path):
    with EtcdServer(tmp_path) as etcd:
        async with (
            EtcdClient(EtcdSettings(endpoints=(etcd.url,))) as client,
            aiohttp.ClientSession() as session,
            backend("--etcd", etcd.url) as (process, url),
        ):
            source = EtcdSource(client, "/weir/v1/backends/", 1 << 20)

            async def registered():
                return [item.key for item in (await source.list()).items]

            [key] = await until(registered)
            [worker] = workers_of(process)
            async with session.post(f"{url}/v1/chat/completions", json=ENDLESS) as stream:
                await stream.content.readline()
                os.kill(worker, signal.SIGKILL)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await stream.read()

            async def is_withdrawn():
                return await registered() == []

            async def is_back():
                return await registered() == [key]

            await until(is_withdrawn)
            async with session.post(f"{url}/v1/chat/completions", json=ENDLESS) as refused:
                assert (refused.status, refused.headers["x-backend-not-started"]) == (503, "true")
                assert (await refused.json())["error"]["code"] == "loading"
            await until(is_back)
            assert workers_of(process) != [worker]
            async with session.post(f"{url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 5}) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_its_life_in_etcd_from_ready_to_drained(tmp_path):
    with EtcdServer(tmp_path) as etcd:
        async with (
            EtcdClient(EtcdSettings(endpoints=(etcd.url,))) as client,
            OtlpReceiver() as collector,
            aiohttp.ClientSession() as session,
            backend("--etcd", etcd.url, "--service", "chat", "--version", "2", "--otlp", collector.url) as (
                process,
                url,
            ),
        ):
            source = EtcdSource(client, "/weir/v1/backends/", 1 << 20)

            async def registered():
                return {item.key: json.loads(item.value) for item in (await source.list()).items}

            [(key, value)] = (await until(registered)).items()
            assert key.startswith("chat/")
            assert value.pop("grpc_port") > 0
            assert value == {
                "url": url,
                "protocols": ["openai"],
                "models": [{"name": "tiny", "version": "2"}],
                "max_concurrency": 32,
                "load": "/load/stream",
                "grpc_health": "model/tiny@2",
            }

            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            async with session.post(f"{url}/v1/chat/completions", json=ENDLESS, headers=headers) as stream:
                [worker] = workers_of(process)
                os.kill(worker, signal.SIGSTOP)  # or a fast one has ended before anybody has looked
                process.send_signal(signal.SIGTERM)

                async def is_draining():
                    return (await registered())[key].get("state") == "draining"

                async def is_unready():
                    async with session.get(f"{url}/health") as health:
                        return health.status == 503

                await until(is_draining)
                await until(is_unready)  # a moment later: gateways that watch etcd hear it first
                os.kill(worker, signal.SIGCONT)
                body = await stream.read()
            assert body.endswith(b"data: [DONE]\n\n")
            async with asyncio.timeout(30):
                assert await process.wait() == 0
            assert await registered() == {}
            [span] = await collector.wait_spans(1)
            assert (span.trace_id, span.parent_id, span.service_name) == (TRACE, PARENT, "weir-backend")
            assert span.attributes["gen_ai.usage.output_tokens"] == 1900


async def test_a_full_disk_behind_what_it_says_stops_nobody(tmp_path):
    put(tmp_path, "adder/1")
    port = free_port()
    with open("/dev/full", "w") as full:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "reference_backend", "--repository", str(tmp_path), "--port", str(port),
            stdout=full, stderr=full,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as session:

            async def is_ready():
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(f"http://127.0.0.1:{port}/health") as health:
                        return health.status == 200

            await until(is_ready)
            async with session.post(f"http://127.0.0.1:{port}/drain") as drained:
                assert drained.status == 200
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
