"""`weir bench`: measures Weir beside the other gateways that are installed here.

weir bench --only unary,stream --peers weir,envoy_full --rounds 3 --seconds 5
weir bench profile        # what each part of a unary request costs in our own code
weir bench backend        # tokens per second of the reference backend
weir bench backend --beside chat,mlp    # and beside the other model servers that are installed here
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from benchmarks import beside as besides
from benchmarks import model_peers, model_server, report
from benchmarks.bench import WORKLOADS, Outcome, run
from benchmarks.figures import Round, told
from benchmarks.gateways import ALL, BY_NAME
from benchmarks.gateways.gateway import Gateway
from benchmarks.processes import Failed
from benchmarks.rig import Rig

RESULTS = Path(__file__).parent / "results"
OPEN_FILES = 20_000  # 2,000 streams are 4,000 sockets of a gateway


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers from 1 on, with commas between."""

    name = "numbers"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = value.split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            self.fail(f"{value!r} is not a list of numbers like 1,8,32", param, ctx)
        return tuple(map(int, words))


class Names(click.ParamType[list[str]]):
    """Names of a list, with commas between; all of it when not given."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        names = [name.strip() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in self._known]
        if unknown:
            self.fail(f"there is no {', '.join(unknown)}; there are {', '.join(self._known)}", param, ctx)
        return names


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: weir bench --only unary,stream --peers weir,envoy_full --rounds 3 --seconds 5",
)
@click.option("--only", type=Names(tuple(WORKLOADS)), default=",".join(WORKLOADS), metavar="LIST", help="Workloads.")
@click.option("--peers", type=Names(tuple(BY_NAME)), default=",".join(BY_NAME), metavar="LIST", help="Gateways.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Of each gateway, in turn.")
@click.option("--seconds", type=click.IntRange(1, 600), default=5, show_default=True, help="Of each round.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Default: a new file in benchmarks/results/.")
@click.pass_context
def bench(
    context: click.Context, only: list[str], peers: list[str], rounds: int, seconds: int, file: Path | None
) -> None:
    """Measure this gateway beside the others found on this machine.

    A gateway that is not installed is named as absent; `make bench-peers` installs them. Two CPU cores are needed,
    and nothing else to do for them.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 180)
    absent = {name: reason for name in peers if (reason := BY_NAME[name].absent())}
    gateways = [each for each in ALL if each.name in peers and each.name not in absent]
    for name, reason in absent.items():
        console.print(f"absent: {name}, {reason}")
    started = time.time()
    place = file or RESULTS / time.strftime("%Y%m%d-%H%M%S.json", time.localtime(started))
    place.parent.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for outcome in measure(gateways, only, rounds, seconds, console):
        outcomes.append(outcome)  # written after each: an interrupted run keeps what it has
        result = report.document(outcomes, gateways, absent, started=round(started), rounds=rounds, seconds=seconds)
        place.write_text(json.dumps(result, indent=1))
    for outcome in outcomes:
        console.print(report.table(outcome))
    console.print(f"written to {place}")


@bench.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def profile(arguments: tuple[str, ...]) -> None:
    """What a unary request costs in our own code, without sockets."""
    from benchmarks import replay  # noqa: PLC0415  the whole gateway comes with it

    sys.argv = ["weir bench profile", *arguments]
    replay.main()


@bench.command(epilog="Example: weir bench backend --streams 1,8,32 --rounds 3 --seconds 5")
@click.option("--model", default="tiny", show_default=True, help="`tiny`, or a Hugging Face directory.")
@click.option("--streams", type=Numbers(), default=",".join(map(str, model_server.STREAMS)), help="At once.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Of each, in turn.")
@click.option("--seconds", type=click.IntRange(1, 600), default=5, show_default=True, help="Of each round.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there, too.")
@click.option(
    "--beside",
    type=Names(tuple(model_peers.WORKLOADS)),
    metavar="LIST",
    help=f"Workloads to do beside other servers instead: {', '.join(tuple(model_peers.WORKLOADS))}.",
)
def backend(
    model: str, streams: tuple[int, ...], rounds: int, seconds: int, file: Path | None, beside: list[str] | None
) -> None:
    """Measure the reference backend: tokens per second and time to the first one, by streams at once.

    With --beside: beside other model servers, which `sh benchmarks/install_peers.sh NAME` installs.
    """
    if beside is not None:
        _beside(beside, rounds, seconds, file)
        return
    found: dict[int, list[Round]] = {count: [] for count in streams}
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as folder:
        for count, figures in model_server.measure(model, Path(folder), streams, rounds, seconds):
            found[count].append(figures)
            print(f"{count} streams: {told(model_server.FIGURES, figures)}", flush=True)
    if file is not None:
        file.write_text(json.dumps(model_server.document(model, found), indent=1))
    print(model_server.page(found))


def _beside(names: list[str], rounds: int, seconds: int, file: Path | None) -> None:
    found = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="weir-bench-") as folder:
            found.append(besides.run(model_peers.WORKLOADS[name], Path(folder), rounds, seconds, print))
        if file is not None:  # after each: an interrupted run keeps what it has
            file.write_text(json.dumps(besides.document(found), indent=1))
    print(besides.page(found))


@bench.command(epilog="Example: weir bench markdown benchmarks/results/20261123-170000.json")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def markdown(file: Path) -> None:
    """Print the tables of a result as Markdown."""
    print(report.markdown(json.loads(file.read_text())))


def measure(
    gateways: list[Gateway], only: list[str], rounds: int, seconds: float, console: Console
) -> Iterator[Outcome]:
    """Each workload's outcome as soon as it is there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as folder, Rig(Path(folder)) as rig:
        for name in only:
            yield run(rig, WORKLOADS[name], gateways, rounds, seconds, console.print)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's stays ignored
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C: all that was started is ended on the way out
    try:
        bench.main(prog_name="weir bench", standalone_mode=False)
    except click.ClickException as error:
        print(f"weir: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"weir: {error}", file=sys.stderr)
        sys.exit(3)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


if __name__ == "__main__":
    main()
