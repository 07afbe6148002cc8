"""Backends named in weir.yaml, as a source like any other: vetted, resolved and probed the same way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Final

from discovery.endpoint import Registration, encode
from discovery.source import Changes, KeyValue, Listing

_REVISION: Final = 1
_CLUSTER_ID: Final = 1


@dataclass(frozen=True, slots=True)
class StaticBackend:
    """One entry of `discovery.static`."""

    service: str
    registration: Registration

    @property
    def key(self) -> str:
        """service/id; the id is the url without its scheme, in the characters that an id may have."""
        bare = self.registration.url.partition("://")[2].rstrip("/")
        return f"{self.service}/{re.sub(r'[^A-Za-z0-9._-]+', '-', bare).strip('-')[:128]}"


class StaticSource:
    """All is listed at once, and nothing ever changes. Raises ValueError when two entries are the same backend."""

    def __init__(self, backends: Iterable[StaticBackend]) -> None:
        items: dict[str, KeyValue] = {}
        for backend in backends:
            if backend.key in items:
                raise ValueError(f"two backends are both {backend.key}: name each url once")
            items[backend.key] = KeyValue(backend.key, encode(backend.registration), _REVISION)
        self._listing = Listing(_REVISION, _CLUSTER_ID, tuple(items.values()))

    def __repr__(self) -> str:
        return f"<StaticSource {len(self._listing.items)} backends>"

    async def list(self) -> Listing:
        return self._listing

    async def watch(self, revision: int) -> AsyncGenerator[Changes, None]:  # noqa: ARG002  of the protocol: nothing ever follows
        yield Changes()
        await asyncio.Event().wait()

    async def ping(self) -> int:
        return _REVISION
