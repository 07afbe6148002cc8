"""The whole gateway in this process, before backends of the test's choice, with discovery.static and a policy given as text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from gateway import config as configuration
from gateway.app import Gateway

OPEN_POLICY = """
version: 1
anonymous: true
routes:
  - name: chat
    match: {path: "/*"}
    to: [{service: tiny}]
    timeout: {connect: 1s, first_byte: 5s, idle: 5s, total: 30s}
"""


def policy_with(**settings: str) -> str:
    """OPEN_POLICY with keys of its route replaced or added, each value as YAML text."""
    lines = [line for line in OPEN_POLICY.rstrip().split("\n") if line.strip().split(":")[0] not in settings]
    return "\n".join([*lines, *(f"    {key}: {value}" for key, value in settings.items()), ""])


@contextlib.asynccontextmanager
async def running_gateway(
    home: Path,
    *urls: str,
    policy: str = OPEN_POLICY,
    config: str = "",
    healthy: bool = True,
    models: str = "[tiny]",
) -> AsyncIterator[Gateway]:
    """A gateway whose backends have been probed. `config` is more text for weir.yaml."""
    backends = "".join(f'    - {{service: tiny, url: "{url}", models: {models}}}\n' for url in urls) or "    []\n"
    (home / "policy.yaml").write_text(policy)
    text = (
        "listen: 127.0.0.1:0\nadmin: {listen: 127.0.0.1:0}\npolicy: policy.yaml\n"
        f"discovery:\n  static:\n{backends}{config}"
    )
    gateway = Gateway(configuration.parse(text.encode(), {}, base=home))
    async with gateway.running():
        async with asyncio.timeout(5):
            while len(gateway.fleet.backends) < len(urls) or (
                healthy and any(backend.healthy is None for backend in gateway.fleet.backends.values())
            ):
                await asyncio.sleep(0.01)
        yield gateway


async def until(condition, seconds: float = 5.0) -> None:
    """Wait for a condition that something else brings about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
