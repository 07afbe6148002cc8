"""One backend as discovery knows it. The wire format of a registration lives in this file only."""

from __future__ import annotations

from dataclasses import dataclass


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
    host: str  # as registered: goes into the Host header and TLS server name
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
