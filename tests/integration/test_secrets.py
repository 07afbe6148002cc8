"""Secrets of a running `weir serve` are nowhere that somebody else looks: arguments, output, answers, metrics, console."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.support.certificates import Authority, client_tls
from tests.support.ports import free_ports
from tests.support.raw_client import CHAT
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import OPEN_POLICY

pytestmark = pytest.mark.integration

REDIS_PASSWORD, ADMIN_TOKEN, CALLERS_TOKEN, PROMPT = (
    "hunter2-redis",
    "hunter2-admin-token",
    "hunter2-caller",
    "hunter2-prompt",
)
CLOSED_POLICY = OPEN_POLICY.replace(
    "anonymous: true",
    "issuers: [{issuer: 'https://idp', audience: weir, algorithms: [ES256], jwks: nowhere.json}]",
)


def weir_yaml(data, admin, redis, pair) -> str:
    return f"""
listen: 127.0.0.1:{data}
admin: {{listen: 127.0.0.1:{admin}, auth: {{token_file: admin.token}}}}
tls: {{cert: {pair.cert}, key: {pair.key}}}
policy: policy.yaml
discovery: {{static: [{{service: tiny, url: "http://127.0.0.1:1", models: [tiny]}}]}}
redis: {{url: "${{REDIS_URL}}"}}
telemetry: {{log: console}}
"""


async def wait_said(path: Path, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in path.read_text():
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def serving(home: Path, redis_url: str):
    with (home / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway.cli", "serve", "--config", str(home / "weir.yaml")),
            env={**os.environ, "REDIS_URL": redis_url},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def seen_by_others(session, data, admin, tls) -> str:
    """Every answer to good and bad requests, on both ports."""
    answers = []
    for port, path, token in (
        *((data, path, CALLERS_TOKEN) for path in ("/v1/chat/completions", "/v1/models", "/nowhere", "/healthz")),
        *((admin, path, ADMIN_TOKEN) for path in ("/", "/metrics", "/readyz", "/api/policy", "/api/requests", "/api/routes", "/api/backends")),
        *((admin, path, ADMIN_TOKEN + "x") for path in ("/metrics", "/api/policy")),
    ):  # fmt: skip
        scheme = "https" if port == data else "http"
        method = "POST" if "completions" in path else "GET"
        async with session.request(
            method,
            f"{scheme}://127.0.0.1:{port}{path}",
            headers={"authorization": f"Bearer {token}"},
            json=CHAT | {"user": PROMPT} if method == "POST" else None,
            ssl=tls,
        ) as answer:
            answers += [str(answer.status), str(dict(answer.headers)), await answer.text()]
    return "\n".join(answers)


async def test_a_running_gateway_tells_no_secret(tmp_path):
    authority, (data, admin) = Authority(tmp_path), free_ports(2)
    pair = authority.issue("gateway", ["127.0.0.1"])
    (tmp_path / "policy.yaml").write_text(CLOSED_POLICY)
    (tmp_path / "admin.token").write_text(ADMIN_TOKEN)
    (tmp_path / "nowhere.json").write_text("{}")
    with RedisServer(tmp_path, arguments=("--requirepass", "another than that")) as redis:
        url = f"redis://weir:{REDIS_PASSWORD}@127.0.0.1:{redis.port}/0"
        (tmp_path / "weir.yaml").write_text(weir_yaml(data, admin, url, pair))
        async with serving(tmp_path, url) as process, aiohttp.ClientSession() as session:
            await wait_said(tmp_path / "output", "serving")
            told = await seen_by_others(session, data, admin, client_tls(authority.cert))
            pair.key.write_bytes(pair.key.read_bytes()[:100])
            process.send_signal(signal.SIGHUP)
            await wait_said(tmp_path / "output", "certificates refused")
            arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    told += arguments + (tmp_path / "output").read_text()
    assert "login refused" in told  # Redis was asked, with the password
    assert "certificates refused" in told
    assert "hunter2" not in told
    assert "PRIVATE" not in told


@pytest.mark.parametrize(
    "text",
    [
        "redis: {url: 'redis://:hunter2@h:port/0'}",
        "redis: 'redis://:hunter2@h:6379/0'",
        "redis: {url: '${REDIS_URL}', password: x}",
        "admin: {auth: hunter2}",
        "admin: {auth: {token: hunter2}}",
        "telemetry: {otlp: 'http://root:hunter2@h:4318'}",
        "discovery: {etcd: {endpoints: ['https://root:hunter2@h:2379']}}",
    ],
)
def test_a_weir_yaml_that_is_refused_tells_none_either(tmp_path, text):
    (tmp_path / "policy.yaml").write_text(OPEN_POLICY)
    base = "" if text.startswith("discovery") else "discovery: {static: []}\n"
    (tmp_path / "weir.yaml").write_text(f"policy: policy.yaml\n{base}{text}\n")
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "serve", "--config", str(tmp_path / "weir.yaml")],
        env={**os.environ, "REDIS_URL": "redis://:hunter2@h:99999/0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "weir.yaml:" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
