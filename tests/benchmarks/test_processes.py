import contextlib
import os
import sys
import time

import pytest

from benchmarks.processes import Failed, Process, free_ports, parse_busy, parse_stat, wait_port

STAT = "{pid} ({name}) S 1 77 77 0 -1 4194560 100 200 0 0 250 50 999 999 20 0 1 0 1000 123456 4321 18446744073709551615"


@pytest.mark.parametrize("name", ["nginx", "a b", "a) S 9 9 9", "((", ""])
def test_a_stat_is_read_whatever_the_name_of_its_process(name):
    stat = parse_stat(STAT.format(pid=1, name=name))
    assert (stat.session, stat.ticks, stat.pages) == (77, 300, 4321)


def test_our_own_stat_tells_our_own_session():
    with open("/proc/self/stat") as file:
        assert parse_stat(file.read()).session == os.getsid(0)


def test_a_process_runs_where_it_was_put_and_counts_what_it_forks(tmp_path):
    core = min(os.sched_getaffinity(0))
    script = "import os, time; os.fork(); print(os.sched_getaffinity(0), flush=True); time.sleep(60)"
    process = Process("forks", [sys.executable, "-c", script], cores={core}, log=tmp_path / "log")
    try:
        wait_until(lambda: (tmp_path / "log").read_text().count("\n") == 2)
        assert (tmp_path / "log").read_text() == f"{{{core}}}\n" * 2
        usage = process.usage()
        assert usage.cpu_seconds > 0
        assert usage.rss_bytes > 1 << 20
        assert sessions().count(process.pid) == 2
    finally:
        process.end()
    wait_until(lambda: not sessions().count(process.pid))


def test_who_is_paused_stands_still_with_what_it_forked_and_goes_on(tmp_path):
    script = "import os\nos.fork()\nprint('up', flush=True)\nwhile True: pass"
    process = Process("busy", [sys.executable, "-c", script], cores=os.sched_getaffinity(0), log=tmp_path / "log")
    try:
        wait_until(lambda: (tmp_path / "log").read_text().count("up") == 2)
        with process.paused():
            wait_until(lambda: states(process.pid) == ["T", "T"])
            used = process.usage().cpu_seconds
            assert process.usage().cpu_seconds == used
        wait_until(lambda: process.usage().cpu_seconds > used)
        assert "T" not in states(process.pid)
    finally:
        process.end()


def test_one_that_has_ended_is_told_with_its_last_words(tmp_path):
    script = "import sys; print('no such file: x.yaml'); print(); sys.exit(3)"
    process = Process("peer", [sys.executable, "-c", script], cores=os.sched_getaffinity(0), log=tmp_path / "log")
    wait_until(process.has_ended)
    with pytest.raises(Failed, match=r"peer ended with code 3 \(no such file: x.yaml\)"):
        process.usage()
    process.end()


PROC_STAT = """cpu  300 20 100 900 9 0 5 7 1 1
cpu0 200 10 60 500 4 0 3 4 1 1
cpu1 100 10 40 400 5 0 2 3 0 0
intr 1 2 3
"""


@pytest.mark.parametrize(("core", "ticks"), [(0, 277), (1, 155)])
def test_a_core_is_busy_with_all_but_idling_and_waiting(core, ticks):
    assert parse_busy(PROC_STAT, core) == ticks


def test_a_core_that_is_not_there_is_told():
    with pytest.raises(Failed, match="core 7"):
        parse_busy(PROC_STAT, 7)


def test_free_ports_are_different_and_nobody_listens_on_them():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    with pytest.raises(Failed, match=f"nothing listens on port {ports[0]}"):
        wait_port(ports[0], seconds=0.1)


def states(session) -> list[str]:
    """The states of all processes of a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            text = file.read()
            if parse_stat(text).session == session:
                found.append(text.rpartition(")")[2].split()[0])
    return found


def sessions():
    """The session of each process that runs; of the dead that nobody has asked about there may be more."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            text = file.read()
            if ") Z " not in text:
                found.append(parse_stat(text).session)
    return found


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
