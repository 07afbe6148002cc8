"""Conversations over two reference backends: what their caches find again where the gateway goes by prefix."""

import contextlib

import aiohttp
import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import RawClient
from tests.support.running_gateway import announced, etcd_gateway, policy_with, until

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from tests.support.tiny_model import running_api  # noqa: E402

pytestmark = pytest.mark.integration

SESSIONS, TURNS = 5, 3
BLOCK = 16  # tokens: what the engine's cache is made of
LETTER = "I run a gateway before ten models, and it must not fail when one of them does. " * 4


def body_of(messages) -> dict:
    return {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def found(usage) -> int:
    """How many tokens of the prompt were in the cache."""
    return usage["prompt_tokens_details"]["cached_tokens"]


async def converse(client: RawClient, talk: str) -> tuple[list, int]:
    """A conversation that grows. Returns its messages and how many tokens its last prompt had."""
    messages, known = [], 0
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"{talk}: why? {turn}" if turn else f"{talk}: {LETTER}"})
        answer = await client.ask(body_of(messages))
        assert answer.status == 200, answer.body
        usage = answer.json["usage"]
        assert found(usage) >= known - known % BLOCK
        known = usage["prompt_tokens"]
        messages.append({"role": "assistant", "content": answer.json["choices"][0]["message"]["content"]})
    return messages, known


async def test_a_conversation_goes_where_its_beginning_is_cached(tmp_path) -> None:
    """The control is the other backend, asked for the same without a gateway between: it has to read it all."""
    async with contextlib.AsyncExitStack() as stack:
        etcd = stack.enter_context(EtcdServer(tmp_path))
        backends = []
        for name in ("a", "b"):
            backends.append(await stack.enter_async_context(running_api(slots=SESSIONS, context=512)))
            await stack.enter_async_context(announced(etcd.url, f"tiny/{name}", backends[-1].url, load="/load/stream"))
        gateway = await stack.enter_async_context(
            etcd_gateway(tmp_path, etcd.url, policy=policy_with(balance="prefix"))
        )
        await until(lambda: gateway.load_streams.connected == 2 and gateway.load_streams.counts["taken"] >= 2)
        await until(lambda: all(backend.healthy for backend in gateway.fleet.backends.values()))
        client = await stack.enter_async_context(RawClient(gateway.data_address))
        talks = [await converse(client, f"talk {n}") for n in range(SESSIONS)]
        assert any(b.prefixes is not None and b._cache_tokens for b in gateway.fleet.backends.values())
        direct = await stack.enter_async_context(aiohttp.ClientSession())
        for messages, known in talks:
            answers = []
            for backend in backends:
                async with direct.post(f"{backend.url}/v1/chat/completions", json=body_of(messages)) as answer:
                    answers.append(found((await answer.json())["usage"]))
            other, own = sorted(answers)
            assert own >= known - known % BLOCK
            assert other < 4 * BLOCK  # what all these prompts begin with
