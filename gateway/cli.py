"""The command line: `weir up`, `serve`, `backend`, `register`, `backends`, `policy`, `token`, `bench`.

Exit codes: 0 fine; 1 the answer is no; 2 wrong use; 3 something it needs is not there. An expected failure is one line
on stderr, `weir: what is wrong; what to do`. What is heavy is imported inside the command that needs it, so that
`weir --help` is instant and works where a library is missing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click

from gateway.children import CannotRun, ChildFailed

ETCD = "http://127.0.0.1:2379"
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}

etcd_option = click.option("--etcd", default=ETCD, show_default=True, metavar="URL", help="Where etcd listens.")
existing_file = click.Path(path_type=Path, dir_okay=False)


class WrongUse(click.ClickException):
    """What was asked for makes no sense, told in one line."""

    exit_code = 2


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    try:
        code = weir.main(args, prog_name="weir", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "weir"
        _end(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except ChildFailed as error:
        _end(str(error), 2 if error.exit_code == 2 else 3)
    except CannotRun as error:
        _end(str(error), 3)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code or 0)


def _end(message: str, code: int) -> None:
    print(f"weir: {message}", file=sys.stderr)
    sys.exit(code)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: weir up",
)
@click.version_option(package_name="weir")
def weir() -> None:
    """An AI gateway: discovers, authenticates, limits, balances and traces inference requests."""


@weir.command(epilog="Example: weir up --port 9000 --backends 3")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(1, 65535), metavar="PORT", help="The API's port."
)
@click.option(
    "--admin-port",
    default=8081,
    show_default=True,
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="The console's port.",
)
@click.option(
    "--backends", default=2, show_default=True, type=click.IntRange(0, 64), metavar="N", help="How many backends."
)
@click.option(
    "--model", default="tiny", show_default=True, metavar="PATH", help="A model's folder, or the bundled `tiny`."
)
@click.option("--no-redis", is_flag=True, help="Count limits in the gateway's own memory.")
def up(port: int, admin_port: int, backends: int, model: str, no_redis: bool) -> None:
    """Start everything on this machine: etcd, Redis, backends, gateway.

    The backends run a real model. The state is in .weir/, where policy.yaml and weir.yaml are yours to edit. Ctrl-C
    stops all of it.
    """
    from rich.console import Console

    from gateway.stack import Options
    from gateway.up import up as run_up

    options = Options(port, admin_port, backends, model, redis=not no_redis)
    asyncio.run(run_up(options, Console(), time.time))


@weir.command(epilog="Example: weir serve --config weir.yaml")
@click.option("--config", required=True, type=existing_file, metavar="FILE", help="A weir.yaml.")
@click.option("--worker", type=int, hidden=True, help="Which worker process this is.")
@click.option("--last-good", type=int, hidden=True, help="The descriptor of what workers keep of their policy.")
def serve(config: Path, worker: int | None, last_good: int | None) -> None:
    """Run the gateway alone, until SIGTERM or Ctrl-C, which drain it."""
    from gateway.config import load
    from policies.problems import InvalidDocument

    try:
        loaded = load(config, os.environ)
    except OSError as error:
        raise CannotRun(f"cannot read {config}: {error.strerror}") from error
    except InvalidDocument as invalid:
        raise WrongUse("\nweir: ".join(invalid.lines(str(config)))) from invalid
    if worker is None and loaded.workers > 1:
        from gateway.workers import run_workers
        from observability.line_writer import LineWriter

        # Workers are looked after also while nobody takes what is said of them.
        with closing(LineWriter(2)) as errors:
            asyncio.run(run_workers(config, loaded, lambda sentence: errors.write(f"weir: {sentence}".encode())))
        return
    import uvloop

    from gateway import process
    from gateway.last_good import LastGood

    kept = LastGood(last_good) if last_good is not None else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(process.serve(loaded, worker=worker, last_good=kept))


@weir.command(
    context_settings=PASS_ON, add_help_option=False, epilog="Example: weir backend --model tiny --service tiny"
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def backend(arguments: tuple[str, ...]) -> None:
    """Run one reference backend, registered in etcd."""
    _become("reference_backend", arguments)


@weir.command(context_settings=PASS_ON, add_help_option=False, epilog="Example: weir bench --only unary,stream")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure this gateway beside the others found on this machine."""
    if importlib.util.find_spec("benchmarks") is None:
        raise CannotRun("the benchmarks are not part of this installation; run it in a clone of the repository")
    _become("benchmarks", arguments)


@weir.command(epilog="Example: weir backends --etcd http://127.0.0.1:2379")
@etcd_option
def backends(etcd: str) -> None:
    """Show what discovery sees, and ask each backend how it is."""
    from rich.console import Console

    from gateway import backends as shown

    seen = asyncio.run(shown.look(_http_url(etcd)))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(shown.table(seen) if seen else "no backend is registered")


@weir.command(
    epilog="Example: weir register --service llama --url http://10.0.0.5:8000 --model llama-3 -- vllm serve ..."
)
@click.option("--service", required=True, metavar="S", help="The service that routes name.")
@click.option("--url", required=True, metavar="U", help="Where gateways reach the backend.")
@click.option("--model", "models", multiple=True, metavar="M", help="A model it serves; may be given again.")
@click.option("--grpc-port", type=click.IntRange(1, 65535), metavar="P", help="Where its host speaks gRPC, if it does.")
@etcd_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def register(
    service: str, url: str, models: tuple[str, ...], grpc_port: int | None, etcd: str, command: tuple[str, ...]
) -> None:
    """Keep a backend registered while COMMAND, or else this command, runs.

    COMMAND stands behind `--`. It gets the signals that this gets, and its exit code is returned.
    """
    from random import Random

    from discovery.endpoint import InvalidRegistration, ModelEntry, Registration
    from gateway import register as registering

    registration = Registration(url=url, models=tuple(ModelEntry(model) for model in models), grpc_port=grpc_port)
    work = registering.register(_http_url(etcd), service, registration, command, rng=Random(), say=_say)  # noqa: S311  jitter
    try:
        sys.exit(asyncio.run(work))
    except InvalidRegistration as invalid:
        raise WrongUse(f"no gateway would take this registration: {invalid}") from invalid


@weir.group(epilog="Example: weir policy check policy.yaml")
def policy() -> None:
    """Check a policy, or describe what one may say."""


@policy.command(epilog="Example: weir policy check policy.yaml")
@click.argument("file", type=existing_file)
def check(file: Path) -> None:
    """Print each mistake as FILE:LINE:COLUMN field.path: what is wrong. Exit code 1 if there is one.

    Keys in files are no part of the policy: that some are not there (yet) is said on stderr, and no mistake.
    """
    from gateway import regular_file
    from policies import document, identity
    from policies.problems import InvalidDocument

    try:
        checked = document.parse(_read(file), base=file.absolute().parent)
    except InvalidDocument as invalid:
        print("\n".join(invalid.lines(str(file))))
        sys.exit(1)
    for issuer in checked.issuers:
        if not issuer.jwks.startswith("/"):
            continue  # a URL: what it answers, the gateway asks
        try:
            document_of_keys = regular_file.read(Path(issuer.jwks), identity.MAX_DOCUMENT_BYTES + 1)
            identity.parse_jwks(document_of_keys, issuer.algorithms)
        except (OSError, identity.InvalidKeys) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            _say(f"{issuer.jwks}: {reason}; until then nobody gets in with a token of {issuer.issuer}")
    print(f"{file}: ok")


@policy.command(epilog="Example: weir policy schema > policy.schema.json")
def schema() -> None:
    """Print the JSON Schema of policy.yaml, for editors."""
    import json

    from policies import document

    print(json.dumps(document.json_schema(), indent=2))


@weir.command(epilog="Example: weir token --sub ada --group team --key .weir/signing-key.pem")
@click.option("--sub", required=True, metavar="S", help="Whom it names.")
@click.option("--group", "groups", multiple=True, metavar="G", help="A group of theirs; may be given again.")
@click.option("--ttl", default="1h", show_default=True, metavar="TIME", help="How long it holds.")
@click.option("--key", required=True, type=existing_file, metavar="FILE", help="The private key (PEM).")
@click.option("--issuer", metavar="URL", help="Who signs it. Default: as in the policy of `weir up`.")
@click.option("--audience", metavar="NAME", help="Whom it is for. Default: as in the policy of `weir up`.")
def token(sub: str, groups: tuple[str, ...], ttl: str, key: Path, issuer: str | None, audience: str | None) -> None:
    """Mint a token for tests, and print it."""
    from gateway import home
    from policies import identity, units

    try:
        seconds = units.parse_duration(ttl)
    except ValueError as error:
        raise WrongUse(f"--ttl: {error}") from error
    names = {"issuer": issuer or home.ISSUER, "audience": audience or home.AUDIENCE}
    try:
        print(identity.mint(_read(key), sub=sub, groups=groups, ttl=seconds, wall=time.time(), **names))
    except identity.InvalidKeys as error:
        raise WrongUse(f"--key {key}: {error}") from error


def _http_url(text: str) -> str:
    from gateway.config_fields import parse_http_url

    try:
        return parse_http_url(text)
    except ValueError as error:
        raise WrongUse(f"--etcd: {error}") from error


def _say(sentence: str) -> None:
    print(f"weir: {sentence}", file=sys.stderr, flush=True)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CannotRun(f"cannot read {file}: {error.strerror}") from error


def _become(module: str, arguments: Sequence[str]) -> None:
    """Turns this process into `python -m module`: same process id, so signals and exit codes are its own."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main()
