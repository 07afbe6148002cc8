"""Parse request bytes the way the data listener does, without a listener."""

from typing import Self, cast

from gateway.call import Call
from gateway.server import ClientConnection, DataServer
from policies.errors import Refusal


def heard(*pieces: bytes, header_bytes: int = 8192) -> list[Call | Refusal]:
    """What a connection makes of bytes that come in these pieces: calls, and at most one refusal as the last."""
    server = DataServer(None, None, idle=75.0, head_timeout=10.0, header_bytes=header_bytes, connections=10)
    connection = ClientConnection(server, _Timers())
    for piece in pieces:
        connection.data_received(piece)
    return list(connection._ahead)


class _Timers:
    """An event loop as far as a connection without a transport needs one. They never ring."""

    def call_later(self, *_: object) -> Self:
        return self

    def cancel(self) -> None:
        pass


def parse(data: bytes) -> Call:
    """The one call in these bytes. Raises the Refusal that there is instead."""
    [found] = heard(data)
    if isinstance(found, Refusal):
        raise found
    return cast("Call", found)
