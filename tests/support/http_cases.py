"""Hostile and odd requests from two corpora, as bytes to send, and what a proxy made of each.

Each case is sent from an address of its own (127/8 is all loopback), which the proxy tells its backend: so what reaches
the backend is told apart by case, however many are under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.support.corpora import rows
from tests.support.raw_client import RawClient
from tests.support.recording_backend import Reached, RecordingBackend

AT_ONCE = 64
HANGS_AFTER = 30.0
# Behind each request that is to be refused: an empty body to who reads chunks, a second request to who reads none,
# and enough of a body to who waits for one.
HIDDEN = b"0\r\n\r\nGET /hidden HTTP/1.1\r\nHost: hidden\r\n\r\n" + b"x" * 12_000

_REQUEST_LINE = re.compile(rb"(?m)^([A-Z-]+ \S* HTTP/\d\.\d\r\n)")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding:[^\r]*chunked").search
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*([0-9]+)[ \t]*\r$").search
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ").findall


@dataclass(frozen=True)
class Case:
    """`expect`: accept, reject, either (the corpus's own word), or first (the first request alone)."""

    name: str
    data: bytes
    expect: str


@dataclass(frozen=True)
class Outcome:
    """What reached the backend, and what the client was sent."""

    reached: tuple[Reached, ...]
    received: bytes
    statuses: tuple[int, ...]

    @property
    def read(self) -> tuple[tuple[str, str, bytes], ...]:
        """The requests as the backend reads them, less their headers."""
        return tuple((request.method, request.target, request.body) for request in self.reached)

    def __str__(self) -> str:
        return ", ".join(map(str, self.reached)) or "-"


def desync_guardian() -> list[Case]:
    """http-desync-guardian's heads, with a Host and with what follows them: the rest of a request that is to pass, or
    HIDDEN behind one that is not."""
    return [_guardian(row["id"], b64decode(row["request_b64"]), row["expect"]) for row in rows("http-desync-guardian")]


def _guardian(name: str, head: bytes, expect: str) -> Case:
    if b"\nHost:" not in head:
        line, _, lines = head.partition(b"\n")
        head = line + b"\nHost: " + name.encode() + b"\r\n" + lines
    if expect == "reject":
        return Case(name, head + HIDDEN, expect)
    length = _LENGTH(head)
    body = b"0\r\n\r\n" if _CHUNKED(head) else b"b" * int(length[1]) if length else b""
    return Case(name, head + body, expect)


def llhttp_requests() -> list[Case]:
    """llhttp's own test requests, with a Host where they have none. Modes that are more lenient than HTTP are refused."""
    return [
        Case(name, _with_host(b64decode(row["input_b64"]), row["has_host"]), _expected(row))
        for name, row in _llhttp()
        if row["kind"] == "http" and row["meta"]["type"].startswith("request")
    ]


def llhttp_targets() -> list[Case]:
    """llhttp's own test URLs, each as the target of a GET. None says what a proxy is to make of it."""
    return [
        Case(name, b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % b64decode(row["input_b64"]), "either")
        for name, row in _llhttp()
        if row["kind"] == "url"
    ]


def _llhttp() -> Iterator[tuple[str, dict]]:
    """Each row under a name of its own: some have the same title."""
    seen: dict[str, int] = {}
    for row in rows("llhttp-md"):
        seen[row["id"]] = times = seen.get(row["id"], 0) + 1
        yield (f"{row['id']} ({times})" if times > 1 else row["id"]), row


def _with_host(data: bytes, has_host: bool) -> bytes:
    return data if has_host else _REQUEST_LINE.sub(rb"\1Host: llhttp\r\n", data)


def _expected(row: dict) -> str:
    if "lenient" in row["meta"]["type"]:
        return "reject"
    return "first" if row["strict_expect"] == "first-only-then-close" else row["strict_expect"]


async def outcomes(
    address, backend: RecordingBackend, cases: Iterable[Case], piece: int | None = None
) -> dict[str, Outcome]:
    """Send each case on a connection of its own until the other side closes it, in one piece or its first kilobyte in
    pieces of so many bytes. Raises TimeoutError for one that hangs."""
    limit = asyncio.Semaphore(AT_ONCE)
    cases = list(cases)

    async def one(number: int, case: Case) -> bytes:
        async with limit:
            try:
                return await asyncio.wait_for(_exchange(address, _source(number), case.data, piece), HANGS_AFTER)
            except TimeoutError:
                raise TimeoutError(f"{case.name} hangs") from None

    received = await asyncio.gather(*(one(number, case) for number, case in enumerate(cases)))
    by_client: dict[str, list[Reached]] = {}
    for request in backend.reached:
        by_client.setdefault(request.client, []).append(request)
    found = {
        case.name: Outcome(
            tuple(by_client.pop(_source(number), ())), data, tuple(int(status) for status in _STATUS(data))
        )
        for number, (case, data) in enumerate(zip(cases, received, strict=True))
    }
    assert not by_client, f"requests that nobody sent reached the backend: {by_client}"
    return found


def _source(number: int) -> str:
    return f"127.1.{number // 200}.{number % 200 + 1}"


def pieces(data: bytes, size: int | None) -> list[bytes]:
    """The first kilobyte in pieces of this size, and the rest."""
    if size is None:
        return [data]
    return [data[at : min(at + size, 1024)] for at in range(0, min(1024, len(data)), size)] + [data[1024:]]


async def _exchange(address, source: str, data: bytes, piece: int | None) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port, local_addr=(source, 0))
    received = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while some := await reader.read(65536):
                received.extend(some)

    reading = asyncio.create_task(read())
    try:
        for each in pieces(data, piece):
            if not writer.is_closing():
                writer.write(each)
                await asyncio.sleep(0)
        await reading
    finally:
        reading.cancel()
        writer.close()
    return bytes(received)


# Answers


@dataclass(frozen=True)
class Said:
    """An answer as its client reads it: `whole` is false where it ended before its framing said so."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def read(self) -> tuple[int, bytes, bool] | int:
        """What of it is compared. An error of the proxy's own has a body of the proxy's own."""
        return self.status if self.status >= 500 else (self.status, self.body, self.whole)

    def __str__(self) -> str:
        if not self.status or self.status >= 500:
            return str(self.status or "nothing")
        return f"{self.status} {len(self.body)}{'' if self.whole else ' cut'}"


def llhttp_answers() -> list[Case]:
    """llhttp's own test answers. Modes that are more lenient than HTTP are refused."""
    return [
        Case(name, b64decode(row["input_b64"]), _expected(row))
        for name, row in _llhttp()
        if row["kind"] == "http" and row["meta"]["type"].startswith("response")
    ]


async def said(address, cases: Iterable[Case]) -> dict[str, Said]:
    """Ask for each case, by its number as the path. Raises TimeoutError for one that hangs."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, case: Case) -> Said:
        async with limit:
            try:
                return await asyncio.wait_for(_ask(address, f"/{number}"), HANGS_AFTER)
            except TimeoutError:
                raise TimeoutError(f"{case.name} hangs") from None

    cases = list(cases)
    answers = await asyncio.gather(*(one(number, case) for number, case in enumerate(cases)))
    return {case.name: answer for case, answer in zip(cases, answers, strict=True)}


async def _ask(address, path: str) -> Said:
    async with RawClient(address) as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        try:
            answer = await client.answer()
        except (asyncio.IncompleteReadError, IndexError, ValueError):
            return Said(0, {}, b"", whole=False)  # what came is no answer
        return Said(answer.status, answer.headers, answer.body, answer.whole)
