"""What a request, a refusal or an event of a stream costs in our own code: the real gateway, real bytes, no sockets.

    weir bench profile [unary|refusal|event] [--count 20000] [--stages] [--profile]

Client and backend transports are fakes that hand bytes over in memory, so what is measured is parsing, deciding and
writing heads: everything but the kernel. `--stages` samples which file of the program is at work; `--profile` runs
cProfile and prints the dearest functions, each with the price of being watched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.sampling import Samples
from gateway import config as configuration
from gateway.app import Gateway
from gateway.server import DataServer
from gateway.upstream.connection import Connection
from policies import identity

SHOWN = 24
BATCH = 250  # the best of many short batches is what other work on the machine disturbs least
BODY = (
    b'{"model":"tiny","messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":'
    b'"Hello! What is the capital of France, and why?"}],"max_tokens":32}'
)
ANSWER_BODY = (
    b'{"id":"chatcmpl-123","object":"chat.completion","created":1677652288,"model":"tiny","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello there, how may I assist you today? I am a mock backend."},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}'
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ndate: Mon, 23 Nov 2026 16:00:00 GMT\r\ncontent-type: application/json\r\n"
    b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(ANSWER_BODY)
) + ANSWER_BODY
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_DATA = (
    b'data: {"id":"chatcmpl-123","object":"chat.completion.chunk","created":1677652288,"model":"tiny","choices":'
    b'[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}\n\n'
)
EVENT = b"%x\r\n%b\r\n" % (len(_DATA), _DATA)

POLICY = """
version: 1
issuers:
  - {issuer: "https://weir.local", audience: weir, algorithms: [ES256], jwks: jwks.json}
plans:
  free: {requests: 1000000/second, concurrency: 100000}
  spent: {requests: 1/day, burst: 1}
consumers: [{match: {consumer: refusal}, plan: spent}, {match: {any: true}, plan: free}]
routes:
  - name: chat
    match: {path: /v1/chat/completions, model: "tiny*"}
    to: [{service: tiny}]
"""
CONFIG = """
listen: 127.0.0.1:0
admin: {listen: 127.0.0.1:0}
policy: policy.yaml
discovery:
  static:
    - {service: tiny, url: "http://127.0.0.1:1", models: [tiny]}
    - {service: tiny, url: "http://127.0.0.1:2", models: [tiny]}
"""


class Pipe:
    """A transport that hands what is written to a function."""

    def __init__(self, deliver: Any) -> None:
        self._deliver = deliver

    def write(self, data: bytes) -> None:
        self._deliver(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, **_: int) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def replay(work: str, count: int, watched: contextlib.AbstractContextManager[object]) -> float:
    """CPU microseconds of one request, refusal or event."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        key = identity.generate_signing_key()
        (home / "jwks.json").write_bytes(identity.jwks_of(key))
        (home / "policy.yaml").write_text(POLICY)
        token = identity.mint(
            key,
            sub=work,
            groups=(),
            scopes=(),
            issuer="https://weir.local",
            audience="weir",
            ttl=3600,
            wall=time.time(),
        )
        gateway = Gateway(configuration.parse(CONFIG.encode(), {}, base=home))
        async with gateway.running():
            while len(gateway.fleet.backends) < 2:
                await asyncio.sleep(0.01)
            for backend in gateway.fleet.backends.values():
                backend.since = float("-inf")  # long in service: past its slow start
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {token}\r\nContent-Length: {len(BODY)}\r\n\r\n"
            )
            rig = (Stream if work == "event" else Exchange)(gateway, head.encode() + BODY)
            await rig.batch(500)
            with watched:
                best = min([await rig.batch(BATCH) for _ in range(count // BATCH)])
            rig.client.connection_lost(None)
    return best * 1e6


class Loop(uvloop.Loop):  # type: ignore[misc]
    """A loop whose connections are made by `connect`, without sockets."""

    connect: Callable[[Any], None]

    async def create_connection(self, protocol_factory: Callable[[], Any], *_: Any, **__: Any) -> tuple[None, Any]:
        protocol = protocol_factory()
        self.connect(protocol)
        return None, protocol


class Exchange:
    """A client that sends its next request when it has its answer, and a backend that answers at once."""

    answer = ANSWER

    def __init__(self, gateway: Gateway, request: bytes) -> None:
        self.loop = cast("Loop", asyncio.get_running_loop())
        self.request = request
        self.left = 0
        self.done: asyncio.Future[None]
        self.upstream: Connection
        self.loop.connect = self._connect
        server = DataServer(
            gateway.pipeline.handle,
            gateway.pipeline.reject,
            idle=75,
            head_timeout=10,
            header_bytes=32768,
            connections=10,
        )
        self.client = server()
        self.client.connection_made(Pipe(self._on_answer))  # type: ignore[arg-type]

    def _connect(self, connection: Connection) -> None:
        self.upstream = connection
        connection.connection_made(Pipe(lambda _: self.loop.call_soon(connection.data_received, self.answer)))  # type: ignore[arg-type]

    def _on_answer(self, answer: bytes) -> None:
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 429 ")), answer
        self.left -= 1
        if self.left > 0:
            self.loop.call_soon(self.client.data_received, self.request)
        else:
            self.done.set_result(None)

    async def batch(self, count: int) -> float:
        """The CPU seconds of one."""
        self.left, self.done = count, self.loop.create_future()
        started = time.thread_time()
        self.loop.call_soon(self.client.data_received, self.request)
        await self.done
        return (time.thread_time() - started) / count


class Stream(Exchange):
    """One answer without an end, an event at a time."""

    answer = STREAM_HEAD + EVENT

    def _on_answer(self, _: bytes) -> None:
        self.left -= 1
        if self.left > 0:
            self.loop.call_soon(self.upstream.data_received, EVENT)
        else:
            self.done.set_result(None)

    async def batch(self, count: int) -> float:
        """The CPU seconds of one event."""
        if not hasattr(self, "upstream"):
            return await super().batch(1)
        self.left, self.done = count, self.loop.create_future()
        started = time.thread_time()
        self.loop.call_soon(self.upstream.data_received, EVENT)
        await self.done
        return (time.thread_time() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", choices=["unary", "refusal", "event"], default="unary")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profile, samples = cProfile.Profile(), Samples()
    watched = profile if options.profile else samples.taken() if options.stages else contextlib.nullcontext()
    with _access_log_away(), asyncio.Runner(loop_factory=Loop) as runner:
        micros = runner.run(replay(options.work, options.count, watched))
    print(f"{micros:.1f} us each ({options.work}), kernel and log writing apart")
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    if options.stages:
        _print_stages(samples, micros)


def _print_stages(samples: Samples, micros: float) -> None:
    """Microseconds of one by file and by function, the replay's own included."""
    print("\nby file, us")
    for part, share in samples.by_part()[:SHOWN]:
        print(f"{share * micros:8.1f}  {part}")
    print("\nby function, us")
    for place, share in samples.by_function()[: 2 * SHOWN]:
        print(f"{share * micros:8.1f}  {place.part}  {place.function}")


@contextlib.contextmanager
def _access_log_away() -> Iterator[None]:
    """The gateway's lines go to file descriptor 1, which is nowhere meanwhile."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


if __name__ == "__main__":
    main()
