"""What the rig asks of a gateway that is to be measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.credentials import Credentials

PEERS = Path(__file__).parent.parent / "peers"

OPEN, LIMITED, REFUSED, NARROW = "open", "limited", "refused", "narrow"
"""The consumers of the workloads: one without a limit that it could meet, one with LIMIT, one that is out of tokens,
and one whose backends take no more than AT_ONCE requests at a time, all together."""
LIMIT_PER_SECOND, BURST = 1000, 100
AT_ONCE = 16
CONSUMER = "x-bench-consumer"
"""A header for gateways that route by no claim of a token: the client says who it is."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a gateway is put: the port to listen on, and what is around it. `folder` is its own."""

    folder: Path
    port: int
    admin_port: int
    backends: tuple[str, ...]
    otlp: str
    credentials: Credentials
    etcd: str
    redis: str

    @property
    def backend_ports(self) -> tuple[int, ...]:
        return tuple(int(url.rpartition(":")[2]) for url in self.backends)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start it."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Gateway(Protocol):
    """One gateway with its configuration. `features` says what of Weir's work it does too."""

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> str: ...

    def absent(self) -> str | None:
        """Why it cannot be started here; None when it can."""

    def launch(self, site: Site) -> Launch | None:
        """Write its configuration and tell how to start it. None: requests go to the backend itself."""

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        """What a request of this consumer carries."""


def bearer(site: Site, consumer: str) -> dict[str, str]:
    """The headers of a chat request with the consumer's token."""
    return {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {site.credentials.token(consumer)}",
    }


def program(name: str) -> str | None:
    """A program of the system, those of administrators included."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
