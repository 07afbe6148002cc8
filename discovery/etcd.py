"""The one door to etcd: its gRPC stubs in, our own few types and errors out.

aetcd's generated stubs are used without aetcd's client: its watcher hides cancellation, compaction and the end of
the stream. What holds here:

- An `EtcdClient` has one channel at a time. A call that ends badly closes it, and the next call opens one to the next
  endpoint: a frozen connection, a dead member and a member without a leader are all left the same way. So whoever
  holds a client holds it alone, and one user's trouble is not another's.
- Every call has a deadline and asks for a member that has a leader (`hasleader`): without that a watch on a member
  cut off from its cluster stays silent for ever (etcd-io/etcd#10819).
- Messages of up to 16 MiB are taken and listings are read in pages that shrink when one does not fit, so no value
  that etcd takes (1.5 MiB) can stop a listing; a watch asks etcd to split what is long.
- Certificates are asked for, and the password is read from its file, at each connection, so that renewed ones are used.
  Nothing here puts either, or a token, into a message.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

# gRPC reads it when it is loaded. We fork only to run another program at once, for which gRPC needs to do nothing;
# what it would do instead closes descriptors of calls that are under way, and says so on stderr at each fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# What goes wrong comes as an error, which we tell; what gRPC writes to stderr beside it is not our log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from aetcd import rpc

from discovery.source import Changes, Compacted, Deleted, KeyValue, LeaseLost, Listing, SourceFailure, Unavailable

CALL_TIMEOUT: Final = 5.0
LIST_TIMEOUT: Final = 20.0  # for one page
PAGE_KEYS: Final = 1000

_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    # etcd ends connections that ping more often than each 5 s (--grpc-keepalive-min-time).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    # A new channel means a new connection now: no subchannel shared with the old one, no backoff of gRPC's own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)

# What etcd says when a token has expired, was never sent, or predates a change of users.
_TOKEN_TROUBLE: Final = ("invalid auth token", "user name is empty", "revision in header is old", "auth store is old")

Call = Callable[..., Awaitable[Any]]


class Credentials(NamedTuple):
    """PEM: whom we believe (None: gRPC's own list), and what we show."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where etcd is and who we are there. With `username`, `password_file` holds the password.

    `tls` gives the credentials of the next connection to an https endpoint.
    """

    endpoints: tuple[str, ...]  # http://host:port or https://host:port
    username: str = ""
    password_file: Path | None = None
    tls: Callable[[], Credentials] = Credentials


class EtcdClient:
    """A connection to one of the endpoints, replaced by one to the next when it fails. To be held by one user."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._index = 0
        self._channel: rpc.Channel | None = None
        self._token: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "idle" if self._channel is None else "open"
        return f"<EtcdClient {self._settings.endpoints[self._index]} {state}>"

    async def close(self) -> None:
        """Ends the connection and whatever runs on it. The client may be used again."""
        channel, self._channel, self._token = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Puts the key, bound to the lease unless that is 0, and returns the revision. Raises LeaseLost."""
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease)
        response = await self.call(lambda channel: rpc.KVStub(channel).Put, request)
        return int(response.header.revision)

    async def delete(self, key: str) -> None:
        await self.call(lambda channel: rpc.KVStub(channel).DeleteRange, rpc.DeleteRangeRequest(key=key.encode()))

    async def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds."""
        response = await self.call(lambda channel: rpc.LeaseStub(channel).LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl))
        return int(response.ID)

    async def keep_alive(self, lease: int) -> float:
        """Renews the lease once and returns the seconds it now has. Raises LeaseLost."""
        response = await self.call(_keep_alive_once, rpc.LeaseKeepAliveRequest(ID=lease))
        if response.TTL <= 0:  # an answer without a TTL is how etcd says that there is no such lease
            raise LeaseLost("etcd does not know the lease")
        return float(response.TTL)

    async def revoke(self, lease: int) -> None:
        """Ends the lease and deletes its keys."""
        await self.call(lambda channel: rpc.LeaseStub(channel).LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease))

    async def call(self, method: Callable[[rpc.Channel], Call], request: Any, timeout: float = CALL_TIMEOUT) -> Any:  # noqa: ASYNC109  it is gRPC's own deadline
        """One request, one answer; a token that etcd no longer takes is renewed once."""
        try:
            return await self._attempt(method, request, timeout)
        except _TokenRefused:
            self._token = None
        try:
            return await self._attempt(method, request, timeout)
        except _TokenRefused as error:
            raise Unavailable(str(error)) from error

    async def open_watch(self, request: rpc.WatchRequest) -> _WatchCall:
        """A watch stream with its first request sent."""
        channel = self._open_channel()
        try:
            stream = rpc.WatchStub(channel).Watch(metadata=await self._metadata(channel))
            await stream.write(request)
        except BaseException as error:
            raise await self._translated(error) from error
        return _WatchCall(self, stream)

    async def _attempt(self, method: Callable[[rpc.Channel], Call], request: Any, seconds: float) -> Any:
        channel = self._open_channel()
        try:
            metadata = await self._metadata(channel)
            return await method(channel)(request, timeout=seconds, metadata=metadata)
        except BaseException as error:
            raise await self._translated(error) from error

    def _open_channel(self) -> rpc.Channel:
        if self._channel is None:
            self._channel = _connect(self._settings, self._settings.endpoints[self._index])
        return self._channel

    async def _metadata(self, channel: rpc.Channel) -> tuple[tuple[str, str], ...]:
        leader = ("hasleader", "true")
        if not self._settings.username:
            return (leader,)
        if self._token is None:
            self._token = await self._authenticate(channel)
        return (leader, ("token", self._token))

    async def _authenticate(self, channel: rpc.Channel) -> str:
        file = self._settings.password_file
        password = _read(file).decode().rstrip("\r\n") if file else ""
        request = rpc.AuthenticateRequest(name=self._settings.username, password=password)
        answer = await rpc.AuthStub(channel).Authenticate(request, timeout=CALL_TIMEOUT)
        return str(answer.token)

    async def _translated(self, error: BaseException) -> BaseException:
        """Our error for theirs. Leaves the endpoint when another may do better; anything else goes through as it is."""
        if isinstance(error, asyncio.CancelledError):
            # gRPC cancels the calls of a channel that is closed; only a cancelled task is really cancelled.
            task = asyncio.current_task()
            return error if task is None or task.cancelling() else Unavailable("the connection was closed")
        if isinstance(error, SourceFailure):
            await self._leave()
            return error
        if not isinstance(error, rpc.AioRpcError):
            return error
        ours = _ours(error, self._settings.endpoints[self._index])
        if isinstance(ours, Unavailable):
            await self._leave()
        return ours

    async def _leave(self) -> None:
        await self.close()
        self._index = (self._index + 1) % len(self._settings.endpoints)


class EtcdSource:
    """Everything under a prefix. Values longer than `max_value` are cut one byte past it."""

    def __init__(self, client: EtcdClient, prefix: str, max_value: int) -> None:
        self._client = client
        self._prefix = prefix.encode()
        self._end = _prefix_end(self._prefix)
        self._max_value = max_value

    def __repr__(self) -> str:
        return f"<EtcdSource {self._prefix.decode()} {self._client!r}>"

    async def list(self) -> Listing:
        """Everything under the prefix at one revision, read in pages."""
        items: list[KeyValue] = []
        start, revision, limit = self._prefix, 0, PAGE_KEYS
        while True:
            request = rpc.RangeRequest(key=start, range_end=self._end, limit=limit, revision=revision)
            try:
                page = await self._client.call(lambda channel: rpc.KVStub(channel).Range, request, LIST_TIMEOUT)
            except _TooLarge as error:
                if limit == 1:
                    raise Unavailable(str(error)) from error
                limit = max(1, limit // 8)
                continue
            items.extend(self._key_value(each) for each in page.kvs)
            revision = revision or page.header.revision
            if not page.more:
                return Listing(revision, page.header.cluster_id, tuple(items))
            start = page.kvs[-1].key + b"\0"

    async def watch(self, revision: int) -> AsyncGenerator[Changes, None]:
        create = rpc.WatchCreateRequest(
            key=self._prefix, range_end=self._end, start_revision=revision, progress_notify=True, fragment=True
        )
        async with await self._client.open_watch(rpc.WatchRequest(create_request=create)) as responses:
            async for response in responses:
                yield Changes(tuple(self._event(each) for each in response.events))

    async def ping(self) -> int:
        request = rpc.RangeRequest(
            key=self._prefix,
            range_end=self._end,
            limit=1,
            keys_only=True,
            sort_order=rpc.RangeRequest.DESCEND,
            sort_target=rpc.RangeRequest.MOD,
        )
        newest = await self._client.call(lambda channel: rpc.KVStub(channel).Range, request)
        return int(newest.kvs[0].mod_revision) if newest.kvs else 0

    def _event(self, event: rpc.Event) -> KeyValue | Deleted:
        if event.type == rpc.Event.DELETE:
            return Deleted(self._relative(event.kv.key), event.kv.mod_revision)
        return self._key_value(event.kv)

    def _key_value(self, kv: rpc.KeyValue) -> KeyValue:
        return KeyValue(self._relative(kv.key), kv.value[: self._max_value + 1], kv.mod_revision)

    def _relative(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode(errors="backslashreplace")


class _WatchCall:
    """The answers of one watch, until it breaks: it never ends without an error."""

    def __init__(self, client: EtcdClient, stream: Any) -> None:
        self._client = client
        self._stream = stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stream.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            response = await self._stream.read()
            if response is grpc.aio.EOF:
                raise Unavailable("etcd ended the watch")  # noqa: TRY301  it takes the same way as all the others
            if response.canceled:
                raise _watch_ended(response)  # noqa: TRY301
        except BaseException as error:
            raise await self._client._translated(error) from error  # noqa: SLF001  the call is a part of the client
        return response


class _TokenRefused(SourceFailure):
    """etcd wants another token."""


class _TooLarge(SourceFailure):
    """The answer is longer than a message may be."""


def _watch_ended(response: Any) -> SourceFailure:
    if response.compact_revision:
        return Compacted(f"history before revision {response.compact_revision} is gone")
    return Unavailable(f"etcd ended the watch: {response.cancel_reason}")


def _ours(error: rpc.AioRpcError, endpoint: str) -> SourceFailure:
    """Errors of etcd are gRPC codes with a fixed text (etcd, api/v3rpc/rpctypes/error.go)."""
    code, text = error.code(), error.details() or ""
    if any(trouble in text for trouble in _TOKEN_TROUBLE):
        return _TokenRefused(text)
    if "compacted" in text:
        return Compacted(text)
    if "requested lease not found" in text:
        return LeaseLost(text)
    if code is rpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text.lower():
        return _TooLarge(text)
    return Unavailable(f"{endpoint}: {code.name.lower()}: {text[:300]}")


def _keep_alive_once(channel: rpc.Channel) -> Call:
    async def call(request: rpc.LeaseKeepAliveRequest, timeout: float, metadata: tuple[tuple[str, str], ...]) -> Any:  # noqa: ASYNC109  the shape of a stub
        stream = rpc.LeaseStub(channel).LeaseKeepAlive(timeout=timeout, metadata=metadata)
        try:
            await stream.write(request)
            answer = await stream.read()
        finally:
            stream.cancel()
        if answer is grpc.aio.EOF:
            raise Unavailable("etcd ended the keep-alive")
        return answer

    return call


def _connect(settings: EtcdSettings, endpoint: str) -> rpc.Channel:
    parts = urlsplit(endpoint)
    if parts.scheme != "https":
        return rpc.insecure_channel(parts.netloc, options=_CHANNEL_OPTIONS)
    ca, cert, key = settings.tls()
    credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
    return rpc.secure_channel(parts.netloc, credentials, options=_CHANNEL_OPTIONS)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error


def _prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
