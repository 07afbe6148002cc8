"""Keep-alive connections to one backend.

Last in, first out, so that a burst's extra connections grow old and go. A connection that idled longer than
`IDLE_SECONDS` is not used again: it is shorter than the usual keep-alive of servers (uvicorn: 5 s), so that a request
seldom meets a connection that the backend is just closing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import cast

from discovery.endpoint import Endpoint
from gateway.certificates import system_context
from gateway.outbox import outbox_of
from gateway.upstream.connection import Connection

IDLE_SECONDS = 3.0
MAX_IDLE = 256


class Pool:
    """`take` an idle connection or `connect` a new one; a connection comes back by itself after a whole answer.

    `tls` gives what the next connection to an https backend is made with.
    """

    def __init__(self, endpoint: Endpoint, tls: Callable[[], ssl.SSLContext] = system_context) -> None:
        self.endpoint = endpoint
        self._tls = tls
        self._idle: deque[Connection] = deque()
        self.closed = False

    def __repr__(self) -> str:
        return f"<Pool {self.endpoint.key} idle={len(self._idle)}{' closed' if self.closed else ''}>"

    def take(self, now: float) -> Connection | None:
        """An idle connection that is young enough, or None. Does not wait."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since <= IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def connect(self) -> Connection:
        """Open a new connection to the pinned address. Raises OSError (ssl.SSLError is one)."""
        endpoint = self.endpoint
        is_tls = endpoint.scheme == "https"
        loop = asyncio.get_running_loop()
        connection = Connection(self, outbox_of(loop))
        await loop.create_connection(
            lambda: cast("asyncio.Protocol", connection),
            endpoint.address,
            endpoint.port,
            ssl=self._tls() if is_tls else None,
            server_hostname=endpoint.host if is_tls else None,
        )
        return connection

    def put_back(self, connection: Connection) -> None:
        """An idle connection is kept, unless the pool is closed or full."""
        if self.closed or len(self._idle) >= MAX_IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """An idle connection was closed by the backend."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self, now: float) -> None:
        """Close what idled too long. Called now and then, so that the backend is not left holding sockets."""
        idle = self._idle
        while idle and now - idle[0].idle_since > IDLE_SECONDS:
            idle.popleft().close()

    def successor(self) -> Pool:
        """Close this one and go on with an empty one: what is connected from now on is not what was before."""
        self.close()
        return Pool(self.endpoint, self._tls)

    def close(self) -> None:
        """The backend is gone: idle connections close now, busy ones when their answer ends."""
        self.closed = True
        while self._idle:
            self._idle.popleft().close()
