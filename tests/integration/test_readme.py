"""The README's two files, put before an OpenAI-compatible server as it says: they are taken from its text."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.ports import free_ports

pytestmark = pytest.mark.integration

README = Path(__file__).parent.parent.parent / "README.md"


async def healthy(request):
    return web.Response()


async def answer(request):
    body = await request.json()
    return web.json_response({"choices": [{"message": {"content": f"I am {body['model']}"}}]})


async def test_before_your_own_server(tmp_path):
    config, policy = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    app = web.Application()
    app.router.add_get("/health", healthy)
    app.router.add_post("/v1/chat/completions", answer)
    data, admin = free_ports(2)
    async with TestServer(app) as server:
        assert config.count(":8000") == 1
        ports = f"listen: 127.0.0.1:{data}\nadmin: {{listen: '127.0.0.1:{admin}'}}\n"
        (tmp_path / "weir.yaml").write_text(ports + config.replace(":8000", f":{server.port}"))
        (tmp_path / "policy.yaml").write_text(policy)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.cli", "serve", "--config", str(tmp_path / "weir.yaml")
        )
        try:
            async with asyncio.timeout(30), aiohttp.ClientSession() as session:
                assert await first_answer(session, data) == {"choices": [{"message": {"content": "I am my-model"}}]}
                async with session.get(f"http://127.0.0.1:{data}/v1/models") as models:
                    assert [model["id"] for model in (await models.json())["data"]] == ["my-model"]
        finally:
            process.terminate()
            assert await process.wait() == 0


async def first_answer(session, port):
    while True:
        try:
            async with session.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json={"model": "my-model", "messages": []}
            ) as reply:
                if reply.status == 200:
                    return await reply.json()
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)
