"""Writes to etcd over its JSON gateway: plain HTTP of this thread, so that it works in a network namespace, too.

(gRPC connects from threads of its own, which may be in another one.)
"""

from __future__ import annotations

import base64
from typing import Any, Self

import aiohttp


class EtcdWriter:
    """`async with EtcdWriter(url) as etcd`. Raises OSError (aiohttp.ClientError is none: it is translated)."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Each on a connection of its own: none is left over from before a restart.
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=5.0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def put(self, key: str, value: bytes, lease: str = "0") -> int:
        """The revision."""
        return _revision(await self._call("kv/put", key=_b64(key.encode()), value=_b64(value), lease=lease))

    async def delete(self, key: str) -> int:
        return _revision(await self._call("kv/deleterange", key=_b64(key.encode())))

    async def grant(self, seconds: int) -> str:
        return str((await self._call("lease/grant", TTL=seconds))["ID"])

    async def list(self, prefix: str) -> tuple[int, dict[str, bytes]]:
        """The revision, and everything under the prefix."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = await self._call("kv/range", key=_b64(prefix.encode()), range_end=_b64(end.encode()))
        found = {_text(each["key"]): base64.b64decode(each.get("value", "")) for each in answer.get("kvs", [])}
        return _revision(answer), found

    async def _call(self, path: str, **fields: Any) -> dict[str, Any]:
        try:
            async with self._session.post(f"{self._url}/v3/{path}", json=fields) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()
        except aiohttp.ClientError as error:
            raise OSError(f"etcd: {error}") from error


def _revision(answer: dict[str, Any]) -> int:
    return int(answer["header"]["revision"])


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()
