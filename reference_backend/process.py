"""One reference backend as a process: options, model, listener, registration, end.

LOADING (nothing listens) => SERVING => DRAINING (told to end: the registration says so, new requests are still taken
while that gets around) => FINISHING (new requests are refused, old ones end) => exit 0. A model that fails while
serving ends the process with 1, so that whoever started it starts it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
import uvloop
from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import InvalidRegistration, ModelEntry, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from observability.tracing import SpanExporter, otlp_export
from reference_backend.engine.config import ModelConfig, ModelError
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.request import Published, Sampling
from reference_backend.engine.request import Sequence as EngineSequence
from reference_backend.server import Api, Phase, deliver
from reference_backend.spans import span_middleware
from reference_backend.tokenizer import Tokenizer

ACCEPT_WHILE_DRAINING = 0.5  # seconds: about twice what a watcher needs to hear of it
FINISH_WITHIN = 60.0  # seconds for what is in flight
SMALL_PARAMETERS = 50_000_000  # below, a second thread costs more in waiting than it gives in arithmetic
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104  they are what is looked for
LONGEST_CONTEXT = 8192  # tokens, unless asked for: at least one such request must fit the cache
CACHE_SHARE = 0.25  # of the memory that is free: enough for many, and others live here too
MODELS = Path(__file__).parent / "models"
EPILOG = """\
example:
  python -m reference_backend --model tiny --port 9000 --etcd http://127.0.0.1:2379
  curl -N http://127.0.0.1:9000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "What is a KV cache?"}]}'
"""


class CannotStartError(Exception):
    """Something that is needed is not there; the message says what and what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, judged."""

    model: Path
    name: str
    version: str
    service: str
    host: str
    port: int
    etcd: str | None
    announce_url: str | None
    max_running: int
    max_waiting: int
    context: int | None
    cache_tokens: int | None
    otlp: str | None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line. Exits with 2 and a line that says why when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_backend",
        description="Serve one model over the OpenAI API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="`tiny`, or a Hugging Face directory")
    parser.add_argument("--service", help="service to register under (default: the model's name)")
    parser.add_argument("--version", default="", metavar="V", help="version of the model to register (default: none)")
    parser.add_argument("--etcd", type=_url, metavar="URL", help="register there (default: do not register)")
    parser.add_argument(
        "--announce-url", type=_url, metavar="URL", help="where gateways reach this backend, if elsewhere"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=_port, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--max-running", type=_positive, default=16, help="requests in one batch (default %(default)s)")
    parser.add_argument("--max-waiting", type=_count, default=16, help="requests that may wait (default %(default)s)")
    parser.add_argument("--context", type=_positive, help="tokens per request (default: the model's, at most 8192)")
    parser.add_argument(
        "--cache-tokens",
        type=_positive,
        help="tokens that all requests together may keep (default: what is needed, or fits a quarter of the memory)",
    )
    parser.add_argument("--otlp", type=_url, metavar="URL", help="collector for traces (default: none)")
    given = parser.parse_args(arguments)
    if given.etcd and not given.announce_url and given.host in WILDCARDS:
        parser.error(f"gateways cannot reach {given.host}: say with --announce-url where this backend is")
    is_known = given.model in {path.name for path in MODELS.iterdir()}
    model = MODELS / given.model if is_known else Path(given.model)
    return Options(
        model=model,
        name=model.resolve().name,
        version=given.version,
        service=given.service or model.resolve().name,
        host=given.host,
        port=given.port,
        etcd=given.etcd,
        announce_url=given.announce_url,
        max_running=given.max_running,
        max_waiting=given.max_waiting,
        context=given.context,
        cache_tokens=given.cache_tokens,
        otlp=given.otlp,
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _port(text: str) -> int:
    if _count(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return int(text)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://127.0.0.1:2379")


def load(options: Options, clock: Callable[[], float]) -> tuple[Engine, Tokenizer]:
    """Read the model and have it produce one token. Raises ModelError, CannotStartError."""
    if not options.model.is_dir():
        known = ", ".join(sorted(path.name for path in MODELS.iterdir()))
        raise CannotStartError(
            f"no model at {options.model}; --model takes a Hugging Face directory, or one of: {known}"
        )
    tokenizer = Tokenizer(options.model)
    try:
        if torch.cuda.is_available():
            model = load_model(options.model, torch.device("cuda"), torch.bfloat16)
        else:
            model = load_model(options.model, torch.device("cpu"))
        engine = Engine(
            model,
            settings_for(options, model),
            end_tokens=tokenizer.end_tokens,
            clock=clock,
            rng=random.SystemRandom(),
            overlap=model.device.type != "cpu",
        )
    except RuntimeError as error:  # so torch says that memory is not enough
        reason = str(error).partition("\n")[0]
        raise CannotStartError(f"the model does not fit: {reason}; try a smaller --context or --max-running") from error
    if model.parameters < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    return warm(engine), tokenizer


def settings_for(options: Options, model: Llama) -> Settings:
    """The engine's sizes: what was asked for, within the model's context and the memory that is there."""
    context = min(options.context or LONGEST_CONTEXT, model.config.context)
    fitting = int(CACHE_SHARE * free_memory(model.device)) // bytes_per_token(model.config, model.dtype)
    return Settings(
        slots=options.max_running,
        max_waiting=options.max_waiting,
        context=context,
        cache_tokens=options.cache_tokens or min(options.max_running * context, fitting),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the cache will be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize


def warm(engine: Engine) -> Engine:
    """Have one token produced. Raises ModelError when the model does not compute with numbers."""
    engine.submit(EngineSequence([0], Sampling(max_tokens=1), None))
    while engine.load().running or engine.load().waiting:
        published = engine.turn(engine.clock())
        if any(delta.finish == "failed" for _, delta in published):
            raise ModelError("the model's scores are not finite: its weights are broken")
    return engine


async def serve(options: Options, engine: Engine, tokenizer: Tokenizer, wall: Callable[[], float]) -> int:
    """Serve until a signal; returns the exit code. Raises CannotStartError."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)

    def hand_over(published: Published) -> None:
        deliver(published)
        if engine.has_failed:
            ending.set()

    api = Api(engine, tokenizer, model=options.name, wall=wall)
    engine.start(lambda published: loop.call_soon_threadsafe(hand_over, published))
    try:
        async with listening(api, options, wall) as url, announced(options, url) as announcement:
            print(f"serving {options.name} at {url}", flush=True)  # noqa: T201  the one line that a caller waits for
            await ending.wait()
            await drain(api, announcement)
    finally:
        engine.close()
    return 1 if engine.has_failed else 0


@contextlib.asynccontextmanager
async def listening(api: Api, options: Options, wall: Callable[[], float]) -> AsyncIterator[str]:
    """The listener, and its URL. What is still in flight at the end is cut."""
    with contextlib.ExitStack() as stack:
        middlewares: list[Middleware] = []
        if options.otlp:
            exporter = SpanExporter(otlp_export(options.otlp, "weir-backend", "0.1.0"))
            stack.callback(exporter.close)
            middlewares.append(span_middleware(exporter, options.name, wall))
        # Without handler_cancellation a client that left would be generated for to the end.
        runner = web.AppRunner(
            api.application(*middlewares), handler_cancellation=True, access_log=None, shutdown_timeout=0.0
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, options.host, options.port)
            try:
                await site.start()
            except OSError as error:
                where = f"{options.host}:{options.port}"
                raise CannotStartError(
                    f"cannot listen on {where}: {error.strerror or error}; choose another --port"
                ) from error
            host = f"[{options.host}]" if ":" in options.host else options.host
            yield f"http://{host}:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def announced(options: Options, url: str) -> AsyncIterator[Announcement | None]:
    """The registration in etcd, if one is wanted. Raises InvalidRegistration."""
    if options.etcd is None:
        yield None
        return
    registration = Registration(
        url=options.announce_url or url,
        models=(ModelEntry(options.name, options.version),),
        max_concurrency=options.max_running + options.max_waiting,
    )
    key = f"{options.service}/{secrets.token_hex(6)}"
    async with (
        EtcdClient(EtcdSettings(endpoints=(options.etcd,))) as client,
        backend_announcement(client, key, registration, rng=random.SystemRandom()) as announcement,
    ):
        yield announcement


async def drain(api: Api, announcement: Announcement | None) -> None:
    """Tell that this backend is going, let the news get around, then refuse, then wait for what is in flight."""
    api.phase = Phase.DRAINING
    if announcement is not None:
        await announcement.drain()
    await asyncio.sleep(ACCEPT_WHILE_DRAINING)
    api.phase = Phase.CLOSED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FINISH_WITHIN):
            await api.in_flight.wait_idle()


def main(arguments: Sequence[str], *, clock: Callable[[], float], wall: Callable[[], float]) -> int:
    """The command. Returns the exit code: 0 ended well, 1 the model failed, 2 wrong use, 3 something is not there."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        engine, tokenizer = load(options, clock)
        return uvloop.run(serve(options, engine, tokenizer, wall))
    except InvalidRegistration as error:
        print(f"reference_backend: cannot be registered: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (ModelError, CannotStartError) as error:
        print(f"reference_backend: {error}", file=sys.stderr)  # noqa: T201
        return 3
