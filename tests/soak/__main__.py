"""`make soak`: the gateway under load while everything around it breaks, by a plan drawn from a seed.

    python -m tests.soak [--seconds 1800] [--seed N] [--keep FOLDER]

Half of the time, five minutes at most, is for warming up: every part has met its faults when what is held at rest is
read for the first time. Then the faults go on, and at the end what is held at rest is read again. Fails (1) when a
request was lost that could have been saved, when a request has not one access line, and when memory, descriptors or
tasks have grown. The same seed gives the same faults at the same times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

from tests.soak.judgement import Ending, Line, Outcome, Window, log_faults, losses, recoveries
from tests.soak.load import Load
from tests.soak.schedule import LANES, Fault, Phase, plan
from tests.soak.vitals import MIB, Vitals, growths, is_grown, rss_bytes
from tests.soak.world import World

WARM_UP_SHARE, WARM_UP_AT_MOST = 0.5, 300.0
REST_SECONDS = 5.0  # connections to backends are kept for three
REST_AT_MOST = 45.0
SHOWN, SHOWN_OF_A_KIND = 40, 3
NEAR_SECONDS = 5.0
MEMORY_SECONDS = 30.0


async def soak(seconds: float, seed: int, folder: Path) -> list[str]:
    """The whole run; what is wrong, in words."""
    warm_up = min(WARM_UP_AT_MOST, WARM_UP_SHARE * seconds)
    phases = plan(LANES, Random(seed), warm_up, seconds - warm_up)
    windows: list[Window] = []
    async with World(folder, Random(f"{seed}/world")) as world:
        load = Load(dict(world.gateways), world.token, str(seed))
        rests = [await _rest(world, None)]
        for name, phase in zip(("warming up", "soaking"), phases, strict=True):
            _say(f"{name}: {sum(map(len, phase.values()))} faults")
            async with load:
                await _let_break(world, phase, windows)
            rests.append(await _rest(world, rests[-1] if len(rests) > 1 else None))
        bugs = [f"a backend failed: {bug!r}" for backend in world.backends.values() for bug in backend.bugs]
    _tell(load.outcomes, windows, rests)
    return [
        *bugs,
        *growths(rests[1], rests[2]),
        *_complaints(folder),
        *log_faults(load.outcomes, _lines(folder), windows),
        *_told(losses(load.outcomes, windows), windows),
    ]


async def _let_break(world: World, phase: Phase, windows: list[Window]) -> None:
    start = time.perf_counter()
    watching = asyncio.create_task(_tell_memory(world))
    async with asyncio.TaskGroup() as lanes:
        for faults in phase.values():
            lanes.create_task(_let_break_in_turn(world, faults, start, windows))
    watching.cancel()


async def _tell_memory(world: World) -> None:
    """Of the worker that is there from the start to the end."""
    pid = world.gateways["a"].pid_of(0)
    while True:
        _say(f"          a0 holds {rss_bytes(pid) / MIB:.1f} MiB")
        await asyncio.sleep(MEMORY_SECONDS)


async def _let_break_in_turn(world: World, faults: Iterable[Fault], start: float, windows: list[Window]) -> None:
    for fault in faults:
        early = start + fault.at - time.perf_counter()
        if early < 0:  # the one before took its time to be undone: not one upon the other
            continue
        await asyncio.sleep(early)
        begun = time.perf_counter()
        async with world.broken(fault):
            await asyncio.sleep(fault.lasts)
        ended = time.perf_counter()
        windows.append(Window(fault.kind, fault.target, begun, ended))
        _say(f"{begun - start:7.1f} s  {fault.kind.value} {fault.target}, {ended - begun:.1f} s")


async def _rest(world: World, before: Mapping[str, Vitals] | None) -> Mapping[str, Vitals]:
    """What is held when nothing has been asked for a while: read again, up to REST_AT_MOST, while it is too much."""
    began = quiet_since = time.perf_counter()
    while True:
        vitals, now = await world.vitals(), time.perf_counter()
        if any(each.inflight for each in vitals.values()):
            quiet_since = now
        grown = before is not None and any(is_grown(before[name], each) for name, each in vitals.items())
        if now > began + REST_AT_MOST or (now > quiet_since + REST_SECONDS and not grown):
            return vitals
        await asyncio.sleep(0.5)


def _lines(folder: Path) -> Iterator[Line]:
    """The access lines of both gateways."""
    for name in ("a", "b"):
        with (folder / name / "access.log").open() as file:
            for line in file:
                told = _parsed(line)
                if told is not None and "status" in told:
                    yield Line(str(told["request_id"]), int(told["status"]))


def _parsed(line: str) -> dict[str, object] | None:
    """A worker that is killed may leave half a line behind."""
    try:
        told: dict[str, object] = json.loads(line)
    except ValueError:
        return None
    return told


def _complaints(folder: Path) -> Iterator[str]:
    """Bugs that a gateway has told of."""
    for name in ("a", "b"):
        for file in ("stderr.log", "access.log"):
            text = (folder / name / file).read_text()
            for mark in ("Traceback", "request failed", "never retrieved", "was never awaited"):
                if mark in text:
                    yield f"{text.count(mark)} times {mark!r} in {folder / name / file}"


def _told(lost: Iterable[tuple[Outcome, str]], windows: Iterable[Window]) -> Iterator[str]:
    """Each loss, the first of each kind with what was broken then."""
    shown: Counter[str] = Counter()
    for outcome, why in lost:
        shown[why] += 1
        at = outcome.sent_at
        meanwhile = ", ".join(
            f"{window.kind.value} {window.target} {window.begun - at:+.1f}..{window.ended - at:+.1f} s"
            for window in sorted(windows, key=lambda window: window.begun)
            if window.begun - NEAR_SECONDS <= outcome.ended_at and at <= window.ended + NEAR_SECONDS
        )
        more = f"; meanwhile: {meanwhile}" if shown[why] <= SHOWN_OF_A_KIND else ""
        took = outcome.ended_at - at
        yield (
            f"lost: {why}: {outcome.request_id} of {outcome.consumer} to {outcome.service} by {outcome.gateway} "
            f"{outcome.backend}, {took:.2f} s{more}"
        )


def _tell(outcomes: list[Outcome], windows: list[Window], rests: list[Mapping[str, Vitals]]) -> None:
    endings = Counter(outcome.ending for outcome in outcomes)
    print(f"\n{len(outcomes)} requests: {', '.join(f'{count} {ending.value}' for ending, count in endings.items())}")
    refusals = Counter(f"{each.status} {each.code}" for each in outcomes if each.ending is Ending.REFUSED)
    print(f"refusals: {', '.join(f'{count} {told}' for told, count in refusals.most_common())}")
    kinds = Counter(window.kind.value for window in windows)
    print(f"{len(windows)} faults: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}")
    slowest = recoveries(outcomes, windows)
    print(f"slowest return: {', '.join(f'{kind.value} {seconds:.1f} s' for kind, seconds in slowest.items())}")
    for when, rest in zip(("at the start", "warm", "at the end"), rests, strict=True):
        for name, vitals in rest.items():
            print(f"{when}: {name} {vitals}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def _until_signalled(seconds: float, seed: int, folder: Path) -> list[str]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await soak(seconds, seed, folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument(
        "--keep", type=Path, help="a folder for logs that stays; default: a temporary one, kept on failure"
    )
    options = parser.parse_args()
    again = f"make soak SECONDS={options.seconds:g} SEED={options.seed}"
    folder = options.keep or Path(tempfile.mkdtemp(prefix="weir-soak-"))
    folder.mkdir(exist_ok=True)
    print(f"seed {options.seed}, logs in {folder}; the same once more: {again}", flush=True)
    wrong = asyncio.run(_until_signalled(options.seconds, options.seed, folder))
    for each in wrong[:SHOWN]:
        print(each)
    if wrong:
        print(f"FAILED: {len(wrong)} things are wrong; see {folder}; once more: {again}")
        return 1
    print("nothing was lost, and nothing has grown")
    if options.keep is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
