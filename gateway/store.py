"""Redis, which holds what all gateways share. This file is the only door to it.

Today that is the token buckets, leased in slices (theory: `policies/lease.py`; borrowers: `gateway/meter.py`).

One lane. A borrower submits and goes on; one task, `run()`, collects what was submitted, sends it as one pipeline of
script calls and hands out the answers. Nobody else ever waits on a connection, so nobody's cancellation can leave a
reply on it for the next one to read; and each reply must name the number of its question, or the connection is dropped.

`run()` goes through two states:

- Away => Up, because a probe that writes was answered. Probes go out at once, then each second, jittered. Whoever
  submits is told at once that there is no answer.
- Up => Away, because FAILURES exchanges in a row failed. An exchange ends after 25 ms, connecting after 100 ms, with
  TLS 500; the library retries nothing. After any failure the connection is thrown away: a server that became a
  read-only replica, or an answer that comes late, is never met again.

Only that change is told (StoreChanged), once each way.

The script works in whole microseconds (Redis's own clock, which may be set back or forth) and microtokens. It writes
only when something changes hands: a refusal is a read. Its key lives until the bucket is full again and a second more.
A value that it cannot read is deleted and starts over as an empty bucket. What stands there for a replica is
"number held pending ends", and "reserved expires" behind it where it has set tokens aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import secrets
import ssl
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from redis import exceptions as failures
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from gateway.meter import STORE_SECONDS, Borrower
from gateway.redis_url import Address, read_address
from observability.events import Observer, StoreChanged
from policies.lease import LEASE_SECONDS, RESERVED_SECONDS, Ask, Grant, Limit
from policies.policy import Rate

CONNECT_SECONDS = 0.1
TLS_CONNECT_SECONDS = 0.5  # the library reads all authorities of the system at each connection
CLOSE_SECONDS = 0.1
PROBE_SECONDS = 1.0
FAILURES = 5
BATCH = 64
"""Questions in one exchange: at about 0.1 ms each, far from the deadline."""

MICRO = 1_000_000

SCRIPT = """
local MICRO = 1000000
local key, replica = KEYS[1], ARGV[1]
local number, ack, need, spare = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local kept, back, debt, quiet = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local capacity, count, period = tonumber(ARGV[10]) * MICRO, tonumber(ARGV[11]), tonumber(ARGV[12])
local lease_time, least = tonumber(ARGV[13]), tonumber(ARGV[14] or 1)
local reserved, told = tonumber(ARGV[15] or 0), tonumber(ARGV[16] or 0)
local reserve_time = ARGV[17] and tonumber(ARGV[17]) or math.huge
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * MICRO + tonumber(clock[2])

-- Read. Leases, by replica.
local stored = redis.pcall('HGETALL', key)
local level, at, leases, write = capacity, now, {}, false
local sound = not stored.err
if sound and #stored > 0 then
  level, at = nil, nil
  for i = 1, #stored, 2 do
    local name, value = stored[i], stored[i + 1]
    if name == 'level' then
      level = tonumber(string.match(value, '^-?%d+$'))
    elseif name == 'at' then
      at = tonumber(string.match(value, '^%d+$'))
    else
      local n, held, pending, ends, more = string.match(value, '^(%d+) (%d+) (%d+) (%d+)(.*)$')
      local aside, expires = string.match(more or '', '^ (%d+) (%d+)$')
      sound = sound and n and (aside or more == '')
      leases[name] = {number = tonumber(n), held = tonumber(held), pending = tonumber(pending), ends = tonumber(ends),
        reserved = tonumber(aside or 0), expires = tonumber(expires or 0)}
    end
  end
  sound = sound and level and at
end
if not sound then
  local deleted = redis.pcall('DEL', key)
  if type(deleted) == 'table' and deleted.err then return deleted end
  level, at, leases, write = 0, now, {}, true
end

local mine = leases[replica]
if mine and mine.number >= number then return {number, 0, '0', 0} end -- overtaken by a later question

local fields = {}
local function record(name, lease)
  local value = string.format('%.0f %.0f %.0f %.0f', lease.number, lease.held, lease.pending, lease.ends)
  if lease.reserved > 0 then value = value .. string.format(' %.0f %.0f', lease.reserved, lease.expires) end
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end

-- The clock was set back: go on from here.
if at > now then at, write = now, true end
for name, lease in pairs(leases) do
  if lease.ends > now + lease_time or lease.expires > now + reserve_time then
    lease.ends, lease.expires = math.min(lease.ends, now + lease_time), math.min(lease.expires, now + reserve_time)
    write = true
    if name ~= replica then record(name, lease) end
  end
end

-- When did tokens stop being held? Those of a dead lease at its end, what this replica spent when it was quiet again.
local released, gone, outstanding, others, first_end = {}, {}, 0, 0, nil
for name, lease in pairs(leases) do
  outstanding = outstanding + lease.held
  local spent = 0
  if name == replica then
    if ack >= lease.number then spent = math.max(0, lease.held - kept - math.max(0, back)) end
    released[#released + 1] = {math.min(lease.ends, now - quiet), spent}
  end
  if lease.ends <= now then
    released[#released + 1] = {lease.ends, lease.held - spent}
    if lease.expires <= now then gone[#gone + 1] = name end
  elseif name ~= replica then
    others = others + lease.held
    if lease.held > 0 then first_end = math.min(first_end or lease.ends, lease.ends) end
  end
end
if mine and mine.ends > now and ack < mine.number then back = back + mine.pending end -- its answer was lost

-- What was set aside by who has not told of it for so long comes back; who then does tell of it takes it anew.
local last = 0
for name, lease in pairs(leases) do
  if lease.reserved > 0 and lease.expires <= now then
    back, write = back + lease.reserved, true
  elseif name ~= replica then
    last = math.max(last, lease.expires)
  end
end
if told > 0 and not (mine and (mine.reserved == 0 or mine.expires > now)) then back, write = back - told, true end
if reserved > 0 then last = now + reserve_time end
if reserved ~= (mine and mine.reserved or 0) then write = true end
if reserved > 0 and mine and mine.expires < now + reserve_time / 2 then write = true end

-- Refill, never above what is not held.
released[#released + 1] = {now, 0}
table.sort(released, function(a, b) return a[1] < b[1] end)
for _, release in ipairs(released) do
  if release[1] > at then
    level = math.min(capacity - outstanding * MICRO, level + (release[1] - at) * count / period)
    at = release[1]
  end
  outstanding = outstanding - release[2]
end
level = math.min(capacity - (others + kept) * MICRO, level + math.max(0, back) * MICRO)
level = math.max(math.min(0, level), level - debt * MICRO)
level = math.max(-capacity, level + math.min(0, back) * MICRO)

-- Grant.
local granted = 0
if level >= least * MICRO then granted = math.min(need + spare, math.floor(level / MICRO)) end
level = math.floor(level - granted * MICRO)
kept = kept + math.max(0, granted - need)
local wait = 0
if level < least * MICRO then
  wait = math.ceil((least * MICRO - level) * period / count)
  if first_end and capacity - (others + kept) * MICRO < least * MICRO then wait = math.max(wait, first_end - now) end
end

if write or granted > 0 or back ~= 0 or debt > 0 then
  record(replica, {number = number, held = kept, pending = granted, ends = now + lease_time,
    reserved = reserved, expires = now + reserve_time})
  local live = math.max((capacity - level) * period / count, lease_time, last - now)
  if #gone > 0 then redis.pcall('HDEL', key, unpack(gone)) end
  local put = redis.pcall('HSET', key, 'level', string.format('%.0f', level), 'at', string.format('%.0f', now),
    unpack(fields))
  if type(put) == 'table' and put.err then return put end
  redis.pcall('PEXPIRE', key, string.format('%.0f', math.ceil(live / 1000) + 1000))
end
return {number, granted, string.format('%.0f', level), string.format('%.0f', wait)}
"""
SCRIPT_HASH = hashlib.sha1(SCRIPT.encode()).hexdigest()  # noqa: S324  the name that Redis gives to scripts

Client = Redis | RedisCluster
T = TypeVar("T")


class StoreAnswerError(Exception):
    """Redis answered something that is no answer to the question."""


@dataclass(frozen=True, slots=True)
class Question:
    """One call of the script, on its way."""

    number: int
    key: bytes
    limit: Limit
    ask: Ask


class RedisStore:
    """The shared buckets in Redis (a `gateway.meter.LeaseStore`). Works while `run()` does."""

    def __init__(self, url: str, *, rng: random.Random, observe: Observer) -> None:
        self._address = read_address(url)
        self._rng = rng
        self._observe = observe
        self.up = False
        self._told_up: bool | None = None
        self._replica = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._submitted: deque[Borrower] = deque()
        self._serving: list[Borrower] = []
        self._wake = asyncio.Event()
        self._probed = asyncio.Event()
        self._clients: list[Client] = []  # the one to use first, then those that find it
        self._is_outdated = False  # they were made with other certificates

    def submit(self, borrower: Borrower) -> None:
        if not self.up:
            borrower.answer(None)
            return
        self._submitted.append(borrower)
        self._wake.set()

    def renew_connection(self) -> None:
        """Other certificates are there: the next exchange is on a new connection. The library would keep the old."""
        self._is_outdated = True

    async def wait_probed(self) -> None:
        """Wait until it is known whether Redis is there: 100 ms or so from the start of `run()`, 500 with TLS."""
        await self._probed.wait()

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            while True:
                await self._wait_until_back()
                await self._serve_until_away()
        finally:
            self.up = False
            self._fail_waiting()
            await self._disconnect()

    # Away => Up, because a probe was answered

    async def _wait_until_back(self) -> None:
        while (reason := await self._probe()) is not None:
            self._change(up=False, reason=reason)
            await asyncio.sleep(PROBE_SECONDS * self._rng.uniform(0.75, 1.25))
        self._change(up=True, reason="answered")

    async def _probe(self) -> str | None:
        """None when Redis answers and lets us write, else what is wrong."""
        answers = await self._exchange([Question(next(self._numbers), PROBE_KEY, PROBE_LIMIT, PROBE)])
        return next((answer for answer in answers if isinstance(answer, str)), None)

    # Up => Away, because FAILURES exchanges in a row failed

    async def _serve_until_away(self) -> None:
        failed, reason = 0, ""
        while failed < FAILURES:
            if await self._is_asked():
                answers = await self._serve_batch()
                reason = next((answer for answer in answers if isinstance(answer, str)), "")
            else:  # so that its going away is known before somebody needs it
                reason = await self._probe() or ""
            failed = failed + 1 if reason else 0
        self._change(up=False, reason=reason)
        self._fail_waiting()

    async def _is_asked(self) -> bool:
        """Wait for a question; False when nobody has one for the time between two probes."""
        self._wake.clear()
        if not self._submitted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_SECONDS):
                    await self._wake.wait()
        return bool(self._submitted)

    async def _serve_batch(self) -> list[Grant | str]:
        self._serving = [self._submitted.popleft() for _ in range(min(BATCH, len(self._submitted)))]
        questions = [Question(next(self._numbers), each.key, each.limit, each.ask()) for each in self._serving]
        answers = await self._exchange(questions)
        serving, self._serving = self._serving, []
        for borrower, answer in zip(serving, answers, strict=True):
            borrower.answer(answer if isinstance(answer, Grant) else None)
        return answers

    def _fail_waiting(self) -> None:
        """Nobody will be answered any more."""
        waiting = [*self._serving, *self._submitted]
        self._serving = []
        self._submitted.clear()
        for borrower in waiting:
            borrower.answer(None)

    def _change(self, *, up: bool, reason: str) -> None:
        """The one door between the two states."""
        self.up = up
        self._probed.set()
        if up is not self._told_up:
            self._told_up = up
            self._observe(StoreChanged(up, reason))

    # One exchange

    async def _exchange(self, questions: list[Question]) -> list[Grant | str]:
        """A grant, or in a word or two what went wrong, for each question. A failure ends the connection."""
        answers: list[Grant | str]
        try:
            if self._is_outdated:
                self._is_outdated = False
                await self._disconnect()
            if not self._clients:
                await within(seconds_to_connect(self._address), self._connect())
            replies = await within(STORE_SECONDS, self._call(questions))
            answers = [read_reply(question, reply) for question, reply in zip(questions, replies, strict=True)]
        except CALL_FAILURES as error:
            answers = [reason_of(error)] * len(questions)
        if any(isinstance(answer, str) for answer in answers):
            await self._disconnect()
        return answers

    async def _connect(self) -> None:
        self._clients = open_clients(self._address)
        await self._clients[0].ping()

    async def _call(self, questions: list[Question]) -> list[Any]:
        """Each question's reply, or the exception that Redis answered with."""
        replies = await self._pipeline("EVALSHA", SCRIPT_HASH, questions)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, failures.NoScriptError)]
        if unknown:  # restarted, failed over, flushed: EVAL runs the script and makes Redis know it
            again = await self._pipeline("EVAL", SCRIPT, [questions[i] for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def _pipeline(self, command: str, script: str, questions: list[Question]) -> list[Any]:
        pipeline = self._clients[0].pipeline(transaction=False)
        for each in questions:
            arguments = script_arguments(each.key, self._replica, each.number, each.limit, each.ask)
            pipeline.execute_command(command, script, *arguments)
        return list(await pipeline.execute(raise_on_error=False))

    async def _disconnect(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            with contextlib.suppress(*CALL_FAILURES):
                await within(CLOSE_SECONDS, client.aclose())

    def __repr__(self) -> str:
        return f"<RedisStore {'up' if self.up else 'away'}, {len(self._submitted)} waiting>"


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when it takes longer: raises TimeoutError.

    It is waited for twice: a loop that was busy elsewhere finds the timer run out before it has read the answer that
    lies in the socket, and would call Redis slow.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_seen)  # also where it ends long after it was given up
    try:
        for share in (0.8, 0.2):
            if not task.done():
                await asyncio.wait({task}, timeout=seconds * share)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CLOSE_SECONDS)


def _seen(task: asyncio.Future[Any]) -> None:
    """Take note of how it ended: asyncio reports what nobody has asked."""
    if not task.cancelled():
        task.exception()


def script_arguments(key: bytes, replica: str, number: int, limit: Limit, ask: Ask) -> tuple[bytes | str | int, ...]:
    """What follows the script, or its hash, in a call of it. Of most questions the last four are left out."""
    rate = limit.rate
    is_usual = ask.least == 1 and not ask.reserved and not ask.told
    return (
        *(1, key, replica, number, ask.ack, ask.need, ask.spare, ask.held, ask.back, ask.debt, int(ask.quiet * MICRO)),
        *(limit.capacity, round(rate.count * MICRO), round(rate.seconds * MICRO), int(LEASE_SECONDS * MICRO)),
        *(() if is_usual else (ask.least, ask.reserved, ask.told, int(RESERVED_SECONDS * MICRO))),
    )


def read_reply(question: Question, reply: Any) -> Grant | str:
    """Raises StoreAnswerError when it answers something else: then nothing on this connection can be believed."""
    if isinstance(reply, Exception):
        return reason_of(reply)
    try:
        number, tokens, level, wait = (int(part) for part in reply)
    except (TypeError, ValueError):
        raise StoreAnswerError from None
    if number != question.number:
        raise StoreAnswerError
    return Grant(number, tokens, level / MICRO, wait / MICRO)


def reason_of(error: Exception) -> str:
    """What is wrong in a word or two. Never the library's text: it names hosts."""
    for kinds, reason in REASONS:
        if isinstance(error, kinds):
            return reason
    for word, reason in SCRIPT_REASONS:
        if word in str(error):
            return reason
    return f"refused: {type(error).__name__}"


def seconds_to_connect(address: Address) -> float:
    """How long connecting may take. No request waits for it."""
    return TLS_CONNECT_SECONDS if address.tls else CONNECT_SECONDS


def open_clients(address: Address) -> list[Client]:
    """Clients that have not connected yet: the one to use, then those that must be closed with it."""
    limits: dict[str, Any] = {
        "socket_connect_timeout": seconds_to_connect(address),
        "socket_timeout": seconds_to_connect(address),
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    login: dict[str, Any] = {"username": address.username, "password": address.password}
    tls: dict[str, Any] = {}
    if address.tls:
        tls = {"ssl": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2, **VERIFIED, **dict(address.tls_files)}
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.nodes]
        return [RedisCluster(startup_nodes=nodes, **limits, **login, **tls)]
    if address.kind == "sentinel":
        sentinel: Any = Sentinel(address.nodes, sentinel_kwargs={**limits, **tls}, **limits, **login, **tls)  # type: ignore[no-untyped-call]
        return [sentinel.master_for(address.service, db=address.database), *sentinel.sentinels]
    ((host, port),) = address.nodes
    return [Redis(host=host, port=port, db=address.database, **limits, **login, **tls)]


VERIFIED = {
    "ssl_cert_reqs": "required",
    "ssl_check_hostname": True,
}  # said, because the library's defaults have changed
PROBE_KEY = b"weir:v1:probe"
PROBE_LIMIT = Limit(1, Rate(1.0, 1.0))
PROBE = Ask(need=0, spare=0, held=0, back=1, debt=0, quiet=0.0, ack=0, sent_at=0.0)
"""Gives back a token that nobody took: it changes nothing, but it is written."""

# RuntimeError is what uvloop says to whoever writes to a connection that was reset while nobody used it.
CALL_FAILURES = (
    failures.RedisError,
    failures.RedisClusterException,
    OSError,
    RuntimeError,
    TimeoutError,
    StoreAnswerError,
)
REASONS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((TimeoutError, failures.TimeoutError), "timeout"),
    ((failures.ReadOnlyError,), "read-only"),
    ((failures.OutOfMemoryError,), "out of memory"),
    ((failures.BusyLoadingError,), "loading"),
    ((failures.AuthenticationError, failures.AuthorizationError, failures.NoPermissionError), "login refused"),
    ((StoreAnswerError,), "answered something else"),
    ((failures.ConnectionError, OSError, RuntimeError), "no connection"),
)
SCRIPT_REASONS = (("READONLY ", "read-only"), ("OOM ", "out of memory"))
"""Redis 6 wraps what a command in a script is answered into words of its own."""
