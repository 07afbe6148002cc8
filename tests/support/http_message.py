"""Parse request bytes the way the data listener does, without a listener."""

from typing import cast

from gateway.call import Call
from gateway.server import ClientConnection, DataServer
from policies.errors import Refusal


def heard(data: bytes, header_bytes: int = 8192) -> list[Call | Refusal]:
    """What a connection makes of these bytes: calls, and at most one refusal as the last."""
    server = DataServer(None, None, idle=75.0, head_timeout=10.0, header_bytes=header_bytes, connections=10)
    connection = ClientConnection(server, None)
    connection.data_received(data)
    return list(connection._ahead)


def parse(data: bytes) -> Call:
    """The one call in these bytes. Raises the Refusal that there is instead."""
    [found] = heard(data)
    if isinstance(found, Refusal):
        raise found
    return cast("Call", found)
