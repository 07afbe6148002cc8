"""Stands where a registration in etcd would."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def unregistered(*_args: object) -> AsyncIterator[None]:
    yield None
