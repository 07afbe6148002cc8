"""The data listener's protocol on a transport in memory: real parsing, no sockets."""

from gateway.server import DataServer
from tests.support.upstream import MemoryTransport


class Listener:
    """A DataServer whose handler writes the path as the answer, or does what a test says."""

    def __init__(self, handle=None, connections: int = 10) -> None:
        self.refusals = []
        self.server = DataServer(
            handle or self.echo,
            self.reject,
            idle=75.0,
            head_timeout=10.0,
            header_bytes=8192,
            connections=connections,
        )

    async def echo(self, call) -> bool:
        call.connection.write(call.resource.encoded)
        return True

    def reject(self, connection, refusal) -> None:
        self.refusals.append(refusal)
        connection.write(b"refused")

    def connect(self):
        client = self.server()
        return client, MemoryTransport(client)
