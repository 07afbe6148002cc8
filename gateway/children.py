"""Programs that this one starts, keeps running, and takes with it when it ends.

A child goes Starting => Running (it is ready) or the start fails; Running => Waiting, because it ended;
Waiting => Running after a pause that doubles from half a second to thirty; and from anywhere => Stopped, because we
were told to stop.

Each child leads a process group of its own: Ctrl-C in a terminal reaches only us, and we stop the children in our
order. On Linux the kernel kills a child whose parent is gone (PR_SET_PDEATHSIG), so that not even SIGKILL of this
process leaves anything behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

READY_WITHIN = 60.0  # torch alone may need ten seconds to import on a small machine
READY_POLL = 0.05
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LIVED_WELL = 10.0  # seconds after which an end is news and not the next of a row
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# Where gRPC runs in this process, too, its handlers of fork() abort some children before they are their programs.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class CannotRun(Exception):  # noqa: N818  the message is one line for the user: what is wrong; what to do
    """Something that is needed is not there: a port, a program, a file."""


class ChildFailed(CannotRun):
    """A child did not become ready. `exit_code` is None when it still ran."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. `env` is added to our own environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()  # of open files that it gets under the same numbers
    log: Path | None = None  # where its output goes; None: where ours goes
    is_ready: Callable[[], Awaitable[bool]] | None = None  # None: as soon as it runs
    grace: float | None = None  # seconds between SIGTERM and SIGKILL; None: as long as it takes


class Child:
    """One program kept running. `say` is told in a sentence what happened to it."""

    def __init__(self, program: Program, say: Callable[[str], None]) -> None:
        self.program = program
        self._say = say
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process and self._is_running() else "not running"
        return f"<Child {self.program.name} {state}>"

    async def start(self) -> None:
        """Starts it and waits until it is ready; raises ChildFailed when it is not within READY_WITHIN."""
        process = await self._spawn()
        if self.program.is_ready is None:
            return
        try:
            async with asyncio.timeout(READY_WITHIN):
                while not await self.program.is_ready():
                    if process.returncode is not None:
                        raise ChildFailed(self._how_it_ended(process.returncode), process.returncode)
                    await asyncio.sleep(READY_POLL)
        except TimeoutError:
            raise ChildFailed(
                f"{self.program.name} was not ready within {READY_WITHIN:.0f} s{self._see_log()}"
            ) from None
        self._say(f"{self.program.name} is ready")

    async def keep(self) -> None:
        """Starts it again whenever it ends, until cancelled. Call after `start`."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            born = loop.time()
            await self._wait_ended()
            if loop.time() - born > LIVED_WELL:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                await self._spawn()
            except ChildFailed as failure:
                self._say(str(failure))

    async def stop(self) -> None:
        """Asks it to end (SIGTERM), waits for its grace, and ends what is left of its process group."""
        if self._process is None:
            return
        self.send(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.program.grace):
                await self._process.wait()
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """Ends it and its process group at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Passes a signal on to the program, not to its group; nothing when it does not run."""
        if self._process is not None and self._is_running():
            self._process.send_signal(number)

    def _is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _spawn(self) -> asyncio.subprocess.Process:
        program, self._process = self.program, None
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(program.log.open("ab")) if program.log else None
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *program.argv,
                    env={**os.environ, **program.env},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=program.descriptors,
                    process_group=0,
                    preexec_fn=die_with(os.getpid()),
                )
            except OSError as error:
                raise ChildFailed(f"cannot start {program.argv[0]}: {error.strerror}") from error
        return self._process

    async def _wait_ended(self) -> None:
        if self._process is None:  # it could not even be started, which was said then
            return
        code = await self._process.wait()
        self.kill()  # whatever it has started itself
        self._say(f"{self._how_it_ended(code)}; starting it again")

    def _how_it_ended(self, code: int) -> str:
        if code < 0:
            return f"{self.program.name} was ended by {signal.Signals(-code).name}"
        return f"{self.program.name} ended with exit code {code}{self._see_log()}"

    def _see_log(self) -> str:
        """Where its log is, and the last line of it, which as a rule tells why."""
        if self.program.log is None:
            return ""
        lines = self.program.log.read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:200]}; see {self.program.log})" if last else f" (see {self.program.log})"


class Supervisor:
    """Children in stages: started stage by stage, kept running, stopped in reverse."""

    def __init__(self, stages: Sequence[Sequence[Program]], say: Callable[[str], None]) -> None:
        self._stages = [[Child(program, say) for program in stage] for stage in stages]

    async def run(self, when_ready: Callable[[], Awaitable[None]]) -> None:
        """Runs until cancelled. Raises ChildFailed when the start fails. Leaves nothing running either way."""
        try:
            for stage in self._stages:
                await _together([child.start() for child in stage])
            await when_ready()
            await _together([child.keep() for stage in self._stages for child in stage])
        finally:
            for stage in reversed(self._stages):
                await asyncio.gather(*(child.stop() for child in stage))

    def send(self, number: signal.Signals) -> None:
        """Passes a signal on to every child."""
        for stage in self._stages:
            for child in stage:
                child.send(number)

    def kill(self) -> None:
        """Ends every child at once; `run` then returns as soon as it is cancelled."""
        for stage in self._stages:
            for child in stage:
                child.kill()


async def run_until_signalled(
    supervisor: Supervisor, when_ready: Callable[[], Awaitable[None]], *, pass_on: Sequence[signal.Signals] = ()
) -> None:
    """Runs it until SIGINT, SIGTERM or SIGHUP; a second one kills the children at once.

    Signals in `pass_on` go to the children and end nothing. Returns when nothing is left running; raises what the
    start raised.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(supervisor.run(when_ready))

    def stop() -> None:
        if task.cancelling():
            supervisor.kill()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    for number in pass_on:
        loop.add_signal_handler(number, supervisor.send, number)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _together(works: Sequence[Coroutine[None, None, None]]) -> None:
    """Runs all of them; when one fails the others are cancelled and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """What a forked child runs before its program, so that this signal ends it when `parent` is gone."""
    if _libc is None:
        return None
    prctl = _libc.prctl

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it was gone before we asked
            os._exit(1)

    return ask_kernel
