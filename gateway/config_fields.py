"""The types of the values that only a weir.yaml has: addresses, networks, URLs, files and what is secret in them.

Relative files are relative to weir.yaml (the validation context's `base`). A file that is named must be there and
readable when the process starts: the message then has a line, and not a traceback an hour later.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ValidationInfo

from gateway import redis_url, regular_file
from policies.fields import one_or_more, parse_text, reader
from policies.problems import kind_of, shown

Network = IPv4Network | IPv6Network

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9_.-]+)):(?P<port>[0-9]{1,5})")
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener binds. Port 0 takes any free one."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether certainly nobody outside this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(
            f"{shown(text)} is not an address: expected HOST:PORT, such as `127.0.0.1:8080` or `[::1]:8080`"
        )
    return Address(match["six"] or match["host"], int(match["port"]))


def parse_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{shown(text)} is not a port: expected a number from 1 to 65535")
    return int(text)


def parse_network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a network: expected one such as `10.0.0.0/8` or `::1`") from None


def parse_http_url(text: str) -> str:
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if re.search("//[^/?#]*@", text) or ("@" in text and not usable):  # URLs are shown: in messages, logs, the console
        raise ValueError("a URL must not carry a user or password")
    if not usable:
        raise ValueError(f"{shown(text)} is not an http(s) URL")
    return text


def parse_prefix(text: str) -> str:
    """Return what etcd keys begin with."""
    if not re.fullmatch(r"(?:/[A-Za-z0-9._-]+)+", text):
        raise ValueError(f"{shown(text)} is not a prefix: expected one such as `/weir/v1`")
    return text


def parse_redis_url(text: str) -> str:
    """Return the URL. It may hold a password, so no message repeats it."""
    redis_url.read_address(text)
    return text


def _resolve(value: object, info: ValidationInfo) -> Path:
    """Return an absolute path. Symlinks stay: what they point at may be swapped later."""
    if not isinstance(value, str):
        raise ValueError(f"expected a file, found {kind_of(value)}")  # noqa: TRY004  pydantic's contract
    context: Any = info.context
    base: Path = context["base"]
    return (base / parse_text(value)).absolute()


def _open_file(value: object, info: ValidationInfo) -> Path:
    path = _resolve(value, info)
    try:
        regular_file.read(path, 0)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return path


def _open_file_or_none(value: object, info: ValidationInfo) -> Path | None:
    return None if value == "" else _open_file(value, info)


def _read_token(value: object, info: ValidationInfo) -> str:
    path = _open_file(value, info)
    token = path.read_text(errors="replace").strip()
    if len(token) < _SHORTEST_TOKEN or not re.fullmatch("[\x21-\x7e]+", token):
        raise ValueError(
            f"{path} must hold one token of at least {_SHORTEST_TOKEN} printable characters, without spaces"
        )
    return token


Port = Annotated[int, reader(parse_port, "a port")]
ListenAddress = Annotated[Address, reader(parse_address, "an address")]
AllowedNetwork = Annotated[Network, reader(parse_network, "a network")]
HttpUrl = Annotated[str, reader(parse_http_url, "an http(s) URL")]
HttpUrls = Annotated[tuple[HttpUrl, ...], BeforeValidator(one_or_more)]
KeyPrefix = Annotated[str, reader(parse_prefix, "a prefix")]
RedisUrl = Annotated[str, reader(parse_redis_url, "a Redis URL")]
OptionalText = Annotated[str, reader(str, "text")]
PathFromHere = Annotated[Path, BeforeValidator(_resolve)]
File = Annotated[Path, BeforeValidator(_open_file)]
FileOrNone = Annotated[Path | None, BeforeValidator(_open_file_or_none)]
TokenFromFile = Annotated[str, BeforeValidator(_read_token)]
