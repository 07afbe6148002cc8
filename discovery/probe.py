"""Active health: asks each backend whether it can serve, so that a dead one is known before a request finds out.

    UNKNOWN => PASSING   the first success: a gateway that starts is useful at once
    UNKNOWN => FAILING   3 failures in a row
    PASSING => FAILING   3 failures in a row
    FAILING => PASSING   2 successes in a row

An UNKNOWN backend is not to be used while a PASSING one is there. A check says that a backend could be asked, not
that it works: it never closes a breaker that real requests opened.

Each backend is asked each 2 s +-10 %. At most 250 checks begin in a second, in order of their due time: with more than
500 backends the interval grows instead of the load (40 s for 10,000 of them), and at most 64 run at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Final, NoReturn, Self

import aiohttp
from yarl import URL

from discovery.endpoint import Endpoint
from discovery.source import Health, HealthChanged, Observe
from discovery.store import Snapshot

TIMEOUT_SECONDS: Final = 1.0
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_LOAD_REPORT: Final = 4096

# What the load report is called and in which of its formats we ask for it: ORCA
# (https://github.com/envoyproxy/envoy/issues/6614), as vLLM and Triton send it when asked.
LOAD_HEADER: Final = "endpoint-load-metrics"
_HEADERS: Final = {"endpoint-load-metrics-format": "json", "user-agent": "weir-probe", "accept": "*/*"}


@dataclass(frozen=True, slots=True)
class Checked:
    """What one check found. `load` is the backend's own report of its load, unread, "" without one."""

    is_passing: bool
    reason: str
    load: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how many. `fall` and `rise` are failures and successes in a row."""

    interval: float = 2.0
    per_second: float = 250.0
    at_once: int = 64
    fall: int = 3
    rise: int = 2


Probe = Callable[[Endpoint], Awaitable[Checked]]


class Tally:
    """The health of one backend, from the outcomes of its checks. Pure."""

    __slots__ = ("_failures", "_pace", "_successes", "health")

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._failures = 0
        self._successes = 0
        self.health = Health.UNKNOWN

    def __repr__(self) -> str:
        return f"<Tally {self.health.value} +{self._successes} -{self._failures}>"

    def record(self, is_passing: bool) -> bool:
        """Counts one outcome; says whether the health changed."""
        self._successes = self._successes + 1 if is_passing else 0
        self._failures = 0 if is_passing else self._failures + 1
        before = self.health
        if self._failures >= self._pace.fall:
            self.health = Health.FAILING
        elif self._successes >= (self._pace.rise if before is Health.FAILING else 1):
            self.health = Health.PASSING
        return self.health is not before


@dataclass(slots=True, eq=False)
class _Target:
    endpoint: Endpoint
    tally: Tally


class Prober:
    """Checks everybody in the last snapshot given to `update`, for ever. `on_load` takes (key, load report)."""

    def __init__(
        self,
        probe: Probe,
        observe: Observe,
        rng: Random,
        *,
        on_load: Callable[[str, str], None] | None = None,
        pace: Pace = Pace(),
    ) -> None:
        self._probe = probe
        self._observe = observe
        self._rng = rng
        self._on_load = on_load
        self._pace = pace
        self._targets: dict[str, _Target] = {}
        self._due: list[tuple[float, int, _Target]] = []
        self._turn = itertools.count()  # those due at one time go in order
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(pace.at_once)
        self._untried: set[_Target] = set()
        self._all_tried = asyncio.Event()
        self._all_tried.set()
        self._subscribers: list[Callable[[str, bool], None]] = []

    def __repr__(self) -> str:
        passing = sum(target.tally.health is Health.PASSING for target in self._targets.values())
        return f"<Prober {passing} of {len(self._targets)} passing>"

    def health(self, key: str) -> Health:
        target = self._targets.get(key)
        return Health.UNKNOWN if target is None else target.tally.health

    def is_passing(self, key: str) -> bool:
        return self.health(key) is Health.PASSING

    def subscribe(self, subscriber: Callable[[str, bool], None]) -> None:
        """Calls it with (key, is passing) when that changes."""
        self._subscribers.append(subscriber)

    def update(self, snapshot: Snapshot) -> None:
        """From now on checks these. One whose place did not change keeps its health."""
        for key in self._targets.keys() - snapshot.endpoints.keys():
            self._note_tried(self._targets.pop(key))
        for key, endpoint in snapshot.endpoints.items():
            target = self._targets.get(key)
            if target is not None and target.endpoint is endpoint:
                continue  # of thousands nearly all are as they were
            if target is not None and _place(target.endpoint) == _place(endpoint):
                target.endpoint = endpoint
                continue
            new = self._targets[key] = _Target(endpoint, Tally(self._pace))
            self._untried.add(new)
            self._all_tried.clear()
            self._schedule(new, 0.0)
            if target is not None:
                self._note_tried(target)

    async def wait_tried(self) -> None:
        """Until everybody known now was checked once, passing or not."""
        await self._all_tried.wait()

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as tasks:
            while True:
                target = await self._next_target()
                await self._slots.acquire()
                tasks.create_task(self._check(target))
                await asyncio.sleep(1 / self._pace.per_second)

    async def _next_target(self) -> _Target:
        while True:
            self._wake.clear()
            now = asyncio.get_running_loop().time()
            while self._due and self._due[0][0] <= now:
                target = heapq.heappop(self._due)[2]
                if self._is_current(target):
                    return target
            try:
                async with asyncio.timeout(self._due[0][0] - now if self._due else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _check(self, target: _Target) -> None:
        try:
            checked = await self._probe(target.endpoint)
        except Exception as error:  # noqa: BLE001  hostile bytes through a large parser: whatever comes of it is a failure
            checked = Checked(False, f"the check failed: {type(error).__name__}")
        finally:
            self._slots.release()
        self._note_tried(target)
        if not self._is_current(target):
            return
        self._schedule(target, self._pace.interval * self._rng.uniform(0.9, 1.1))
        self._record(target, checked)

    def _record(self, target: _Target, checked: Checked) -> None:
        endpoint = target.endpoint
        if checked.load and self._on_load is not None:
            self._on_load(endpoint.key, checked.load)
        if not target.tally.record(checked.is_passing):
            return
        self._observe(HealthChanged(endpoint.service, endpoint.id, checked.is_passing, checked.reason))
        for subscriber in tuple(self._subscribers):
            subscriber(endpoint.key, checked.is_passing)

    def _note_tried(self, target: _Target) -> None:
        self._untried.discard(target)
        if not self._untried:
            self._all_tried.set()

    def _is_current(self, target: _Target) -> bool:
        return self._targets.get(target.endpoint.key) is target

    def _schedule(self, target: _Target, delay: float) -> None:
        due = asyncio.get_running_loop().time() + delay
        heapq.heappush(self._due, (due, next(self._turn), target))
        self._wake.set()


class HttpProbe:
    """One check over HTTP, on a connection of its own to the pinned address. Redirects are never followed.

    `tls` gives what https backends are asked with; without it the system's authorities are believed.
    """

    def __init__(self, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        self._tls = tls

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # A kept connection would tell that an old one works; thousands of them would also have to be kept.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=MAX_ANSWER_BYTES // 2,  # reading pauses at twice this, and the body is never asked for
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.close()

    async def __call__(self, endpoint: Endpoint) -> Checked:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status, load = await self._ask(endpoint)
        except TimeoutError:
            return Checked(False, f"no answer within {TIMEOUT_SECONDS:g} s")
        except aiohttp.ClientConnectorCertificateError as error:
            return Checked(False, f"its certificate is not accepted: {_told(error.certificate_error)}")
        except aiohttp.ClientConnectorSSLError as error:
            return Checked(False, f"the TLS handshake failed: {_told(error.os_error)}")
        except aiohttp.ClientConnectorError:
            return Checked(False, "cannot connect")
        except aiohttp.ClientResponseError:
            return Checked(False, "the answer is not HTTP")
        except (aiohttp.ClientError, OSError):
            # With TLS 1.3 a server looks at our certificate when the handshake is over for us
            is_tls = endpoint.scheme == "https"
            return Checked(False, f"the connection broke{'; our certificate may be refused' if is_tls else ''}")
        return Checked(_is_passing(endpoint, status), f"status {status}", load)

    async def _ask(self, endpoint: Endpoint) -> tuple[int, str]:
        """Status and load report from the first of the health paths that the backend knows."""
        *others, last = health_paths(endpoint)
        for path in others:
            status, load = await self._get(endpoint, path)
            if status != 404:
                return status, load
        return await self._get(endpoint, last)

    async def _get(self, endpoint: Endpoint, path: str) -> tuple[int, str]:
        address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        async with self._session.get(
            URL(f"{endpoint.scheme}://{address}:{endpoint.port}{path}", encoded=True),
            headers={**_HEADERS, "host": endpoint.authority},
            allow_redirects=False,
            ssl=self._tls() if self._tls is not None else True,
            server_hostname=endpoint.host if endpoint.scheme == "https" else None,
        ) as response:
            load = response.headers.get(LOAD_HEADER, "")
            return response.status, load if len(load) <= MAX_LOAD_REPORT else ""


def _told(error: Exception) -> str:
    """OpenSSL's words: fixed texts, which hold nothing that the backend sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return (reason or "no reason given").lower().replace("_", " ")


def health_paths(endpoint: Endpoint) -> tuple[str, ...]:
    """Where to ask, best first. A path from the registration stands for itself; the others follow the base path."""
    if endpoint.health_path is not None:
        return (endpoint.health_path,)
    if {"openai", "anthropic"} & set(endpoint.protocols):
        return (endpoint.base_path + "/health", endpoint.base_path + "/v1/models")
    if "oip" in endpoint.protocols:
        return (endpoint.base_path + "/v2/health/ready",)
    return (endpoint.base_path + "/",)


def _is_passing(endpoint: Endpoint, status: int) -> bool:
    """2xx. A backend of which we know no health path passes when it answers at all, other than with a 5xx."""
    if health_paths(endpoint) == (endpoint.base_path + "/",):
        return 200 <= status < 500
    return 200 <= status < 300


def _place(endpoint: Endpoint) -> tuple[str | int | None, ...]:
    """What a check depends on: with another place, what was known of the health is worth nothing."""
    rpc = (endpoint.grpc_port, endpoint.grpc_health)
    return (endpoint.scheme, endpoint.address, endpoint.port, endpoint.host, *rpc, *health_paths(endpoint))
