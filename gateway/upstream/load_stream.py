"""Hears what backends push of their load: those whose registration names a path for it.

    CONNECTING => HEARING (an event stream was answered) or WAITING (anything else)
    HEARING    => WAITING (it ended, broke, sent what is no event stream, or said nothing for DEAD_SECONDS)
    WAITING    => CONNECTING, after a delay that grows up to LONGEST_DELAY

Each backend has a task of its own, which ends with the backend. What one can cost is bounded: at most MOST_STREAMS are
listened to, each is read at most each APART_SECONDS (less often when they are more than EACH_FULL_PACE), of what came
meanwhile only the newest event is looked at, and what it does not read stays with the backend (TCP). An event is
MAX_EVENT_BYTES at most. A backend that is silent for longer than a busy one would be is not known any more: whoever
hears that is told at once, and again nothing else comes of it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final, NoReturn

import aiohttp
from yarl import URL

from gateway.upstream.load_report import LoadReport, of_document
from policies.backoff import Backoff

if TYPE_CHECKING:
    from discovery.endpoint import Endpoint

STALE_SECONDS: Final = 0.2  # a busy backend tells its load each 0.1 s
DEAD_SECONDS: Final = 5.0  # an idle one each second
APART_SECONDS: Final = 0.02
EACH_FULL_PACE: Final = 8  # with MOST_STREAMS each is still read before it is stale
MOST_STREAMS: Final = 64
MAX_EVENT_BYTES: Final = 4096
CONNECT_SECONDS: Final = 2.0
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0

Hear = Callable[[str, LoadReport], bool]  # whether it was news


class Unfit(Exception):  # noqa: N818  a verdict on a stream
    """What was answered is not a stream of load reports."""


class LoadStreams:
    """Listens while `run` runs. `silent` is called for a backend that has said nothing for STALE_SECONDS."""

    def __init__(
        self, hear: Hear, silent: Callable[[str], None], tls: Callable[[], ssl.SSLContext], rng: Random
    ) -> None:
        self.counts: Counter[str] = Counter(taken=0, old=0, nonsense=0)  # of reports, by what became of them
        self.connected = 0
        self._hear = hear
        self._silent = silent
        self._tls = tls
        self._rng = rng
        self._wanted: dict[str, Endpoint] = {}
        self._tasks: dict[str, tuple[Endpoint, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<LoadStreams {self.connected} of {len(self._wanted)} connected, {dict(self.counts)}>"

    def update(self, endpoints: Mapping[str, Endpoint]) -> None:
        """From now on listens to those of these that push, up to the bound."""
        pushing = [one for one in endpoints.values() if one.load_path is not None and not one.draining]
        self._wanted = {one.key: one for one in pushing[:MOST_STREAMS]}
        self._changed.set()

    async def run(self) -> NoReturn:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=2 * MAX_EVENT_BYTES,
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                self._reconcile(session, group)
                self._changed.clear()
                await self._changed.wait()

    def _reconcile(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        for key, (endpoint, task) in list(self._tasks.items()):
            if self._wanted.get(key) != endpoint:
                task.cancel()
                del self._tasks[key]
        for key, endpoint in self._wanted.items():
            if key not in self._tasks:
                self._tasks[key] = endpoint, group.create_task(self._listen(session, endpoint))

    async def _listen(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> NoReturn:
        backoff = Backoff(FIRST_DELAY, LONGEST_DELAY, self._rng)
        while True:
            with suppress(aiohttp.ClientError, OSError, TimeoutError, Unfit, ValueError):  # hostile bytes: any of these
                await self._follow(session, endpoint, backoff)
            self._silent(endpoint.key)
            await asyncio.sleep(backoff.next_delay())

    async def _follow(self, session: aiohttp.ClientSession, endpoint: Endpoint, backoff: Backoff) -> None:
        """One connection, until it ends. Raises what goes wrong."""
        address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        url = URL(f"{endpoint.scheme}://{address}:{endpoint.port}{endpoint.load_path}", encoded=True)
        async with (
            asyncio.timeout(DEAD_SECONDS) as until_answered,
            session.get(
                url,
                headers={"host": endpoint.authority, "accept": "text/event-stream", "user-agent": "weir-load"},
                allow_redirects=False,
                ssl=self._tls() if endpoint.scheme == "https" else True,
                server_hostname=endpoint.host if endpoint.scheme == "https" else None,
            ) as response,
        ):
            if response.status != 200 or response.content_type != "text/event-stream":
                raise Unfit
            until_answered.reschedule(None)
            self.connected += 1
            try:
                await self._read(response.content, endpoint.key, backoff)
            finally:
                self.connected -= 1

    async def _read(self, content: aiohttp.StreamReader, key: str, backoff: Backoff) -> None:
        loop = asyncio.get_running_loop()
        rest, heard_at = b"", loop.time()
        while True:
            try:
                async with asyncio.timeout(STALE_SECONDS):
                    data = await content.readany()
            except TimeoutError:
                self._silent(key)
                if loop.time() > heard_at + DEAD_SECONDS:
                    raise
                continue
            if not data:
                return
            heard_at = loop.time()
            whole, _, rest = (rest + data).rpartition(b"\n\n")
            if len(rest) > MAX_EVENT_BYTES:
                raise Unfit
            if whole and self._take(key, whole[whole.rfind(b"\n\n") + 1 :].strip()):
                backoff.reset()
            await asyncio.sleep(APART_SECONDS * max(1.0, self.connected / EACH_FULL_PACE))

    def _take(self, key: str, event: bytes) -> bool:
        """Whether this event is a report; comments and what it says twice are none of our business."""
        report = of_document(event[5:]) if event.startswith(b"data:") and len(event) <= MAX_EVENT_BYTES else None
        if report is None:
            self.counts["nonsense"] += not event.startswith(b":")
            return False
        self.counts["taken" if self._hear(key, report) else "old"] += 1
        return True
