"""Conversations over two reference backends: what the caches find again, by how a backend is chosen."""

import asyncio
import contextlib

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import RawClient
from tests.support.running_gateway import announced, etcd_gateway, policy_with, until

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from tests.support.tiny_model import running_api  # noqa: E402

pytestmark = pytest.mark.integration

SESSIONS, TURNS = 9, 3  # an odd number: taking turns between two backends, an even one would come back to its own
LETTER = "I run a gateway before ten models, and it must not fail when one of them does. " * 4


async def converse(client: RawClient, name: str) -> list[tuple[int, int]]:
    """A conversation that grows. Prompt tokens and those of them that were cached, turn by turn."""
    messages, told = [], []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"{name}: why? {turn}" if turn else f"{name}: {LETTER}"})
        body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = await client.ask(body)
        assert answer.status == 200, answer.body
        usage = answer.json["usage"]
        told.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
        messages.append({"role": "assistant", "content": answer.json["choices"][0]["message"]["content"]})
    return told


async def found_share(home, etcd, balance: str) -> float:
    """The share of prompt tokens behind each conversation's first turn that was cached."""
    prefix = f"/{balance}"
    async with contextlib.AsyncExitStack() as stack:
        for name in ("a", "b"):
            backend = await stack.enter_async_context(running_api(slots=SESSIONS, context=512))
            await stack.enter_async_context(announced(etcd, f"tiny/{name}", backend.url, prefix, load="/load/stream"))
        gateway = await stack.enter_async_context(etcd_gateway(home, etcd, prefix, policy=policy_with(balance=balance)))
        await until(lambda: gateway.load_streams.connected == 2 and gateway.load_streams.counts["taken"] >= 2)
        await until(lambda: all(backend.healthy for backend in gateway.fleet.backends.values()))
        clients = [await stack.enter_async_context(RawClient(gateway.data_address)) for _ in range(SESSIONS)]
        talks = await asyncio.gather(*(converse(client, f"talk {n}") for n, client in enumerate(clients)))
        served = {request["attempts"][-1]["backend"] for request in gateway.recent.requests()}
        assert served == {"a", "b"}
        if balance == "prefix":
            assert any(b.prefixes is not None and b._cache_tokens for b in gateway.fleet.backends.values())
    later = [turn for talk in talks for turn in talk[1:]]
    return sum(cached for _, cached in later) / sum(tokens for tokens, _ in later)


async def test_prefix_finds_more_again_than_least_load(tmp_path) -> None:
    with EtcdServer(tmp_path) as etcd:
        blind = await found_share(tmp_path, etcd.url, "least_load")
        knowing = await found_share(tmp_path, etcd.url, "prefix")
    print(f"cached share of later turns: least_load {blind:.2f}, prefix {knowing:.2f}")
    assert knowing > blind
    assert knowing > 0.7
