"""`weir register`: keeps a backend that anyone wrote to be found, as long as it runs.

With a command, the command is the backend: it gets the signals that we get, its end is our end, its exit code is ours.
SIGTERM and SIGINT reach it only when etcd has been told that it is draining (2 s at most), so that no gateway sends
requests to a backend that has stopped listening. A key stands for the place of a backend: registered twice, it is one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from random import Random

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import Registration, id_of_place
from discovery.etcd import EtcdClient, EtcdSettings
from gateway.children import CannotRun, die_with

ENDING = (signal.SIGTERM, signal.SIGINT)
OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 3.0  # seconds until we say that etcd does not answer

Signals = asyncio.Queue[signal.Signals]


async def register(
    etcd: str,
    service: str,
    registration: Registration,
    command: Sequence[str],
    *,
    rng: Random,
    say: Callable[[str], None],
) -> int:
    """Announces it until the command ends or a signal comes; returns the exit code.

    Raises CannotRun when the command cannot be started, InvalidRegistration for what no gateway would take. An etcd
    that is away is waited for as long as it takes.
    """
    key = f"{service}/{id_of_place(registration.url)}"
    signals = _caught_signals()
    async with EtcdClient(EtcdSettings(endpoints=(etcd,))) as client:
        announcement = backend_announcement(client, key, registration, rng=rng)
        process = await _start(command) if command else None
        async with announcement:
            teller = asyncio.create_task(_tell(announcement, etcd, key, say))
            try:
                return await (_follow(process, announcement, signals) if process else _wait_for_end(signals))
            finally:
                teller.cancel()


async def _start(command: Sequence[str]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches it through us, once
            preexec_fn=die_with(os.getpid(), signal.SIGTERM),
        )
    except OSError as error:
        raise CannotRun(f"cannot start {command[0]}: {error.strerror}") from error


async def _follow(process: asyncio.subprocess.Process, announcement: Announcement, signals: Signals) -> int:
    """Until the process ends; returns its exit code."""
    passing = asyncio.create_task(_pass_on(signals, process, announcement))
    try:
        code = await process.wait()
    finally:
        passing.cancel()
    return code if code >= 0 else 128 - code  # as shells tell the end by a signal


async def _pass_on(signals: Signals, process: asyncio.subprocess.Process, announcement: Announcement) -> None:
    while True:
        number = await signals.get()
        if number in ENDING:
            await announcement.drain()
        if process.returncode is None:
            process.send_signal(number)


async def _wait_for_end(signals: Signals) -> int:
    while await signals.get() not in ENDING:
        pass
    return 0


async def _tell(announcement: Announcement, etcd: str, key: str, say: Callable[[str], None]) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            await announcement.wait_held()
    except TimeoutError:
        say(f"etcd at {etcd} does not answer; {key} is registered as soon as it does")
        await announcement.wait_held()
    say(f"{key} is registered")


def _caught_signals() -> Signals:
    signals: Signals = asyncio.Queue()
    for number in (*ENDING, *OTHERS):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    return signals
