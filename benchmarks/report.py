"""One table for people and one JSON document for programs, from the same outcomes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.bench import OTHERS, RSS, WORKLOADS, Outcome
from benchmarks.figures import Figure, Spread
from benchmarks.gateways.gateway import Gateway
from benchmarks.workloads import Workload

BASE = "direct"
OURS = "weir"
FORMAT = 1


def document(outcomes: Sequence[Outcome], gateways: Sequence[Gateway], absent: Mapping[str, str], **run: Any) -> Any:
    """The JSON form: each figure with median, low, high, all values and unit; `weir_over` are ratios of medians."""
    return {
        "format": FORMAT,
        "run": run,
        "machine": machine(),
        "gateways": {each.name: each.features for each in gateways},
        "absent": dict(absent),
        "workloads": {outcome.workload.id: _workload(outcome) for outcome in outcomes},
    }


def _workload(outcome: Outcome) -> dict[str, Any]:
    figures = {figure.name: figure for figure in (*outcome.workload.figures, RSS, OTHERS)}
    return {
        "work": outcome.workload.title,
        "missing": dict(outcome.missing),
        "gateways": {
            name: {
                figure: {**asdict(spread), "unit": figures[figure].unit if figure in figures else "MiB"}
                for figure, spread in found.items()
            }
            for name, found in outcome.spreads.items()
        },
        "weir_over": ratios(outcome.spreads, "cpu_us"),
    }


def ratios(found: Mapping[str, Mapping[str, Spread]], figure: str) -> dict[str, float]:
    """Our median over that of each other gateway: below 1, ours is less."""
    ours = found.get(OURS, {}).get(figure)
    if ours is None:
        return {}
    others = {
        name: spread[figure].median for name, spread in found.items() if name not in (OURS, BASE) and figure in spread
    }
    return {name: round(ours.median / median, 3) for name, median in others.items() if median}


def table(outcome: Outcome) -> Table:
    """Median of each figure, and its lowest and highest round where there is more than one."""
    header, *rows = grid(outcome.workload, outcome.spreads)
    shown = Table(title=f"{outcome.workload.id}: {outcome.workload.title}", title_justify="left")
    for number, title in enumerate(header):
        shown.add_column(title, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    for name, reason in outcome.missing.items():
        if name not in outcome.rounds:
            shown.add_row(name, reason[:60])
    return shown


def markdown(told: Any) -> str:
    """The tables of a JSON document, for a page."""
    return "\n".join(line for name, found in told["workloads"].items() for line in _page_table(WORKLOADS[name], found))


def _page_table(workload: Workload, found: Any) -> Iterator[str]:
    spreads = {
        name: {
            figure: Spread(told["median"], told["low"], told["high"], tuple(told["values"]))
            for figure, told in figures.items()
        }
        for name, figures in found["gateways"].items()
    }
    header, *rows = grid(workload, spreads)
    yield f"### {workload.id}: {workload.title}\n"
    yield page_row(header)
    yield page_row(["---", *(["---:"] * (len(header) - 1))])
    yield from map(page_row, rows)
    yield ""


def page_row(cells: Iterable[str]) -> str:
    """In Markdown."""
    return f"| {' | '.join(cells)} |"


def grid(workload: Workload, spreads: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """The header, and a row for each gateway that was measured."""
    figures = (*workload.figures, RSS, OTHERS)
    header = ["gateway"]
    for figure in figures:
        header.append(figure.heading)
        header += ["added"] * figure.added
    return [header, *([name, *_cells(figures, found, spreads.get(BASE, {}))] for name, found in spreads.items())]


def _cells(figures: Iterable[Figure], found: Mapping[str, Spread], base: Mapping[str, Spread]) -> list[str]:
    cells = []
    for figure in figures:
        spread = found.get(figure.name)
        cells.append(cell(spread, figure.digits))
        if figure.added:
            floor = base.get(figure.name)
            cells.append(f"{spread.median - floor.median:.{figure.digits}f}" if spread and floor else "")
    return cells


def cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return ""
    median = f"{spread.median:,.{digits}f}"
    if spread.low == spread.high:
        return median
    return f"{median} ({spread.low:,.{digits}f}-{spread.high:,.{digits}f})"


def machine() -> dict[str, str]:
    """What a reader needs to judge the figures."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": found.group(1) if found else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return git.stdout.strip()
