"""Certificates, read from files and kept up to date while connections go on.

Each use of TLS (what clients are shown; how backends, etcd and Redis are spoken to) has its `Certificates`. They read
their files each 0.4 s and compare the bytes, as the policy's file is read and for the same reasons. What is new is
tried in a context of its own and put in force whole: new handshakes get it, open connections keep what they have. What
cannot be used changes nothing and is told once, until the files change again.

OpenSSL reads certificate and key by their paths, after us. So the files are read once more when it is done: were they
swapped meanwhile, the result counts for nothing and the next look begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from gateway import regular_file
from gateway.redis_url import read_address
from observability.events import CertificatesRead, Observer
from policies.identity import InvalidKeys, certificate_expiry

if TYPE_CHECKING:
    from gateway.config import Config

POLL_SECONDS: Final = 0.4
SETTLE_SECONDS: Final = 0.1
MAX_BYTES: Final = 1024 * 1024


class InvalidCertificates(Exception):  # noqa: N818  a verdict on files; the message is one line: which, and what is wrong
    """Files that cannot be used for TLS."""


@dataclass(frozen=True, slots=True)
class Files:
    """`cert` and `key` are what we show, `ca` whom we believe; a client without it believes the system."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold."""

    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = None


Make = Callable[[Files, Pem], ssl.SSLContext]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Certificates that can be used. `expires_at` is Unix seconds; None where only authorities are named."""

    context: ssl.SSLContext
    pem: Pem
    expires_at: float | None


class Certificates:
    """The certificates of one use: `context` is what the next handshake gets. `start` comes before everything else."""

    def __init__(
        self,
        use: str,
        files: Files,
        make: Make,
        observe: Observer,
        wall: Callable[[], float],
        *,
        poll: float = POLL_SECONDS,
        settle: float = SETTLE_SECONDS,
    ) -> None:
        self.use = use
        self._files = files
        self._make = make
        self._observe = observe
        self._wall = wall
        self._poll = poll
        self._settle = settle
        self._loaded: Loaded | None = None
        self._seen: Pem | str = ""  # what was judged last; a text: why there was nothing to judge
        self._news = asyncio.Event()
        self._subscribers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Certificates {self.use} {'in force' if self._loaded else 'unread'}>"

    @property
    def in_force(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError("no certificate was read yet: await start() first")
        return self._loaded

    def context(self) -> ssl.SSLContext:
        """For the next handshake. Never changed once it is in force."""
        return self.in_force.context

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call back when others have come in force. The callback must not wait."""
        self._subscribers.append(callback)

    def reload(self) -> None:
        """Judge the files now and anew, changed or not, and tell the observer: what SIGHUP asks for."""
        self._seen = ""
        self._news.set()

    async def start(self) -> None:
        """Read them for the first time. Raises InvalidCertificates. One that has expired is used, and told."""
        pem = await asyncio.to_thread(_read, self._files)
        if isinstance(pem, str):
            raise InvalidCertificates(pem)
        self._seen = pem
        self._put_in_force(await asyncio.to_thread(_load, self._files, pem, self._make))

    async def run(self) -> NoReturn:
        """Keep them up to date until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll):
                    await self._news.wait()
            self._news.clear()
            pem = await asyncio.to_thread(_read, self._files)
            if pem != self._seen:
                await asyncio.sleep(
                    self._settle
                )  # cert and key are two files: whoever swaps them may be between the two
                await self._judge(pem)

    async def _judge(self, pem: Pem | str) -> None:
        """Put them in force, or keep what is and say why. What has changed meanwhile waits for the next look."""
        loaded, refusal = None, ""
        if isinstance(pem, str):
            refusal = pem
        else:
            try:
                loaded = await asyncio.to_thread(_load, self._files, pem, self._make)
            except InvalidCertificates as invalid:
                refusal = str(invalid)
        if await asyncio.to_thread(_read, self._files) != pem:
            return
        self._seen = pem
        if loaded is not None and self._has_expired(loaded) and not self._has_expired(self.in_force):
            refusal = f"{self._files.cert} has expired"
        if loaded is None or refusal:
            self._observe(CertificatesRead(self.use, "refused", refusal))
        else:
            self._put_in_force(loaded)

    def _put_in_force(self, loaded: Loaded) -> None:
        """The same bytes as before keep the same context: whoever resumes a session can go on doing so."""
        if self._loaded is None or loaded.pem != self._loaded.pem:
            self._loaded = loaded
            for callback in self._subscribers:
                callback()
        reason = f"{self._files.cert} has expired" if self._has_expired(loaded) else ""
        self._observe(CertificatesRead(self.use, "ok", reason, _date(loaded.expires_at)))

    def _has_expired(self, loaded: Loaded) -> bool:
        return loaded.expires_at is not None and loaded.expires_at <= self._wall()


def named_in(config: Config) -> list[tuple[str, str, Files]]:
    """What a weir.yaml names: use, the key that names it, files."""
    tls, backends, etcd, redis = config.tls, config.discovery.tls, config.discovery.etcd, config.redis
    named = []
    if tls is not None:
        named.append(("listener", "tls", Files(tls.cert, tls.key, tls.client_ca)))
    if backends is not None:
        named.append(("backends", "discovery.tls", Files(backends.cert, backends.key, backends.ca)))
    if etcd is not None and (etcd.ca or etcd.cert):
        named.append(("etcd", "discovery.etcd", Files(etcd.cert, etcd.key, etcd.ca)))
    if redis is not None and (options := dict(read_address(redis.url).tls_files)):
        names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
        named.append(("redis", "redis.url", Files(*[Path(options[n]) if n in options else None for n in names])))
    return named


def server_context(files: Files, pem: Pem) -> ssl.SSLContext:
    """What clients are shown. With `ca`, who has no certificate of it is not let in. Raises InvalidCertificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load_pair(context, files, pem)
    if pem.ca is not None:
        _load_authorities(context, files, pem.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: Files, pem: Pem) -> ssl.SSLContext:
    """How others are spoken to: their certificate must name the host, and come from `ca` or whom the system believes.

    Raises InvalidCertificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies, names too, unless told otherwise
    _harden(context)
    if files.cert is not None or files.key is not None:
        _load_pair(context, files, pem)
    if pem.ca is not None:
        _load_authorities(context, files, pem.ca)
    else:
        context.load_default_certs()
    return context


@cache
def system_context() -> ssl.SSLContext:
    """For backends where weir.yaml says nothing. One for all: reading the system's authorities takes milliseconds."""
    return client_context(Files(), Pem())


def _harden(context: ssl.SSLContext) -> None:
    """Made without `ssl.create_default_context`, which would also write session keys wherever SSLKEYLOGFILE says."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])


def _load_pair(context: ssl.SSLContext, files: Files, pem: Pem) -> None:
    if files.cert is None or files.key is None or pem.cert is None or pem.key is None:
        raise InvalidCertificates("a certificate and its key go together")
    if b"-----BEGIN CERTIFICATE-----" not in pem.cert:
        raise InvalidCertificates(f"{files.cert} holds no certificate in PEM form")
    if b"PRIVATE KEY-----" not in pem.key:
        raise InvalidCertificates(f"{files.key} holds no private key in PEM form")
    if b"ENCRYPTED" in pem.key:
        raise InvalidCertificates(
            f"{files.key} is encrypted; give the key without a passphrase, readable to Weir alone"
        )
    try:
        context.load_cert_chain(files.cert, files.key, password="")  # without one OpenSSL would ask on the terminal
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidCertificates(f"{files.key} is not the key of {files.cert}") from None
        raise InvalidCertificates(f"{files.cert} with {files.key}: {_reason(error)}") from None


def _load_authorities(context: ssl.SSLContext, files: Files, ca: bytes) -> None:
    try:
        context.load_verify_locations(cadata=ca.decode("ascii", "ignore"))  # comments in a bundle may be in any script
    except (ssl.SSLError, ValueError) as error:
        raise InvalidCertificates(f"{files.ca} holds no certificates in PEM form ({_reason(error)})") from None


def _load(files: Files, pem: Pem, make: Make) -> Loaded:
    """Raises InvalidCertificates. For a thread: it reads and computes."""
    context = make(files, pem)
    try:
        expires_at = certificate_expiry(pem.cert) if pem.cert is not None else None
    except InvalidKeys as invalid:
        raise InvalidCertificates(f"{files.cert}: {invalid}") from None
    return Loaded(context, pem, expires_at)


def _read(files: Files) -> Pem | str:
    """What the files hold, or which one cannot be read."""
    try:
        return Pem(_bytes_of(files.cert), _bytes_of(files.key), _bytes_of(files.ca))
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _bytes_of(path: Path | None) -> bytes | None:
    return None if path is None else regular_file.read(path, MAX_BYTES)


def _reason(error: Exception) -> str:
    """OpenSSL's own word, without the line of C that it happened in."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
