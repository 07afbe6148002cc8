"""The whole gateway in this process, with a policy given as text, before backends of the test's choice: known from the
start (`running_gateway`) or found in a real etcd (`etcd_gateway`, `announced`)."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from random import Random
from types import MappingProxyType

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import DEFAULT_PREFIX, ModelEntry, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from gateway import config as configuration
from gateway.app import Gateway

# Times that no machine is too slow for. A test that is about one of them sets it.
OPEN_POLICY = """
version: 1
anonymous: true
routes:
  - name: chat
    match: {path: "/*"}
    to: [{service: tiny}]
    timeout: {connect: 5s, first_byte: 60s, idle: 60s, total: 100s}
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
    others: Mapping[str, str] = MappingProxyType({}),
    grpc_ports: Iterable[int] = (),
) -> AsyncIterator[Gateway]:
    """A gateway whose backends have been probed. `config` is more text for weir.yaml; `others` are more backends, each
    the only one of a service: service -> URL, with a model of the same name. `grpc_ports` are those of `urls`."""
    ports = chain((f", grpc_port: {port}" for port in grpc_ports), repeat(""))
    backends = "".join(
        [
            f'    - {{service: tiny, url: "{url}", models: {models}{port}}}\n'
            for url, port in zip(urls, ports, strict=False)
        ]
        + [f'    - {{service: {name}, url: "{url}", models: [{name}]}}\n' for name, url in others.items()]
    )
    backends = backends or "    []\n"
    (home / "policy.yaml").write_text(policy)
    async with _gateway(home, f"discovery:\n  static:\n{backends}{config}").running() as gateway:
        async with asyncio.timeout(60):
            while len(gateway.fleet.backends) < len(urls) + len(others) or (
                healthy and any(backend.healthy is None for backend in gateway.fleet.backends.values())
            ):
                await asyncio.sleep(0.01)
        yield gateway


@contextlib.asynccontextmanager
async def etcd_gateway(
    home: Path,
    etcd: str | Sequence[str],
    prefix: str = DEFAULT_PREFIX,
    *,
    policy: str | None = OPEN_POLICY,
    place: str = "policy.yaml",
    config: str = "",
    etcd_keys: dict[str, str] | None = None,
    networks: Sequence[str] = (),
) -> AsyncIterator[Gateway]:
    """A gateway that finds its backends in the etcd of this URL, or of these. `policy` None: `place` has one already.

    `etcd_keys` are more keys of `discovery.etcd`, `networks` are `discovery.allow_networks` (none: the default).
    """
    if policy is not None:
        (home / place).write_text(policy)
    there = {"endpoints": [etcd] if isinstance(etcd, str) else list(etcd), "prefix": prefix, **(etcd_keys or {})}
    discovery = {"etcd": there, **({"allow_networks": list(networks)} if networks else {})}
    async with _gateway(home, f"discovery: {json.dumps(discovery)}\n{config}", place).running() as gateway:
        yield gateway


def _gateway(home: Path, config: str, place: str = "policy.yaml") -> Gateway:
    text = f"listen: 127.0.0.1:0\nadmin: {{listen: 127.0.0.1:0}}\npolicy: {place}\n{config}"
    return Gateway(configuration.parse(text.encode(), {}, base=home))


@contextlib.asynccontextmanager
async def announced(
    etcd: str,
    key: str,
    url: str,
    prefix: str = DEFAULT_PREFIX,
    *,
    models: tuple[str, ...] = ("tiny",),
    load: str | None = None,
) -> AsyncIterator[Announcement]:
    """A backend "service/id" that etcd knows of, as `weir register` would make it known."""
    registration = Registration(url, models=tuple(map(ModelEntry, models)), load=load)
    client = EtcdClient(EtcdSettings((etcd,)))
    announcement = backend_announcement(client, key, registration, rng=Random(0), prefix=prefix)
    async with client, announcement:
        async with asyncio.timeout(60):
            await announcement.wait_held()
        yield announcement


async def until(condition, seconds: float = 30.0) -> None:
    """Wait for a condition that something else brings about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
