"""Where Redis is, as an operator writes it.

    redis://[user:password@]host[:6379][/0]                                      one server
    redis+sentinel://[user:password@]host[:26379],host[:26379]/service[/0]       the login is Redis's, not Sentinel's
    redis+cluster://[user:password@]host[:6379],host[:6379]                      any of its nodes

With `rediss` in place of `redis` it is TLS; options after `?` name files: ssl_ca_certs, ssl_certfile, ssl_keyfile.
What stands in the login is percent-decoded. No message and no repr shows the login.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

URL = re.compile(
    r"(?P<scheme>rediss?)(?P<kind>\+sentinel|\+cluster)?://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^/?#@]+)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?"
)
NODE = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?")
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class RedisUrlError(ValueError):
    """A Redis URL that cannot be used. The message never shows the URL: it may hold a password."""


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis URL, read. `kind` is "" for one server, "sentinel" or "cluster"."""

    kind: str
    nodes: tuple[tuple[str, int], ...]
    tls: bool
    service: str
    database: int
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    tls_files: tuple[tuple[str, str], ...]


def read_address(url: str) -> Address:
    """Raises RedisUrlError."""
    found = URL.fullmatch(url)
    if found is None:
        raise RedisUrlError("this is no Redis URL; write redis://[user:password@]host:port/0, or rediss:// for TLS")
    kind = (found["kind"] or "").removeprefix("+")
    nodes = tuple(read_node(node, 26379 if kind == "sentinel" else 6379) for node in found["hosts"].split(","))
    if len(nodes) > 1 and not kind:
        raise RedisUrlError("several hosts need redis+sentinel:// or redis+cluster://")
    path = [unquote(part) for part in (found["path"] or "").split("/") if part]
    service = path.pop(0) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not service:
        raise RedisUrlError(
            "a redis+sentinel:// URL ends with the name of the service: redis+sentinel://host:26379/mymaster"
        )
    if kind == "cluster" and path:
        raise RedisUrlError("Redis Cluster has no numbered databases: take the path off the URL")
    if len(path) > 1 or not all(part.isdecimal() for part in path):
        raise RedisUrlError("the path of a Redis URL is the number of a database, such as /0")
    username, _, password = (found["login"] or "").partition(":")
    return Address(
        kind=kind,
        nodes=nodes,
        tls=found["scheme"] == "rediss",
        service=service,
        database=int(path[0]) if path else 0,
        username=unquote(username) or None,
        password=unquote(password) or None,
        tls_files=read_tls_files(found["query"], tls=found["scheme"] == "rediss"),
    )


def read_node(text: str, default_port: int) -> tuple[str, int]:
    found = NODE.fullmatch(text)
    if found is None or not 0 < int(found["port"] or default_port) < 65536:
        raise RedisUrlError("each host of a Redis URL is written host:port, an IPv6 address as [::1]:6379")
    return found["v6"] or found["host"], int(found["port"] or default_port)


def read_tls_files(query: str | None, *, tls: bool) -> tuple[tuple[str, str], ...]:
    options = tuple(parse_qsl(query or "", keep_blank_values=True))
    for name, _ in options:
        if name not in TLS_OPTIONS:
            raise RedisUrlError(f"a Redis URL takes these options: {', '.join(TLS_OPTIONS)}")
    if options and not tls:
        raise RedisUrlError("options for TLS need rediss:// in place of redis://")
    return options
