"""From raw keys to endpoints that may be dialled: decode, resolve, check the address, pin it.

What needs no name resolution is decided at once, so a listing of thousands of addresses takes force as a whole. Names
are resolved beside it by a few workers with a deadline each; until that is done the key's last good endpoint stays.
Resolved names are asked again each 30 s: the pinned address is kept while it is still among the answers and moves when
it is not, after the same check. A lookup that fails changes nothing for a name that was known.

Late news is dropped: an answer for a name that nobody uses any more finds its host gone and changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NoReturn

from discovery.endpoint import Address, Candidate, Endpoint, InvalidRegistration, decode, literal_address
from discovery.source import KeyValue, Observe, Rejected
from discovery.watch import Delta

MAX_BACKENDS: Final = 10_000
RESOLVERS: Final = 4  # names looked up at once
RESOLVE_TIMEOUT: Final = 2.0
REFRESH_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 5.0  # for a name that has never resolved

Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]

# Lookups that hang fill these threads, not those that the rest of the process shares.
_threads = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolve")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the store should know: who is there, who is gone, and whose registration must not be used."""

    puts: list[Endpoint] = field(default_factory=list)
    deletes: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Host:
    """A name, the keys that use it, and what is known of it."""

    name: str
    keys: set[str] = field(default_factory=set)
    address: str | None = None
    problem: str | None = None  # why there is no address; both None: never looked up


class Vetting:
    """`publish` takes each Verdict. `forget(key)` asks the watch to bring a key again with its next full listing."""

    def __init__(
        self,
        publish: Callable[[Verdict], None],
        forget: Callable[[str], None],
        observe: Observe,
        *,
        allow_networks: Sequence[Network],
        resolve: Resolve,
        max_backends: int = MAX_BACKENDS,
    ) -> None:
        self._publish = publish
        self._forget = forget
        self._observe = observe
        self._allow_networks = tuple(allow_networks)
        self._resolve = resolve
        self._max_backends = max_backends
        self._candidates: dict[str, Candidate] = {}
        self._hosts: dict[str, _Host] = {}
        self._to_resolve: asyncio.Queue[_Host] = asyncio.Queue()
        self._untried: set[_Host] = set()
        self._all_tried = asyncio.Event()
        self._all_tried.set()
        self._reported: dict[str, str] = {}  # key -> why it is ignored now

    def __repr__(self) -> str:
        return f"<Vetting {len(self._candidates)} accepted, {len(self._reported)} ignored, {len(self._hosts)} names>"

    async def wait_resolved(self) -> None:
        """Until every name known now was looked up once, found or not."""
        await self._all_tried.wait()

    def apply(self, delta: Delta) -> None:
        """Vets what is new and publishes it, but for names that must be looked up first."""
        verdict = Verdict(deletes=list(delta.deletes))
        for key in delta.deletes:
            self._discard(key)
            self._reported.pop(key, None)
        for item in delta.puts:
            try:
                candidate = self._accept(item)
            except InvalidRegistration as refusal:
                self._discard(item.key)
                self._reject(item.key, str(refusal), verdict)
            else:
                self._keep(candidate)
                self._place(candidate, verdict)
        self._publish(verdict)

    async def run(self) -> None:
        """Resolves names until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(RESOLVERS):
                tasks.create_task(self._work())

    def _accept(self, item: KeyValue) -> Candidate:
        """Everything that can be said without looking up a name. Raises InvalidRegistration."""
        candidate = decode(item.key, item.value)
        if candidate.literal is not None and not self._is_allowed(candidate.literal):
            raise InvalidRegistration("url: the address is outside allow_networks")
        if item.key not in self._candidates and len(self._candidates) >= self._max_backends:
            self._forget(item.key)
            raise InvalidRegistration(f"there are {self._max_backends} backends already")
        return candidate

    def _place(self, candidate: Candidate, verdict: Verdict) -> None:
        """Adds the pinned endpoint to the verdict, or why there is none; nothing while its name is looked up."""
        host = None if candidate.literal is not None else self._hosts[candidate.host]
        address = candidate.host if host is None else host.address
        if address is not None:
            verdict.puts.append(candidate.at(address))
            self._reported.pop(candidate.key, None)
        elif host is not None and host.problem is not None:
            self._reject(candidate.key, host.problem, verdict)

    def _reject(self, key: str, reason: str, verdict: Verdict) -> None:
        verdict.rejected.append(key)
        if self._reported.get(key) != reason:
            self._reported[key] = reason
            self._observe(Rejected(_printable(key, 200), _printable(reason, 300)))

    def _keep(self, candidate: Candidate) -> None:
        before = self._candidates.get(candidate.key)
        self._candidates[candidate.key] = candidate
        if candidate.literal is None:
            self._join_host(candidate)
        if before is not None and before.host != candidate.host:
            self._leave_host(before)

    def _discard(self, key: str) -> None:
        candidate = self._candidates.pop(key, None)
        if candidate is not None:
            self._leave_host(candidate)

    def _join_host(self, candidate: Candidate) -> None:
        host = self._hosts.get(candidate.host)
        if host is None:
            host = self._hosts[candidate.host] = _Host(candidate.host)
            self._untried.add(host)
            self._all_tried.clear()
            self._to_resolve.put_nowait(host)
        host.keys.add(candidate.key)

    def _leave_host(self, candidate: Candidate) -> None:
        host = self._hosts.get(candidate.host)
        if host is None:
            return
        host.keys.discard(candidate.key)
        if not host.keys:
            del self._hosts[host.name]
            self._tried(host)

    async def _work(self) -> NoReturn:
        while True:
            host = await self._to_resolve.get()
            if self._hosts.get(host.name) is not host:
                continue
            found = await self._look_up(host.name)
            if self._hosts.get(host.name) is not host:
                continue
            self._settle(host, found)
            delay = RETRY_SECONDS if host.address is None else REFRESH_SECONDS
            asyncio.get_running_loop().call_later(delay, self._to_resolve.put_nowait, host)

    async def _look_up(self, name: str) -> Sequence[str]:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                return await self._resolve(name)
        except (OSError, UnicodeError):  # TimeoutError is an OSError, and so is socket.gaierror
            return ()

    def _settle(self, host: _Host, found: Sequence[str]) -> None:
        """Pins the host's address by what was found for its name, and tells it for each key that waits."""
        self._tried(host)
        if not found and host.address is not None:
            return
        allowed = [text for text in found if self._is_allowed(literal_address(text))]
        if host.address is None or host.address not in allowed:
            host.address = allowed[0] if allowed else None
        host.problem = None if allowed else _problem(found)
        verdict = Verdict()
        for key in sorted(host.keys):
            self._place(self._candidates[key], verdict)
        self._publish(verdict)

    def _tried(self, host: _Host) -> None:
        self._untried.discard(host)
        if not self._untried:
            self._all_tried.set()

    def _is_allowed(self, address: Address | None) -> bool:
        if address is None or address.is_unspecified or address.is_multicast:
            return False
        return any(address in network for network in self._allow_networks)


async def system_resolver(name: str) -> Sequence[str]:
    """The addresses that the system knows for the name. Raises OSError."""
    lookup = asyncio.get_running_loop().run_in_executor(_threads, _addresses, name)
    return await lookup


def _addresses(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def _problem(found: Sequence[str]) -> str:
    if found:
        return "url: the host has no address inside allow_networks"
    return "url: the host cannot be resolved"


def _printable(text: str, limit: int) -> str:
    """ASCII without control characters: whoever writes keys writes neither our log lines nor our terminals."""
    return "".join(each if " " <= each <= "~" else "?" for each in text[:limit])
