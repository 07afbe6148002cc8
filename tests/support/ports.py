"""Ports of loopback for servers that come back to the same one, or that are told their port before they listen.

They lie below those that Linux gives to whoever asks for any (net.ipv4.ip_local_port_range: 32768 to 60999): between the
look and the use, or while a server is down, no other test, client or process is given one of them. Runs of the tests at
the same time (pytest-xdist, another checkout) walk through the range from places far apart.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator

FIRST, END = 10_000, 20_000  # Redis Cluster takes the one 10,000 above, too
GOLDEN = 0.618_033_988_75  # its multiples lie far apart, modulo 1 (Knuth, The Art of Computer Programming, 6.4)

_walk = itertools.count(int(os.getpid() * GOLDEN % 1 * (END - FIRST)))


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many that nobody listens on, one after the other."""
    row: list[int] = []
    while len(row) < count:
        port = FIRST + next(_walk) % (END - FIRST)
        if (row and port != row[-1] + 1) or not _is_free(port):
            row = []
        else:
            row.append(port)
    return row


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def silent_listener() -> Iterator[int]:
    """Connections to this port are made, and nothing is said on them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
