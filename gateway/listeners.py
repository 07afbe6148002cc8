"""The ports of a gateway: taken at its start, told in a line when they cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
from collections.abc import Callable
from typing import cast

import structlog
from aiohttp import web

from gateway import admin
from gateway.certificates import Certificates
from gateway.children import CannotRun
from gateway.config import Config
from gateway.config_fields import Address
from gateway.handshake import TlsDoor
from gateway.server import DataServer
from observability import events

OTHER_WORKERS_SECONDS = 0.25  # between two looks whether they serve
RESERVED_FILES = 64  # for what is not a request: listeners, etcd, Redis, keys, probes, the log
FEWEST_CONNECTIONS = 16


async def listen_admin(stack: contextlib.AsyncExitStack, app: web.Application, listen: Address) -> Address:
    """Serve the operator until the stack is left. Returns where; raises CannotRun."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=admin.IDLE_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    protocol = admin.at_most(admin.MOST_CONNECTIONS, cast("web.Server", runner.server))
    try:
        listener = await asyncio.get_running_loop().create_server(protocol, listen.host, listen.port)
    except OSError as error:
        raise cannot_listen("admin.listen", listen, error) from error
    stack.callback(listener.close)
    return address_of(listener, listen)


async def bind_data(
    stack: contextlib.AsyncExitStack,
    server: DataServer,
    listen: Address,
    certificates: Certificates | None,
    observe: events.Observer,
    *,
    shares_port: bool,
) -> asyncio.Server:
    """Take the data port, without listening there yet. Raises CannotRun."""
    factory: object = server
    if certificates is not None:
        factory = door = TlsDoor(server, certificates.context, server.head_timeout, observe)
        stack.callback(door.abort)
    try:
        return await asyncio.get_running_loop().create_server(
            cast("Callable[[], asyncio.Protocol]", factory),
            listen.host,
            listen.port,
            backlog=4096,
            reuse_port=shares_port,
            start_serving=False,
        )
    except OSError as error:
        raise cannot_listen("listen", listen, error) from error


def address_of(listener: asyncio.Server, listen: Address) -> Address:
    """Where it listens, though any port was asked for."""
    return Address(listen.host, listener.sockets[0].getsockname()[1])


def allowed_connections(config: Config) -> int:
    """How many clients at a time, and a word to the operator if it is fewer than were asked for."""
    wanted, files = config.limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if config.grpc is not None and files != resource.RLIM_INFINITY:
        files = files * 2 // 3  # as many clients may come over gRPC, who share the connections to the backends
    most = most_connections(wanted, files)
    if most < wanted:
        structlog.get_logger().warning(
            "fewer connections than limits.connections",
            connections=most,
            wanted=wanted,
            open_files=files,
            hint="raise the limit of open files (ulimit -n, LimitNOFILE), or lower limits.connections",
        )
    return most


def most_connections(wanted: int, files: int) -> int:
    """How many clients a process with so many open files may take at a time.

    Each may need a second one for its backend. Who would be one too many is closed at once, so that no request, probe
    or lease fails for want of a file.
    """
    if files == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(FEWEST_CONNECTIONS, files // 2 - RESERVED_FILES))


async def wait_useful(address: Address, is_useful: Callable[[], bool]) -> None:
    """Until we are of use there, or nobody else is."""
    while not is_useful() and await _is_served(address):  # noqa: ASYNC110  another process: no event tells
        await asyncio.sleep(OTHER_WORKERS_SECONDS)


async def _is_served(address: Address) -> bool:
    """Whether somebody listens there."""
    try:
        async with asyncio.timeout(OTHER_WORKERS_SECONDS):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:  # somebody who is busy
        return True
    except OSError:
        return False
    writer.close()
    return True


def cannot_listen(key: str, listen: Address, error: OSError) -> CannotRun:
    """What the operator is told; `key` is where the address stands in weir.yaml."""
    if error.errno == errno.EADDRINUSE:
        return CannotRun(f"{listen} is in use; stop what listens there, or set another `{key}`")
    # The event loop puts its own words, and the address once more, before those of the system.
    why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or error
    return CannotRun(f"cannot listen on {listen}: {why}; set another `{key}`")
