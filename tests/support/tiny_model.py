"""The default model, loaded once, and the API over it on a real socket. Only for tests that have torch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from aiohttp import web

import reference_backend
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.model import Llama, load_model
from reference_backend.server import Api, deliver
from reference_backend.tokenizer import Tokenizer

DIRECTORY = Path(reference_backend.__file__).parent / "models" / "tiny"
CREATED = 1_800_000_000


@cache
def tiny() -> tuple[Llama, Tokenizer]:
    torch.set_num_threads(1)
    return load_model(DIRECTORY, torch.device("cpu")), Tokenizer(DIRECTORY)


def tiny_engine(*, slots: int = 4, max_waiting: int = 4, context: int = 512, clock=time.monotonic) -> Engine:
    model, tokenizer = tiny()
    settings = Settings(slots=slots, max_waiting=max_waiting, context=context, cache_tokens=slots * context)
    return Engine(model, settings, end_tokens=tokenizer.end_tokens, clock=clock, rng=Random(1))


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    api: Api
    engine: Engine

    async def wait_idle(self) -> None:
        """Until no sequence runs or waits; fails after 5 s."""
        async with asyncio.timeout(5):
            while self.engine.load().running or self.engine.load().waiting:
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running_api(*middlewares, start: bool = True, **sizes) -> AsyncIterator[Running]:
    """The API as the process serves it. With `start=False` the engine takes requests and does nothing."""
    engine = tiny_engine(**sizes)
    api = Api(engine, tiny()[1], model="tiny", wall=lambda: CREATED)
    loop = asyncio.get_running_loop()
    if start:
        engine.start(lambda published: loop.call_soon_threadsafe(deliver, published))
    runner = web.AppRunner(api.application(*middlewares), handler_cancellation=True, shutdown_timeout=0.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Running(f"http://127.0.0.1:{runner.addresses[0][1]}", api, engine)
    finally:
        await runner.cleanup()
        engine.close()
