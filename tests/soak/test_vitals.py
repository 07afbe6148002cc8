import os
from dataclasses import replace

import pytest

from tests.soak.vitals import FDS_MAY_GROW, MIB, TASKS_MAY_GROW, Vitals, growths, is_grown, parse_rss, read_vitals
from tests.support.admin_client import Scrape

REST = Vitals(pid=1, rss_bytes=100 * MIB, fds=40, tasks=20, inflight=0, lines_dropped=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"rss_bytes": 105 * MIB, "fds": 40 + FDS_MAY_GROW, "tasks": 20 + TASKS_MAY_GROW}, []),
        ({"rss_bytes": 106 * MIB}, ["a0 has grown by 6.0%: 100.0 MiB, 40 descriptors, 20 tasks, then 106.0 MiB, 40 descriptors, 20 tasks"]),
        ({"pid": 2, "rss_bytes": 200 * MIB}, []),
        ({"fds": 49}, ["a0 has grown: 100.0 MiB, 40 descriptors, 20 tasks, then 100.0 MiB, 49 descriptors, 20 tasks, 0 in flight"]),
        ({"lines_dropped": 3}, ["a0 has dropped 3 lines of its log"]),
    ],
)  # fmt: skip
def test_growth_is_told(changes, told) -> None:
    assert growths({"a0": REST}, {"a0": replace(REST, **changes)}) == told


@pytest.mark.parametrize(
    ("changes", "grown"), [({}, False), ({"tasks": 23}, True), ({"fds": 49}, True), ({"inflight": 1}, True)]
)
def test_what_may_still_be_on_its_way_out(changes, grown) -> None:
    assert is_grown(REST, replace(REST, **changes)) is grown


def test_resident_memory_is_read_from_its_line() -> None:
    assert parse_rss("Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t  123 kB\n") == 123 * 1024


def test_this_process_can_be_read() -> None:
    found = read_vitals(os.getpid(), Scrape("weir_tasks 7\nweir_inflight 2\nweir_log_dropped_total 1\n"))
    assert (found.tasks, found.inflight, found.lines_dropped) == (7, 2, 1)
    assert found.rss_bytes > 10 * MIB
    assert found.fds > 2
