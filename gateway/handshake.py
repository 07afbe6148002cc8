"""Accept, over TLS: connections that have not shaken hands yet.

The listener takes connections in plain, and each gets its handshake here, with the certificates in force at that
moment: so others may come in force without a new socket, no session of the old ones is resumed, and whoever connects
and does nothing is counted and has the time of a head. A handshake that fails is told.

asyncio's `start_tls` is for protocols that speak first in plain: bytes that come before it is called are lost. So the
accepted socket is taken from its transport before anything is read, and connected anew as a TLS one.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import Final, Self, cast

from gateway.server import DataServer
from observability.events import HandshakeFailed, Observer

# OpenSSL's words for what went wrong, and ours: few, so that they can be a label. The first that is in it counts.
_REASONS: Final = (
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "no_certificate"),
    ("CERTIFICATE_VERIFY_FAILED", "certificate_refused"),
    ("ALERT", "refused_by_client"),
    ("UNSUPPORTED_PROTOCOL", "old_version"),
    ("VERSION_TOO_LOW", "old_version"),
    ("NO_SHARED_CIPHER", "no_shared_cipher"),
    ("HTTP_REQUEST", "not_tls"),
    ("WRONG_VERSION_NUMBER", "not_tls"),
)
GONE: Final = "gone"


class TlsDoor(asyncio.Protocol):
    """The data listener's protocol where TLS is spoken, one for all: connections leave it as soon as they are made.

    `context` gives what the next handshake gets, `seconds` is how long one may take.
    """

    def __init__(
        self, server: DataServer, context: Callable[[], ssl.SSLContext], seconds: float, observe: Observer
    ) -> None:
        self._server = server
        self._context = context
        self._seconds = seconds
        self._observe = observe
        self.shaking: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<TlsDoor {len(self.shaking)} shaking hands>"

    def __call__(self) -> Self:
        return self

    def abort(self) -> None:
        """End every handshake that is under way."""
        for task in self.shaking:
            task.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast("asyncio.Transport", transport)
        server = self._server
        if len(self.shaking) + len(server.connections) >= server.most_connections:
            server.refused_connections += 1
        else:
            accepted = socket.socket(fileno=os.dup(plain.get_extra_info("socket").fileno()))
            accepted.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._shake_hands(accepted))
            self.shaking.add(task)
            task.add_done_callback(self.shaking.discard)
        plain.abort()  # the connection goes on in the duplicate, if there is one

    async def _shake_hands(self, accepted: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                cast("Callable[[], asyncio.Protocol]", self._server),
                accepted,
                ssl=self._context(),
                ssl_handshake_timeout=self._seconds,
            )
        except OSError as error:
            reason, detail = reason_of(error)
            if reason != GONE:  # as port checks do, again and again
                self._observe(HandshakeFailed(reason, detail))


def reason_of(error: OSError) -> tuple[str, str]:
    """Why a handshake failed: a word for a label, and OpenSSL's text. Both are fixed, whatever the client sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "certificate_refused", error.verify_message
    if isinstance(error, ssl.SSLError):
        text = error.reason or "UNKNOWN"
        return next((word for mark, word in _REASONS if mark in text), "other"), text.lower().replace("_", " ")
    is_late = isinstance(error, (TimeoutError, ConnectionAbortedError))
    return ("timeout" if is_late else GONE), ""
