"""A repository of models on disk, and a backend over it on real sockets, in this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reference_backend import open_inference_grpc, process
from reference_backend.pool import Pool
from reference_backend.served import Service
from reference_backend.server import Api
from tests.support.unregistered import unregistered

ADDER = 'kind = "tensor"\nexecutor = "tests.support.adder"\nisolation = "thread"\nmax_batch = 8\n'


def put(root: Path, place: str, toml: str = ADDER) -> None:
    """Put a version ("adder/1") into the repository."""
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "model.toml").write_text(toml)


@dataclass(frozen=True, slots=True)
class Store:
    root: Path
    url: str
    grpc: str
    pool: Pool


@contextlib.asynccontextmanager
async def running_store(root: Path, models: Mapping[str, str] | None = None, *arguments: str) -> AsyncIterator[Store]:
    """A backend over `models` ("adder/1": its model.toml). `arguments` are those of its command line."""
    for place, toml in (models if models is not None else {"adder/1": ADDER}).items():
        put(root, place, toml)
    options = process.parse(["--repository", str(root), *arguments])
    service = Service(
        lambda entry: process.read(entry, options, time.monotonic, time.time),
        unregistered,
        options.sleep_after,
        options.most_awake,
        grace=0.0,
        finish_within=0.0,
    )
    pool = Pool(service, lambda name: process.entries(options, name), lambda: process.known(options))
    api = Api(pool, wall=time.time, end=lambda: None)
    async with pool.running():
        await pool.start(process.names(options))
        grpc = open_inference_grpc.listening(pool, api.in_flight, "127.0.0.1:0")
        async with api.listening("127.0.0.1", 0) as port, grpc as grpc_port:
            yield Store(root, f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", pool)
