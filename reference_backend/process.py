"""The reference backend as a process: options, listener, models, registrations, end.

It listens from the start, and is not ready until its models are. Told to end (SIGTERM, SIGINT, `POST /drain`) it lets
each of them drain as `served.py` says, and exits with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NoReturn, get_args, get_type_hints
from urllib.parse import urlsplit

import uvloop
from aiohttp.typedefs import Middleware

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import InvalidRegistration, ModelEntry, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from observability.tracing import SpanExporter, otlp_export
from reference_backend import open_inference_grpc, repository
from reference_backend.engine.config import NARROW, ModelError, Narrow
from reference_backend.language import Language, LoadFormat, Sizes
from reference_backend.load_report import PATH as LOAD_PATH
from reference_backend.pool import Pool
from reference_backend.repository import Entry
from reference_backend.served import Model, Service, State, first_of
from reference_backend.server import Api
from reference_backend.spans import span_middleware
from reference_backend.stateless import KINDS

log = logging.getLogger(__name__)
PUBLISH_WITHIN = 2.0  # seconds
STDOUT = 1
LAST_WORDS = 5.0  # seconds for answers that are on their way when all models are gone
PROTOCOLS: dict[repository.Kind, tuple[str, ...]] = {
    "language": ("openai",),
    "embedding": ("openai", "oip"),
    "image": ("openai", "oip"),
    "tensor": ("oip",),
}
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104  they are what is looked for
MODELS = Path(__file__).parent / "models"
EPILOG = """\
examples:
  python -m reference_backend --model tiny --port 9000 --etcd http://127.0.0.1:2379
  curl -N http://127.0.0.1:9000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "What is a KV cache?"}]}'

  python -m reference_backend --repository models/ --serve chat@latest-2 --serve embed
"""


SERVE = "a model of the repository, and its versions: all, latest (default), latest-N, or like 1,3"
MOST_AWAKE = "versions that do not sleep; of more, the one used least recently does"
CACHE_TOKENS = "tokens that all requests together may keep (default: what is needed, or fits a quarter of the memory)"
TENSOR_PARALLEL = "processes, or GPUs, that share a model"
How = dict  # what argparse is told of an option


class CannotStartError(Exception):
    """Something that is needed is not there; the message says what and what to do."""


def _directory(model: str) -> Path:
    return MODELS / model if model in own_models() else Path(model)


def own_models() -> list[str]:
    """The models that come with the backend."""
    return sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def _serve(text: str) -> tuple[str, str]:
    name, which = repository.split_id(text)
    try:
        repository.wanted(which or "latest", [])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, which or "latest"


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            up_to = "or more" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} {up_to}")
        return int(text)

    return read


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://127.0.0.1:2379")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, judged: each field is an option, which argparse is told of by the words behind its type."""

    model: Annotated[Path | None, How(type=_directory, metavar="NAME_OR_PATH", help="`tiny`, or a model's directory")]
    repository: Annotated[Path | None, How(type=Path, metavar="DIR", help="serve the models in DIR/NAME/VERSION/")]
    version: Annotated[str, How(default="", metavar="V", help="version of --model to register (default: none)")]
    serve: Annotated[dict[str, str], How(action="append", default=[], type=_serve, metavar="NAME[@WHICH]", help=SERVE)]
    sleep_after: Annotated[
        float | None, How(type=_number(1), metavar="SECONDS", help="let a model sleep that nobody asked for so long")
    ]
    most_awake: Annotated[int | None, How(type=_number(1), metavar="N", help=MOST_AWAKE)]
    service: Annotated[str | None, How(help="service to register under (default: the model's name)")]
    etcd: Annotated[str | None, How(type=_url, metavar="URL", help="register there (default: do not register)")]
    announce_url: Annotated[
        str | None, How(type=_url, metavar="URL", help="where gateways reach this backend, if elsewhere")
    ]
    host: Annotated[str, How(default="127.0.0.1", help="address to listen on (default %(default)s)")]
    port: Annotated[int, How(type=_number(0, 65535), default=0, help="port to listen on (default: any free one)")]
    grpc_port: Annotated[int, How(type=_number(0, 65535), default=0, help="port for gRPC (default: any free one)")]
    otlp: Annotated[str | None, How(type=_url, metavar="URL", help="collector for traces (default: none)")]
    max_running: Annotated[int, How(type=_number(1), default=16, help="requests in one batch (default %(default)s)")]
    max_waiting: Annotated[int, How(type=_number(0), default=16, help="requests that may wait (default %(default)s)")]
    context: Annotated[int | None, How(type=_number(1), help="tokens per request (default: the model's, at most 8192)")]
    cache_tokens: Annotated[int | None, How(type=_number(1), help=CACHE_TOKENS)]
    quantize: Annotated[Narrow | None, How(choices=NARROW, help="keep weights in eight bits (default: as they are)")]
    ranks: Annotated[int, How(flag="--tensor-parallel", type=_number(1), default=1, metavar="N", help=TENSOR_PARALLEL)]
    load_format: Annotated[
        LoadFormat, How(choices=get_args(LoadFormat), default="safetensors", help="dummy: random weights")
    ]

    @property
    def sizes(self) -> Sizes:
        return Sizes(**{each.name: getattr(self, each.name) for each in fields(Sizes)})


class _Parser(argparse.ArgumentParser):
    """Wrong use is told in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reference_backend: {message}; see `{self.prog} --help`\n")


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line. Exits with 2 and a line that says why when it is wrong."""
    parser = _Parser(
        prog="python -m reference_backend",
        description="Serve models over the OpenAI API and the Open Inference Protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    for name, hint in get_type_hints(Options, include_extras=True).items():
        how = {"flag": f"--{name.replace('_', '-')}"} | hint.__metadata__[0]
        (source if name in ("model", "repository") else parser).add_argument(how.pop("flag"), dest=name, **how)
    given = parser.parse_args(arguments)
    if given.etcd and not given.announce_url and given.host in WILDCARDS:
        parser.error(f"gateways cannot reach {given.host}: say with --announce-url where this backend is")
    if given.repository is None and given.serve:
        parser.error("--serve names models of a --repository")
    if given.repository is not None and given.version:
        parser.error("the versions of a repository are its directories; choose with --serve NAME@VERSION")
    return Options(**vars(given) | {"serve": dict(given.serve)})


def entries(options: Options, name: str) -> list[Entry]:
    """The versions of a model that are to be served."""
    if options.repository is not None:
        return repository.wanted(options.serve.get(name, "latest"), repository.versions(options.repository, name))
    entry = only_entry(options)
    return [entry] if entry.name == name else []


def known(options: Options) -> list[Entry]:
    """Every version that could be served."""
    root = options.repository
    if root is None:
        return [only_entry(options)]
    try:
        return [entry for name in repository.names(root) for entry in repository.versions(root, name)]
    except ModelError as error:  # it was there at the start
        log.warning("%s", error)
        return []


def only_entry(options: Options) -> Entry:
    """What --model names: a directory with a model, or one with versions of it. Raises CannotStartError."""
    directory = options.model or Path()
    if not directory.is_dir():
        known = ", ".join(own_models())
        raise CannotStartError(f"no model at {directory}; --model takes a Hugging Face directory, or one of: {known}")
    place = directory.resolve()
    found = repository.versions(place.parent, place.name)
    if not found or any((directory / name).exists() for name in ("config.json", "model.toml")):
        return Entry(place.name, options.version, directory)
    chosen = [entry for entry in found if options.version in ("", entry.version)]
    if not chosen:
        numbers = ", ".join(entry.version for entry in found)
        raise CannotStartError(f"{directory} has no version {options.version}; it has {numbers}")
    return chosen[-1]


def names(options: Options) -> list[str]:
    """The models to load at the start. Raises CannotStartError, ModelError."""
    if options.repository is None:
        return [only_entry(options).name]
    there = repository.names(options.repository)
    for name in options.serve:
        if not entries(options, name):
            raise CannotStartError(f"{options.repository} has no model {name} in a version that --serve asks for")
    return list(options.serve) or there


async def serve(options: Options, clock: Callable[[], float], wall: Callable[[], float]) -> int:
    """Serve until told to end; returns the exit code. Raises CannotStartError, ModelError, InvalidRegistration."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    wanted = names(options)
    registry = Registry(options)
    service = Service(
        lambda entry: read(entry, options, clock, wall), registry.announced, options.sleep_after, options.most_awake
    )
    pool = Pool(service, lambda name: entries(options, name), lambda: known(options))
    api = Api(pool, wall=wall, end=ending.set)
    async with contextlib.AsyncExitStack() as stack:
        if options.etcd is not None:
            registry.client = await stack.enter_async_context(EtcdClient(EtcdSettings(endpoints=(options.etcd,))))
        host = f"[{options.host}]" if ":" in options.host else options.host
        with _can_listen(options, options.port, "--port"):
            listening = api.listening(options.host, options.port, *_tracing(stack, options, wall))
            registry.url = f"http://{host}:{await stack.enter_async_context(listening)}"
        with _can_listen(options, options.grpc_port, "--grpc-port"):
            grpc = open_inference_grpc.listening(pool, api.in_flight, f"{host}:{options.grpc_port}")
            registry.grpc_port = await stack.enter_async_context(grpc)
        async with pool.running():
            loading = asyncio.ensure_future(load(pool, wanted, registry.url))
            await first_of(ending.wait(), asyncio.wait({loading}))
            failure = loading.result() if loading.done() else None
            if failure is None:
                await ending.wait()
            loading.cancel()
        if failure is not None:
            raise failure
        await first_of(api.in_flight.wait_idle(), asyncio.sleep(LAST_WORDS))
    return 0


def read(entry: Entry, options: Options, clock: Callable[[], float], wall: Callable[[], float]) -> Model:
    """What of a model the server needs itself. Raises ModelError."""
    card = entry.card()
    if card.kind == "language":
        return Language.read(entry, options.sizes, clock, wall)
    return KINDS[card.kind](entry, card, clock, wall)


async def load(pool: Pool, wanted: Sequence[str], url: str) -> Exception | None:
    """Load what is there at the start, and say so. Gives a failure when there was nothing but failures."""
    served = await pool.start(wanted)
    failures = [each.failure for each in served if each.failure is not None]
    ready = ", ".join(str(each.entry) for each in served if each.state is State.READY)
    if failures and not ready:
        return failures[0]
    for failure in failures:
        log.error("cannot be served: %s", failure)
    with contextlib.suppress(OSError):  # a full disk behind it stops nobody
        os.write(STDOUT, f"serving {ready or 'nothing'} at {url}\n".encode())  # the one line that a caller waits for
    return None


def _tracing(stack: contextlib.AsyncExitStack, options: Options, wall: Callable[[], float]) -> list[Middleware]:
    """What tells the collector of requests, until the stack is left."""
    if options.otlp is None:
        return []
    exporter = SpanExporter(otlp_export(options.otlp, "weir-backend", "0.1.0"))
    stack.callback(exporter.close)
    return [span_middleware(exporter, wall)]


@contextlib.contextmanager
def _can_listen(options: Options, port: int, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, why = f"{options.host}:{port}", error.strerror or error
        raise CannotStartError(f"cannot listen on {where}: {why}; choose another {name}") from error


@dataclass(slots=True)
class Registry:
    """How the versions that are served are told to gateways, if they are: each under a key of its own in etcd."""

    options: Options
    client: EtcdClient | None = None
    url: str = ""
    grpc_port: int = 0

    @contextlib.asynccontextmanager
    async def announced(self, entry: Entry, id_: str, model: Model) -> AsyncIterator[Announcement | None]:
        """The registration of one version. Raises InvalidRegistration."""
        if self.client is None:
            yield None
            return
        options = self.options
        path = f"/models/{entry.name}/{entry.version}" if options.repository is not None else ""
        registration = Registration(
            url=(options.announce_url or self.url) + path,
            protocols=PROTOCOLS[model.kind],
            models=(ModelEntry(entry.name, entry.version),),
            max_concurrency=model.bound,
            load=path + LOAD_PATH,
            grpc_port=self.grpc_port,
            grpc_health=f"model/{entry}",
        )
        key = f"{options.service or entry.name}/{id_}"
        async with backend_announcement(self.client, key, registration, rng=random.SystemRandom()) as announcement:
            # What takes the place of another is known before that one drains; an etcd that is away stops nobody.
            await first_of(announcement.wait_held(), asyncio.sleep(PUBLISH_WITHIN))
            yield announcement


def main(arguments: Sequence[str], *, clock: Callable[[], float], wall: Callable[[], float]) -> int:
    """The command. Returns the exit code: 0 ended well, 1 the model failed, 2 wrong use, 3 something is not there."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        return uvloop.run(serve(options, clock, wall))
    except InvalidRegistration as error:
        print(f"reference_backend: cannot be registered: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (ModelError, CannotStartError) as error:
        print(f"reference_backend: {error}", file=sys.stderr)  # noqa: T201
        return 3
