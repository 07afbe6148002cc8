"""Policies under way in a real etcd, and every document of the yaml-test-suite as the policy file of a running source."""

import asyncio
from random import Random

import pytest

from discovery.etcd import EtcdClient, EtcdSettings, EtcdSource
from gateway.reload import EtcdPolicy, FilePolicy
from policies.yaml_tree import MAX_BYTES
from tests.support.corpora import yaml_documents
from tests.support.etcd_server import EtcdServer
from tests.support.policy_text import OPEN

pytestmark = pytest.mark.integration

PREFIX = "/weir/v1/policies/"


def text(name: str) -> bytes:
    return f"{OPEN}routes: [{{name: {name}, to: [{{service: x}}]}}]\n".encode()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_policy_in_etcd(tmp_path):
    events = []
    with EtcdServer(tmp_path) as etcd:
        async with EtcdClient(EtcdSettings((etcd.url,))) as writer, EtcdClient(EtcdSettings((etcd.url,))) as reader:
            await writer.put(PREFIX + "default", text("first"))
            await writer.put(PREFIX + "default-of-another", text("other"))
            policy = EtcdPolicy(
                EtcdSource(reader, PREFIX, MAX_BYTES), "default", tmp_path, events.append, lambda: 0.0,
                rng=Random(1), observe_discovery=lambda _: None,
            )  # fmt: skip
            await policy.start()

            def name() -> str:
                return policy.policy.routes[0].name

            assert name() == "first"
            running = asyncio.create_task(policy.run())
            for flip in range(20):
                await writer.put(PREFIX + "default", text(f"flip-{flip}"))
                await until(lambda flip=flip: name() == f"flip-{flip}")
            await writer.put(PREFIX + "default", b"#" * (MAX_BYTES + 5))
            await until(lambda: policy.last_error)
            assert "larger than 1 MiB" in policy.last_error.errors[0]
            await writer.delete(PREFIX + "default")
            await until(lambda: "no such key" in policy.last_error.errors[0])
            assert name() == "flip-19"
            await asyncio.to_thread(etcd.restart)
            await writer.close()  # its old connection is dead
            await writer.put(PREFIX + "default", text("after"))
            await until(lambda: name() == "after")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    assert [event.result for event in events if event.result != "ok"] == ["invalid", "unreadable"]


@pytest.mark.slow
async def test_the_yaml_test_suite_as_policy_files(tmp_path):
    documents = set(yaml_documents().values())
    path = tmp_path / "policy.yaml"
    path.write_bytes(text("good"))
    events = []
    source = FilePolicy(path, events.append, lambda: 0.0, poll=0.001, settle=0.001)
    await source.start()
    good = source.policy
    running = asyncio.create_task(source.run())
    for count, document in enumerate(sorted(documents), start=2):
        beside = tmp_path / "new"
        beside.write_bytes(document)
        beside.replace(path)
        await until(lambda count=count: len(events) == count)
        assert events[-1].result == "invalid"
        assert events[-1].errors
        assert source.policy is good
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
