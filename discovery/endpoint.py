"""One backend as discovery knows it. The wire format of a registration lives in this file only.

A registration is hostile input: whoever may write to etcd may write anything. It becomes an Endpoint in two steps.
`decode` is pure: it reads key and value and refuses whatever does not say plainly where a backend is. What it returns
is a Candidate, an endpoint but for its address. Whoever has resolved the host and checked the address against the
allowed networks pins it with `Candidate.at`; from then on nothing is resolved again, so a name that later points
elsewhere (DNS rebinding) moves nothing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Final, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

DEFAULT_PREFIX: Final = "/weir/v1"  # backends are found under {prefix}/backends/{service}/{id}
MAX_VALUE_BYTES: Final = 64 * 1024
DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_URL_TEXT = re.compile(r"[!-~]{1,2048}")  # urlsplit drops tabs and line ends without a word
_BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~/?&=,:@+-]{0,255}")
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
                       r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*")  # fmt: skip
# A last label that is a number makes resolvers read the whole as an IPv4 address: 2130706433 and 0x7f.1 are
# 127.0.0.1 to getaddrinfo (https://url.spec.whatwg.org/#ends-in-a-number-checker).
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a backend serves."""

    name: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A vetted registration. `address` is the IP that was checked against `allow_networks`: nothing else is dialled.

    `key` is "service/id" and names the backend everywhere inside the gateway. Equal endpoints are the same backend
    unchanged: it keeps its pool, breaker and counts.
    """

    key: str
    service: str
    id: str
    scheme: str  # http | https
    host: str  # as registered: goes into the Host header and TLS server name; IPv6 without brackets
    port: int
    address: str  # resolved and pinned
    base_path: str = ""  # path part of the registered url, without a trailing slash
    protocols: tuple[str, ...] = ("openai",)
    models: tuple[Model, ...] = ()
    weight: int = 1
    zone: str = ""
    draining: bool = False
    max_concurrency: int | None = None
    health_path: str | None = None
    load_path: str | None = None
    grpc_port: int | None = None  # of the same host, spoken to as `scheme` says; None: it speaks no gRPC
    grpc_health: str | None = None  # the service whose health is asked for there; None: all that it serves

    @property
    def authority(self) -> str:
        """What goes into the Host header: the port only where the scheme does not imply it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class InvalidRegistration(ValueError):  # noqa: N818  it is a verdict on data, not an error of the program
    """A registration that is ignored. The message says which field is wrong and how."""


class ModelEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One element of `models`."""

    name: str
    version: str = ""


class Registration(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a key under `/weir/v1/backends/`, as written. Unknown fields are ignored.

    Making one checks nothing; `decode` does.
    """

    url: str
    protocols: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)] = ("openai",)
    models: Annotated[tuple[ModelEntry, ...], msgspec.Meta(max_length=256)] = ()
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    zone: str = ""
    state: Literal["serving", "draining"] = "serving"
    max_concurrency: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    health: str | None = None  # path of the active health check; absent: the protocol's own
    load: str | None = None  # path at which it pushes reports of its load; absent: it does not
    grpc_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None  # where the url's host speaks gRPC
    grpc_health: str | None = None  # the service that grpc.health.v1 is asked for there; absent: ""

    def drained(self) -> Registration:
        """The same backend, telling that it wants no new requests."""
        return msgspec.structs.replace(self, state="draining")


_decoder = msgspec.json.Decoder(Registration)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A registration that reads well; its host is not resolved yet."""

    _endpoint: Endpoint  # its address is only a placeholder
    literal: Address | None  # what the host is, unless it is a name

    @property
    def key(self) -> str:
        return self._endpoint.key

    @property
    def host(self) -> str:
        return self._endpoint.host

    def at(self, address: str) -> Endpoint:
        """The endpoint, pinned to an address that was checked."""
        return replace(self._endpoint, address=address)


def encode(registration: Registration) -> bytes:
    return msgspec.json.encode(registration)


def decode(key: str, value: bytes) -> Candidate:
    """Vets the registration found under `key` ("service/id").

    Raises InvalidRegistration, and nothing else, whatever the bytes are.
    """
    service, name = _names(key)
    wire = _parse(value)
    url = _split(wire.url)
    host, literal = _host(url)
    return Candidate(
        Endpoint(
            key=key,
            service=service,
            id=name,
            scheme=url.scheme,
            host=host,
            port=_port(url),
            address="",
            base_path=_base_path(url),
            protocols=tuple(_sane_name(f"protocols[{i}]", each) for i, each in enumerate(wire.protocols)),
            models=tuple(_model(i, each) for i, each in enumerate(wire.models)),
            weight=wire.weight,
            zone=_sane_name("zone", wire.zone) if wire.zone else "",
            draining=wire.state == "draining",
            max_concurrency=wire.max_concurrency,
            health_path=_plain_path("health", wire.health),
            load_path=_plain_path("load", wire.load),
            grpc_port=wire.grpc_port,
            grpc_health=None if wire.grpc_health is None else _printable("grpc_health", wire.grpc_health),
        ),
        literal,
    )


def id_of_place(url: str) -> str:
    """An id for the backend at this URL: always the same one, so that registered twice it is one.

    Clients read ids (`x-weir-backend`) and must not learn addresses from them: there are so few addresses that the
    preimage of a fast hash is found by trying all, so it is a slow one, of some 10 ms.
    """
    place = url.partition("://")[2].rstrip("/")
    return hashlib.scrypt(place.encode(), salt=b"weir: id of a place", n=2**12, r=8, p=1, dklen=6).hex()


def literal_address(host: str) -> Address | None:
    """The address that `host` is, or None when it is a name. An IPv4 address inside IPv6 is told as IPv4."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _names(key: str) -> tuple[str, str]:
    service, slash, name = key.partition("/")
    if not slash:
        raise InvalidRegistration("key: expected backends/{service}/{id}")
    return _sane_name("key: service", service), _sane_name("key: id", name)


def _sane_name(where: str, text: str) -> str:
    if not _NAME.fullmatch(text) or text in {".", ".."}:
        raise InvalidRegistration(f"{where}: expected 1 to 128 characters of A-Z a-z 0-9 . _ -")
    return text


def _parse(value: bytes) -> Registration:
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidRegistration(f"value: longer than {MAX_VALUE_BYTES // 1024} KiB")
    try:
        return _decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRegistration(f"value: {error}") from error
    except RecursionError as error:
        raise InvalidRegistration("value: nested too deeply") from error


def _split(url: str) -> SplitResult:
    if not _URL_TEXT.fullmatch(url):
        raise InvalidRegistration("url: expected 1 to 2048 printable ASCII characters without spaces")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidRegistration(f"url: {error}") from error
    if parts.scheme not in DEFAULT_PORTS:
        raise InvalidRegistration("url: expected http:// or https://")
    if "@" in parts.netloc:
        raise InvalidRegistration("url: must not carry a user or password")
    if "?" in url or "#" in url:
        raise InvalidRegistration("url: must not have a query or a fragment")
    return parts


def _host(url: SplitResult) -> tuple[str, Address | None]:
    """The host, and the address that it is."""
    host = url.hostname or ""
    if "[" in url.netloc and ":" not in host:
        raise InvalidRegistration("url: only an IPv6 address stands in brackets")
    if "%" in host:
        raise InvalidRegistration("url: an IPv6 zone id means another thing on each machine")
    literal = literal_address(host)
    if literal is not None:
        return str(literal), literal
    if not _DNS_NAME.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise InvalidRegistration("url: the host is neither an IP address nor a DNS name")
    return host, None


def _port(url: SplitResult) -> int:
    try:
        port = url.port
    except ValueError:
        port = 0
    if port == 0:
        raise InvalidRegistration("url: the port must be a number from 1 to 65535")
    return DEFAULT_PORTS[url.scheme] if port is None else port


def _base_path(url: SplitResult) -> str:
    if not _BASE_PATH.fullmatch(url.path) or {".", ".."} & set(url.path.split("/")):
        raise InvalidRegistration("url: the path may hold only plain segments of A-Z a-z 0-9 . _ ~ -")
    return url.path.rstrip("/")


def _model(index: int, entry: ModelEntry) -> Model:
    for field, text in (("name", entry.name), ("version", entry.version)):
        _printable(f"models[{index}].{field}", text)
    if not entry.name:
        raise InvalidRegistration(f"models[{index}].name: must not be empty")
    return Model(entry.name, entry.version)


def _printable(where: str, text: str) -> str:
    if len(text) > 200 or not text.isprintable():
        raise InvalidRegistration(f"{where}: expected at most 200 printable characters")
    return text


def _plain_path(field: str, path: str | None) -> str | None:
    if path is not None and not _PLAIN_PATH.fullmatch(path):
        raise InvalidRegistration(f"{field}: expected a path such as /health")
    return path
