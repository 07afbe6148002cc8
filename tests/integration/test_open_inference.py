"""A repository of models served by a real process, found in a real etcd, asked by Triton's clients through the gateway."""

import asyncio
import contextlib
import json
import os
import signal
import sys

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio

from discovery.etcd import EtcdClient, EtcdSettings, EtcdSource
from tests.support.etcd_server import EtcdServer
from tests.support.model_store import put
from tests.support.running_gateway import etcd_gateway

pytestmark = pytest.mark.integration

APART = 'kind = "tensor"\nexecutor = "tests.support.adder"\n'  # each version in a process of its own
POLICY = """
version: 1
anonymous: true
routes:
  - {name: pinned, match: {header: {x-side: a}}, to: [{service: adder, version: "1"}]}
  - {name: rest, match: {path: "/v2/*"}, to: [{service: adder, version: "2"}]}
"""
ROW = np.ones((1, 3), dtype=np.float32)


@contextlib.asynccontextmanager
async def backend(root, etcd):
    """The process and its URL; whoever uses it ends it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "reference_backend", "--repository", str(root), "--serve", "adder@all", "--etcd", etcd,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("serving adder@1, adder@2 at http://"), line
        yield process, line.split()[-1]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def inputs(kind):
    made = [kind("left", [1, 3], "FP32"), kind("right", [1, 3], "FP32"), kind("words", [1], "BYTES")]
    for each, array in zip(made, (ROW, ROW, np.array([b"ab"], dtype=np.object_)), strict=True):
        each.set_data_from_numpy(array)
    return made


async def until(condition):
    async with asyncio.timeout(20):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
    return value


async def test_versions_of_one_process_behind_the_gateway(tmp_path):
    for place in ("store/adder/1", "store/adder/2"):
        put(tmp_path, place, APART)
    (tmp_path / "gateway").mkdir()
    with EtcdServer(tmp_path) as etcd:
        async with (
            EtcdClient(EtcdSettings(endpoints=(etcd.url,))) as client,
            aiohttp.ClientSession() as session,
            backend(tmp_path / "store", etcd.url) as (process, url),
            etcd_gateway(
                tmp_path / "gateway", etcd.url, policy=POLICY, config="grpc: {listen: 127.0.0.1:0}\n"
            ) as gateway,
            tritonclient.http.aio.InferenceServerClient(str(gateway.data_address)) as http,
            tritonclient.grpc.aio.InferenceServerClient(str(gateway.grpc_address)) as rpc,
        ):
            source = EtcdSource(client, "/weir/v1/backends/", 1 << 20)

            async def registered():
                values = [json.loads(item.value) for item in (await source.list()).items]
                return {value["models"][0]["version"]: value for value in values}

            async def both_are_known():
                return len(gateway.fleet.backends) == 2 and all(
                    each.healthy for each in gateway.fleet.backends.values()
                )

            await until(both_are_known)
            there = await registered()
            assert [there[version]["url"] for version in "12"] == [f"{url}/models/adder/{version}" for version in "12"]
            assert there["1"]["grpc_port"] == there["2"]["grpc_port"] > 0

            # The newest version would answer, if the gateway did not say which it means.
            for headers, version in (({"x-side": "a"}, "1"), ({}, "2")):
                answer = await http.infer("adder", inputs(tritonclient.http.InferInput), headers=dict(headers))
                assert answer.get_response()["model_version"] == version
                assert answer.as_numpy("sum").tolist() == [[2, 2, 2]]
                answer = await rpc.infer("adder", inputs(tritonclient.grpc.InferInput), headers=dict(headers))
                assert answer.get_response().model_version == version
                assert answer.as_numpy("words").tolist() == [b"ba"]

            # A version is swapped, and a new one comes; nobody who asks meanwhile is refused.
            put(tmp_path, "store/adder/3", APART)
            asking = asyncio.ensure_future(ask_until_cancelled(rpc))
            async with session.post(f"{url}/v2/repository/models/adder/load") as loaded:
                assert loaded.status == 200
            asking.cancel()
            assert await asking > 0
            assert sorted(await registered()) == ["1", "2", "3"]

            async def old_are_gone():
                return len(await children(process.pid)) == 3

            await until(old_are_gone)

            # A crash costs its version; the others answer, and it comes back.
            [victim, *_] = await children(process.pid)
            os.kill(victim, signal.SIGKILL)

            async def one_is_replaced():
                return victim not in (now := await children(process.pid)) and len(now) == 3

            await until(one_is_replaced)

            async with session.post(f"{url}/drain") as drained:
                assert drained.status == 200
            async with asyncio.timeout(30):
                assert await process.wait() == 0
            assert await registered() == {}


async def ask_until_cancelled(rpc):
    """How many were answered. Raises for any that was not."""
    count = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await rpc.infer("adder", inputs(tritonclient.grpc.InferInput))
            count += 1
    return count


async def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
