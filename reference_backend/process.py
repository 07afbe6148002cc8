"""One reference backend as a process: options, model, listener, registration, end.

LOADING (nothing listens) => SERVING => DRAINING (told to end: the registration says so, new requests are still taken
while that gets around) => FINISHING (new requests are refused, old ones end) => exit 0. The model runs in a process of
its own; when that is gone, the registration is withdrawn, another one is started, and registered when it is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import InvalidRegistration, ModelEntry, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from observability.tracing import SpanExporter, otlp_export
from reference_backend.engine.config import ModelError, read_config
from reference_backend.engine.frames import Start
from reference_backend.load_report import PATH as LOAD_PATH
from reference_backend.server import Api, Phase
from reference_backend.spans import span_middleware
from reference_backend.tokenizer import Tokenizer
from reference_backend.worker import Worker

ACCEPT_WHILE_DRAINING = 0.5  # seconds: about twice what a watcher needs to hear of it
FINISH_WITHIN = 60.0  # seconds for what is in flight
FIRST_RESTART, LAST_RESTART = 0.1, 10.0  # seconds before a lost worker is replaced; doubled each time in between
log = logging.getLogger(__name__)
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104  they are what is looked for
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


def load(options: Options) -> Tokenizer:
    """What of the model this process needs itself. Raises ModelError, CannotStartError."""
    if not options.model.is_dir():
        known = ", ".join(sorted(path.name for path in MODELS.iterdir()))
        raise CannotStartError(
            f"no model at {options.model}; --model takes a Hugging Face directory, or one of: {known}"
        )
    config, tokenizer = read_config(options.model), Tokenizer(options.model)
    if tokenizer.largest_token >= config.vocab_size:
        raise ModelError(
            f"{options.model}: the tokenizer knows token {tokenizer.largest_token}, the model only "
            f"{config.vocab_size} of them; tokenizer.json and config.json do not belong together"
        )
    return tokenizer


async def serve(options: Options, tokenizer: Tokenizer, clock: Callable[[], float], wall: Callable[[], float]) -> int:
    """Serve until a signal; returns the exit code. Raises CannotStartError, ModelError, InvalidRegistration."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    worker = Worker(options.max_running + options.max_waiting, clock)
    api = Api(worker, tokenizer, model=options.name, wall=wall)
    start = Start(
        str(options.model), sorted(tokenizer.end_tokens), options.max_running, options.context, options.cache_tokens
    )
    key = f"{options.service}/{secrets.token_hex(6)}"
    async with contextlib.AsyncExitStack() as stack:
        async with worker.running(start):
            url = await stack.enter_async_context(listening(api, options, wall))
            said = f"serving {options.name} at {url}"
            if await serve_until(ending, api, worker, options, url, key, said):
                return 0
        delay = FIRST_RESTART
        while True:
            log.error("the worker is gone; another one is started in %.1f s", delay)
            if await is_set_within(ending, delay):
                return 0
            delay = min(2 * delay, LAST_RESTART)
            try:
                async with worker.running(start):
                    delay = FIRST_RESTART
                    if await serve_until(ending, api, worker, options, url, key, f"{said} again"):
                        return 0
            except ModelError as error:
                log.error("it cannot be started: %s", error)  # noqa: TRY400  what to do is in the message


async def serve_until(
    ending: asyncio.Event, api: Api, worker: Worker, options: Options, url: str, key: str, said: str
) -> bool:
    """Serve with this worker. Returns True after draining, False when the worker is lost."""
    async with announced(options, url, key) as announcement:
        print(said, flush=True)  # noqa: T201  the one line that a caller waits for
        waits = [asyncio.ensure_future(ending.wait()), asyncio.ensure_future(worker.wait_lost())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        if ending.is_set():
            await drain(api, announcement)
        return ending.is_set()


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but not for ever."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


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
async def announced(options: Options, url: str, key: str) -> AsyncIterator[Announcement | None]:
    """The registration in etcd, if one is wanted. Raises InvalidRegistration."""
    if options.etcd is None:
        yield None
        return
    registration = Registration(
        url=options.announce_url or url,
        models=(ModelEntry(options.name, options.version),),
        max_concurrency=options.max_running + options.max_waiting,
        load=LOAD_PATH,
    )
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
        return uvloop.run(serve(options, load(options), clock, wall))
    except InvalidRegistration as error:
        print(f"reference_backend: cannot be registered: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (ModelError, CannotStartError) as error:
        print(f"reference_backend: {error}", file=sys.stderr)  # noqa: T201
        return 3
