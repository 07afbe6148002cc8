"""The default model, loaded once, and the API over it on a real socket. Only for tests that have torch."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

import reference_backend
from reference_backend.engine.config import ModelError
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.frames import Ready, Start, framed
from reference_backend.engine.grammar import Grammars
from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.service import Line, serve
from reference_backend.language import Language
from reference_backend.pool import Pool
from reference_backend.repository import Entry
from reference_backend.served import Served, Service
from reference_backend.server import Api
from reference_backend.tokenizer import Tokenizer
from tests.support.integrity import faults
from tests.support.unregistered import unregistered

DIRECTORY = Path(reference_backend.__file__).parent / "models" / "tiny"
CREATED = 1_800_000_000


@cache
def tiny() -> tuple[Llama, Tokenizer]:
    torch.set_num_threads(1)
    return load_model(DIRECTORY, torch.device("cpu")), Tokenizer(DIRECTORY)


def tiny_engine(*, slots: int = 4, context: int = 512) -> Engine:
    model, tokenizer = tiny()
    settings = Settings(slots=slots, context=context, cache_tokens=slots * context)
    return Engine(model, settings, end_tokens=tokenizer.end_tokens, rng=Random(1), grammars=tiny_grammars())


@cache
def tiny_grammars() -> Grammars:
    model, tokenizer = tiny()
    return Grammars(DIRECTORY / "tokenizer.json", model.config.vocab_size, tokenizer.end_tokens, time.thread_time)


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    api: Api
    served: Served
    language: Language
    engine: Engine

    async def wait_load(self, condition) -> None:
        """Until the condition holds for the load; fails after 60 s."""
        async with asyncio.timeout(60):
            while not condition(self.language.load()):
                await asyncio.sleep(0.002)

    async def wait_idle(self) -> None:
        """Until no sequence runs or waits, here and in the engine; fails after 60 s."""
        await self.wait_load(lambda load: not load.running and not load.waiting)
        async with asyncio.timeout(60):
            while self.engine.is_busy:
                await asyncio.sleep(0.002)
        assert faults(self.engine.scheduler) == []

    @contextlib.contextmanager
    def slowly(self):
        """Meanwhile each turn takes 10 ms: what runs is still under way when the test has done what it does to it."""
        turn = self.engine.turn

        def slow(now):
            time.sleep(0.01)
            return turn(now)

        self.engine.turn = slow
        try:
            yield
        finally:
            del self.engine.turn


@contextlib.asynccontextmanager
async def running_api(
    *middlewares, start: bool = True, max_waiting: int = 4, clock=time.monotonic, **sizes
) -> AsyncIterator[Running]:
    """The API as the process serves it, with the worker in a thread of this process instead of one of its own.

    With `start=False` the worker takes requests and does nothing.
    """
    engine = tiny_engine(**sizes)
    ours, theirs = socket.socketpair()
    theirs.send(framed(Ready(engine.settings.context, engine.load())))
    thread = threading.Thread(target=_serve, args=(engine, theirs, clock))
    if start:
        thread.start()
    start_message = Start("tiny", [], 0, None, None)
    language = InThread(ours, tiny()[1], start_message, engine.settings.slots + max_waiting, clock, lambda: CREATED)
    pool = Pool(
        Service(lambda _entry: language, unregistered, grace=0.0, finish_within=0.0),
        lambda name: [Entry(name, "", DIRECTORY)],
        list,
    )
    api = Api(pool, wall=lambda: CREATED, end=lambda: None)
    try:
        async with pool.running():
            [served] = await pool.start(["tiny"])
            async with api.listening("127.0.0.1", 0, *middlewares) as port:
                yield Running(f"http://127.0.0.1:{port}", api, served, language, engine)
    finally:
        if start:
            await asyncio.to_thread(thread.join)
        theirs.close()


class InThread(Language):
    """A language model whose worker is at the other end of a socket already; it has one life."""

    def __init__(self, connection: socket.socket, *how) -> None:
        super().__init__(*how)
        self._connection: socket.socket | None = connection

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        connection, self._connection = self._connection, None
        if connection is None:
            raise ModelError("it had its one life")
        async with self.linked(connection):
            yield


def _serve(engine: Engine, connection: socket.socket, clock) -> None:
    with Connection(connection.detach()) as end:
        serve(engine, Line(end), clock)
