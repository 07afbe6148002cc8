"""weir.yaml in, one frozen Config out. Read once, at start; what may change while running is in the policy.

The same reading as a policy's: strict YAML, every problem at once, each with its place. Any value may be `${NAME}`: it
is replaced after the YAML was read, as plain text, so no variable can add keys. A section that is left out has the
defaults below. What is secret comes from files or the environment and is in no `repr`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gateway.config_fields import (
    Address,
    AllowedNetwork,
    File,
    FileOrNone,
    HttpUrl,
    HttpUrls,
    KeyPrefix,
    ListenAddress,
    OptionalText,
    PathFromHere,
    Port,
    RedisUrl,
    TokenFromFile,
)
from policies import yaml_tree
from policies.fields import Duration, Name, Positive, Share, Size, Text
from policies.problems import InvalidDocument, Problem, dotted, shown
from policies.problems import Path as FieldPath
from policies.typed_tree import Strict, read
from policies.yaml_tree import Entry, Node, Scalar, Sequence, Tree

KIB, MIB = 1 << 10, 1 << 20

DATA_ADDRESS, ADMIN_ADDRESS = Address("127.0.0.1", 8080), Address("127.0.0.1", 8081)
GRPC_ADDRESS = Address("127.0.0.1", 8082)
PRIVATE_NETWORKS = tuple(
    ip_network(text) for text in ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class AdminAuth(Strict):
    """What the admin listener asks for: `Authorization: Bearer TOKEN`."""

    token: Annotated[TokenFromFile, Field(alias="token_file")] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Admin(Strict):
    listen: ListenAddress = ADMIN_ADDRESS
    auth: AdminAuth | None = None

    def __post_init__(self) -> None:
        if self.auth is None and not self.listen.is_loopback:
            raise ValueError(f"{self.listen} can be reached from outside: set `auth`, or listen on 127.0.0.1")


@dataclass(frozen=True, slots=True)
class Grpc(Strict):
    """The listener for gRPC; without this section there is none."""

    listen: ListenAddress = GRPC_ADDRESS


@dataclass(frozen=True, slots=True)
class Tls(Strict):
    """TLS for clients, on both their listeners. With `client_ca`, they must show a certificate of these authorities."""

    cert: File
    key: File
    client_ca: FileOrNone = None


@dataclass(frozen=True, slots=True)
class BackendTls(Strict):
    """How https backends are spoken to. `ca` replaces the system's authorities; `cert` and `key` are what we show."""

    ca: FileOrNone = None
    cert: FileOrNone = None
    key: FileOrNone = None

    def __post_init__(self) -> None:
        _need_both(self.cert, self.key)


@dataclass(frozen=True, slots=True)
class PolicyPlace(Strict):
    """Where the policy is: a file, or the etcd key {prefix}/policies/{etcd}. Exactly one is set."""

    file: PathFromHere | None = None
    etcd: Name | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.etcd is None):
            raise ValueError("expected a file, or `{etcd: NAME}`")


def _place(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


PolicyPlaceOrFile = Annotated[PolicyPlace, BeforeValidator(_place)]


@dataclass(frozen=True, slots=True)
class Etcd(Strict):
    endpoints: HttpUrls
    prefix: KeyPrefix = "/weir/v1"
    username: OptionalText = ""
    password_file: FileOrNone = None
    ca: FileOrNone = None
    cert: FileOrNone = None
    key: FileOrNone = None

    def __post_init__(self) -> None:
        if bool(self.username) != (self.password_file is not None):
            raise ValueError("`username` and `password_file` go together")
        _need_both(self.cert, self.key)


def _need_both(cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise ValueError("`cert` and `key` go together")


@dataclass(frozen=True, slots=True)
class StaticBackend(Strict):
    """A backend that is known without etcd. `version` is that of each of its models, `grpc_port` of the url's host."""

    service: Name
    url: HttpUrl
    models: tuple[Text, ...] = ()
    version: OptionalText = ""
    weight: Positive = 1
    grpc_port: Port | None = None


@dataclass(frozen=True, slots=True)
class Discovery(Strict):
    """Where backends come from: exactly one of `etcd` and `static` is set."""

    etcd: Etcd | None = None
    static: tuple[StaticBackend, ...] | None = None
    allow_networks: tuple[AllowedNetwork, ...] = PRIVATE_NETWORKS
    tls: BackendTls | None = None

    def __post_init__(self) -> None:
        if (self.etcd is None) == (self.static is None):
            raise ValueError("expected exactly one of `etcd` and `static`")


@dataclass(frozen=True, slots=True)
class Redis(Strict):
    url: RedisUrl = field(repr=False)


@dataclass(frozen=True, slots=True)
class Telemetry(Strict):
    """`sample` is the share of requests whose trace is kept; errors, and what takes longer than `slow`, always are."""

    otlp: HttpUrl | None = None
    sample: Share = 0.01
    slow: Duration = 2.0
    log: Literal["json", "console"] = "json"


@dataclass(frozen=True, slots=True)
class Limits(Strict):
    """What one client may take: sizes in bytes, times in seconds. `idle` is between two requests."""

    body: Size = 32 * MIB
    header: Size = 32 * KIB
    head_timeout: Duration = 10.0
    body_timeout: Duration = 60.0
    idle: Duration = 75.0
    connections: Positive = 20_000


@dataclass(frozen=True, slots=True)
class Config(Strict):
    """Everything the process is told at start. `workers` processes share the port; each is one more replica."""

    policy: PolicyPlaceOrFile
    discovery: Discovery
    listen: ListenAddress = DATA_ADDRESS
    admin: Admin = Admin()
    grpc: Grpc | None = None
    tls: Tls | None = None
    workers: Positive = 1
    redis: Redis | None = None
    telemetry: Telemetry = Telemetry()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        listeners = {"listen": self.listen, "admin.listen": self.admin.listen}
        if self.grpc is not None:
            listeners["grpc.listen"] = self.grpc.listen
        for (one, here), (other, there) in combinations(listeners.items(), 2):
            if here == there and here.port:
                raise ValueError(f"`{one}` and `{other}` are both {here}")
        if self.policy.etcd is not None and self.discovery.etcd is None:
            raise ValueError("`policy: {etcd: ...}` needs `discovery.etcd`, which says where etcd is")


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Return what the file says, with `${NAME}` out of `environ`.

    Raises OSError when the file cannot be read, InvalidDocument when it does not say what it should.
    """
    return parse(path.read_bytes(), environ, base=path.absolute().parent)


def parse(text: bytes, environ: Mapping[str, str], *, base: Path) -> Config:
    """Return what the text says; files in it are relative to `base`. Raises InvalidDocument."""
    try:
        tree = yaml_tree.compose(text)
    except InvalidDocument as invalid:
        raise InvalidDocument(_explain_braces(invalid.problems, text)) from None
    problems: list[Problem] = []
    root = _expand(tree.root, environ, (), problems)
    config, found = read(Tree(root, (*tree.problems, *problems)), Config, context={"base": base})
    if config is None or found:
        raise InvalidDocument(found)
    return config


def _expand(node: Node, environ: Mapping[str, str], path: FieldPath, problems: list[Problem]) -> Node:
    """Return a copy with the variables in every value replaced; adds a problem for each that is not set."""
    if isinstance(node, Scalar):
        unset = [name for name in _VARIABLE.findall(node.text) if name not in environ]
        problems.extend(
            Problem(node.line, node.column, dotted(path), f"the environment variable {shown(name)} is not set")
            for name in unset
        )
        return replace(node, text=_VARIABLE.sub(lambda match: environ.get(match[1], match[0]), node.text))
    if isinstance(node, Sequence):
        items = [_expand(item, environ, (*path, index), problems) for index, item in enumerate(node.items)]
        return replace(node, items=items)
    entries = {
        key: Entry(entry.key, _expand(entry.value, environ, (*path, key), problems))
        for key, entry in node.entries.items()
    }
    return replace(node, entries=entries)


def _explain_braces(problems: Iterable[Problem], text: bytes) -> Iterator[Problem]:
    """Add to a syntax error what most often is behind it."""
    lines = text.splitlines()
    for problem in problems:
        line = lines[problem.line - 1] if problem.line <= len(lines) else b""
        hint = '; inside [] or {} a variable needs quotes: "${NAME}"' if b"${" in line else ""
        yield replace(problem, message=problem.message + hint)
