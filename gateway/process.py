"""The process that a gateway runs in: its signals, its files, its threads."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import sys

import structlog

from gateway.app import Gateway
from gateway.config import Config
from gateway.last_good import LastGood
from gateway.supply import check_supply


async def serve(settings: Config, *, worker: int | None = None, last_good: LastGood | None = None) -> None:
    """Run a gateway until SIGTERM or SIGINT, which drain it; a second one ends it at once. Raises CannotRun."""
    check_supply()
    raise_file_limit()
    # Threads write logs and export spans: none may hold the loop for Python's usual 5 ms, at each callback anew.
    sys.setswitchinterval(0.00005)
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # during the start: the policy is read anew anyway
    gateway = Gateway(settings, worker, last_good)
    try:
        async with gateway.running():
            loop.add_signal_handler(signal.SIGHUP, gateway.reload)
            structlog.get_logger().info(
                "serving",
                data=str(gateway.data_address),
                admin=str(gateway.admin_address),
                **({"grpc": str(gateway.grpc_address)} if gateway.grpc is not None else {}),
                version=gateway.version,
            )
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


def raise_file_limit() -> None:
    """As many open files as the system lets us have: each request in flight is two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
