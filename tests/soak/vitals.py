"""How a process is: memory, descriptors, tasks, requests in flight. What a leak shows in, sooner or later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.admin_client import Scrape

RSS_MAY_GROW = 0.05
FDS_MAY_GROW = 8
"""Health checks keep a connection to a backend for a while: there may be one to each, and more with the scrape."""
TASKS_MAY_GROW = 2
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Vitals:
    pid: int
    rss_bytes: int
    fds: int
    tasks: int
    inflight: int
    lines_dropped: int  # of the log

    def __str__(self) -> str:
        return f"{self.rss_bytes / MIB:.1f} MiB, {self.fds} descriptors, {self.tasks} tasks"


def read_vitals(pid: int, scrape: Scrape) -> Vitals:
    """From /proc and from the metrics of the same process."""
    return Vitals(
        pid,
        rss_bytes=rss_bytes(pid),
        fds=len(os.listdir(f"/proc/{pid}/fd")),
        tasks=int(scrape.value("weir_tasks")),
        inflight=int(scrape.value("weir_inflight")),
        lines_dropped=int(scrape.value("weir_log_dropped_total")),
    )


def rss_bytes(pid: int) -> int:
    return parse_rss(Path(f"/proc/{pid}/status").read_text())


def parse_rss(status: str) -> int:
    """Resident bytes in the text of /proc/PID/status."""
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_grown(before: Vitals, after: Vitals) -> bool:
    """Whether there are more descriptors or tasks than at rest before: they may still be on their way out."""
    return after.fds > before.fds + FDS_MAY_GROW or after.tasks > before.tasks + TASKS_MAY_GROW or after.inflight > 0


def growths(before: Mapping[str, Vitals], after: Mapping[str, Vitals]) -> list[str]:
    """What has grown between two rests, in words. The memory of another process under the same name is not compared."""
    found = []
    for name, now in after.items():
        then = before[name]
        if is_grown(then, now):
            found.append(f"{name} has grown: {then}, then {now}, {now.inflight} in flight")
        if now.pid == then.pid and now.rss_bytes > then.rss_bytes * (1 + RSS_MAY_GROW):
            share = now.rss_bytes / then.rss_bytes - 1
            found.append(f"{name} has grown by {share:.1%}: {then}, then {now}")
        if now.lines_dropped:
            found.append(f"{name} has dropped {now.lines_dropped} lines of its log")
    return found
