"""Where keys come from: list them whole, then watch what changes.

A Source is generic over raw key-values, so that one state machine (`watch.py`) follows backends, gateways and
policies alike. `etcd.py` and `static.py` are its two kinds. Revisions belong to the whole store and only grow, as
etcd's do: a listing at revision R holds everything up to R, and a watch from R + 1 holds everything after it.
Keys are relative to the source's prefix.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KeyValue:
    """`revision` is the one at which the key was last put. A value over the source's cap is cut one byte past it."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything under the prefix as it was at `revision`. Another `cluster_id` is another history."""

    revision: int
    cluster_id: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened, in order. Empty: a sign of life."""

    events: tuple[KeyValue | Deleted, ...] = ()


class SourceFailure(Exception):  # noqa: N818  its kinds are nouns of what happened
    """The source cannot answer now. Every one of them may be tried again."""


class Unavailable(SourceFailure):
    """No answer, a refused one, or a member that has lost its cluster."""


class Compacted(SourceFailure):
    """The history after our revision is gone: list again."""


class LeaseLost(SourceFailure):
    """The lease has expired or was revoked: grant another one and put again."""


class Source(Protocol):
    """Every method may wait, raises SourceFailure alone, and may be tried again at once: it fails over by itself."""

    async def list(self) -> Listing: ...

    def watch(self, revision: int) -> AsyncGenerator[Changes, None]:
        """Everything from `revision` on. The first Changes comes as soon as the watch stands, and may be empty."""
        ...

    async def ping(self) -> int:
        """The revision of the newest key under the prefix, 0 without one: a cheap read, and so a sign of life."""
        ...


class SyncState(Enum):
    """How fresh what we know is."""

    COLD = "cold"  # never listed
    WATCHING = "watching"
    STALE = "stale"  # last known good


class Health(Enum):
    """What active checks say of a backend."""

    UNKNOWN = "unknown"  # not probed often enough yet
    PASSING = "passing"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A registration that is ignored. `key` is printable ASCII of at most 200 characters."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resynced:
    """Everything was listed. reason: start | compacted | cluster_changed | lost | frozen | periodic."""

    reason: str
    revision: int


@dataclass(frozen=True, slots=True)
class StateChanged:
    state: SyncState
    reason: str  # why it is cold or stale, "" otherwise


@dataclass(frozen=True, slots=True)
class HealthChanged:
    service: str
    backend: str  # the id
    healthy: bool
    reason: str


DiscoveryEvent = Rejected | Resynced | StateChanged | HealthChanged
Observe = Callable[[DiscoveryEvent], None]
