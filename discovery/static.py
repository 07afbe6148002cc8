"""Backends named in weir.yaml, as a source like any other: vetted, resolved and probed the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Final

from discovery.endpoint import Registration, encode, id_of_place
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
        """service/id."""
        return f"{self.service}/{id_of_place(self.registration.url)}"


class StaticSource:
    """All is listed at once, and nothing ever changes. Raises ValueError when two entries are the same backend."""

    def __init__(self, backends: Iterable[StaticBackend]) -> None:
        items: dict[str, KeyValue] = {}
        for backend in backends:
            key = backend.key
            if key in items:
                url = backend.registration.url
                raise ValueError(f"two backends of service {backend.service} are both at {url}: name each url once")
            items[key] = KeyValue(key, encode(backend.registration), _REVISION)
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
