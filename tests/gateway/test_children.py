"""Supervision, shown on small real programs: what starts, what restarts, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gateway import children
from gateway.children import ChildFailed, Program, Supervisor, run_until_signalled

pytestmark = pytest.mark.integration

# Tells its pid and sleeps; ends politely on SIGTERM; writes "hup" on SIGHUP.
SLEEPER = """
import os, signal, sys, time
def note(text):
    with open(sys.argv[1], "a") as file: file.write(text + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (note("term"), sys.exit(0)))
signal.signal(signal.SIGHUP, lambda *_: note("hup"))
note(str(os.getpid()))
while True: time.sleep(60)
"""
STUBBORN = SLEEPER.replace("sys.exit(0)", "None")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(children, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(children, "READY_POLL", 0.005)


def program(tmp_path: Path, name: str, code: str = SLEEPER, grace: float | None = 10.0) -> Program:
    notes = tmp_path / name

    async def has_noted() -> bool:
        return notes.exists() and "\n" in notes.read_text()

    argv = (sys.executable, "-I", "-S", "-c", code, str(notes))
    return Program(name, argv, log=tmp_path / f"{name}.log", is_ready=has_noted, grace=grace)


def pids(tmp_path: Path, name: str) -> list[int]:
    return [int(line) for line in (tmp_path / name).read_text().split() if line.isdigit()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or before it was read
        return False


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def ready_event() -> tuple[asyncio.Event, object]:
    event = asyncio.Event()

    async def when_ready() -> None:
        event.set()

    return event, when_ready


async def test_stages_start_in_order_and_stop_in_reverse(tmp_path):
    order = tmp_path / "order"
    code = SLEEPER.replace('note("term")', f'open({str(order)!r}, "a").write(sys.argv[1][-5:] + " ")')
    supervisor = Supervisor([[program(tmp_path, "first", code)], [program(tmp_path, "later", code)]], print)
    ready, when_ready = ready_event()
    task = asyncio.create_task(supervisor.run(when_ready))
    await ready.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order.read_text() == "later first "
    assert not any(is_alive(pid) for name in ("first", "later") for pid in pids(tmp_path, name))


async def test_a_child_that_dies_is_started_again_and_told_of(tmp_path):
    told: list[str] = []
    ready, when_ready = ready_event()
    task = asyncio.create_task(Supervisor([[program(tmp_path, "child")]], told.append).run(when_ready))
    await ready.wait()
    os.kill(pids(tmp_path, "child")[0], signal.SIGKILL)
    await until(lambda: len(pids(tmp_path, "child")) == 2)
    first, second = pids(tmp_path, "child")
    assert not is_alive(first)
    assert is_alive(second)
    assert told == ["child is ready", "child was ended by SIGKILL; starting it again"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(second)


async def test_a_start_that_fails_half_way_leaves_nothing(tmp_path):
    broken = program(tmp_path, "broken", "import sys; sys.exit('no such model')")
    supervisor = Supervisor([[program(tmp_path, "first")], [program(tmp_path, "beside"), broken]], print)
    _, when_ready = ready_event()
    with pytest.raises(ChildFailed) as failed:
        await supervisor.run(when_ready)
    assert str(failed.value) == f"broken ended with exit code 1 (no such model; see {tmp_path}/broken.log)"
    assert failed.value.exit_code == 1
    started = [pid for name in ("first", "beside") if (tmp_path / name).exists() for pid in pids(tmp_path, name)]
    assert started
    assert not any(is_alive(pid) for pid in started)


async def test_a_child_that_is_never_ready_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "READY_WITHIN", 0.05)

    async def never() -> bool:
        return False

    slow = Program("slow", (sys.executable, "-c", "import time; time.sleep(60)"), is_ready=never, grace=0.0)
    with pytest.raises(ChildFailed, match="slow was not ready within 0 s"):
        await Supervisor([[slow]], print).run(never)


async def test_a_program_that_is_not_there_is_named(tmp_path):
    missing = Program("etcd", (str(tmp_path / "etcd"),))
    with pytest.raises(ChildFailed, match=r"cannot start .*/etcd: No such file or directory"):
        await Supervisor([[missing]], print).run(asyncio.Event().wait)


async def test_what_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    ready, when_ready = ready_event()
    task = asyncio.create_task(Supervisor([[program(tmp_path, "child", STUBBORN, grace=0.05)]], print).run(when_ready))
    await ready.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(pids(tmp_path, "child")[0])


async def test_the_second_signal_ends_it_now(tmp_path):
    supervisor = Supervisor([[program(tmp_path, "child", STUBBORN, grace=None)]], print)
    ready, when_ready = ready_event()
    task = asyncio.create_task(run_until_signalled(supervisor, when_ready, pass_on=[signal.SIGHUP]))
    await ready.wait()
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: "hup" in (tmp_path / "child").read_text())
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: "term" in (tmp_path / "child").read_text())
    assert not task.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await task
    assert not is_alive(pids(tmp_path, "child")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_children_do_not_outlive_a_killed_parent(tmp_path):
    notes = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import asyncio, sys
        from gateway.children import Program, Supervisor
        program = Program("child", (sys.executable, "-I", "-S", "-c", {SLEEPER!r}, {str(notes)!r}))
        asyncio.run(Supervisor([[program]], print).run(asyncio.Event().wait))
    """)])  # fmt: skip
    try:
        await until(lambda: notes.exists() and notes.read_text().strip())
    finally:
        parent.kill()
        parent.wait()
    await until(lambda: not is_alive(pids(tmp_path, "child")[0]))
