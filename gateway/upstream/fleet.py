"""All backends in service, as groups to choose from: who serves this model of this service, and may be asked now.

Discovery and health checks change the fleet; requests only read it. A backend whose registration did not change keeps
its connections, breakers and counts. Groups are made when first asked for and thrown away at every change: a request
finds its candidates by one dictionary lookup.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Final

from discovery.endpoint import Endpoint
from gateway.certificates import system_context
from gateway.upstream.endpoint import Backend, Lease
from gateway.upstream.load_report import LoadReport
from policies import errors
from policies.balance import Chooser, panic
from policies.breaker import State, may_eject
from policies.policy import BreakerRule, Route, Target
from policies.prefix import Chain

_UNLISTED: Final = "\0"  # stands for all models that no registration names, so that clients cannot invent groups


Groups = dict[tuple[str, str | None, str | None], "Group"]


class Group:
    """Backends that are alike for a request: same service, version, model, and way to ask them.

    `usable` leaves those out that are unhealthy where they are asked.
    """

    __slots__ = ("chooser", "panicking", "serving", "usable")

    def __init__(self, serving: tuple[Backend, ...], over_grpc: bool) -> None:
        self.serving = serving
        told = [(backend, backend.grpc_healthy if over_grpc else backend.healthy) for backend in serving]
        healthy = tuple(backend for backend, is_healthy in told if is_healthy)
        probed = tuple(backend for backend, is_healthy in told if is_healthy is not None)
        # With most of them unhealthy it is likelier that the checks are wrong than that so few can carry it all
        self.panicking = panic(len(healthy), len(probed)) or not healthy
        self.usable = healthy if not self.panicking else probed if healthy else serving
        self.chooser = Chooser(self.usable)


class Fleet:
    """One writer (discovery and health), many readers (requests)."""

    def __init__(
        self,
        clock: Callable[[], float],
        rng: Random,
        on_breaker: Callable[[Backend, State], None],
        tls: Callable[[], ssl.SSLContext] = system_context,
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._tls = tls
        self._tell_breaker = on_breaker
        self.backends: dict[str, Backend] = {}
        self._groups: Groups = {}
        self._grpc_groups: Groups = {}  # of those that speak gRPC
        self._models: frozenset[str] = frozenset()
        self._services: frozenset[str] = frozenset()
        self._versions: frozenset[str] = frozenset()
        self._open_breakers = 0

    def __repr__(self) -> str:
        return f"<Fleet backends={len(self.backends)} open_breakers={self._open_breakers}>"

    # What discovery tells

    def replace(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Take in a whole new snapshot."""
        now = self._clock()
        for key in self.backends.keys() - endpoints.keys():
            self.backends.pop(key).close()
        for key, endpoint in endpoints.items():
            old = self.backends.get(key)
            if old is None or not old.adopt(endpoint):
                if old is not None:
                    old.close()
                self.backends[key] = Backend(endpoint, now, self._rng, self._breaker_changed, self._tls)
        self._changed()

    def note_health(self, key: str, healthy: bool) -> None:
        """A health check has changed its mind, or made it up for the first time."""
        backend = self.backends.get(key)
        if backend is None or backend.healthy is healthy:
            return
        if healthy:
            backend.since = self._clock()
        backend.healthy = healthy
        self._groups = {}

    def note_grpc_health(self, key: str, healthy: bool) -> None:
        """The same for its gRPC port."""
        backend = self.backends.get(key)
        if backend is not None:
            backend.grpc_healthy = healthy
            self._grpc_groups = {}

    def hear_header(self, key: str, value: bytes) -> None:
        """A health check brought a load report along."""
        backend = self.backends.get(key)
        if backend is not None:
            backend.hear_header(value, self._clock())

    def hear_load(self, key: str, report: LoadReport, seconds: float) -> bool:
        """A backend has told its load, which counts for so long. False: it is gone, or newer is known."""
        backend = self.backends.get(key)
        return backend is not None and backend.hear_load(report, self._clock(), seconds)

    def forget_load(self, key: str) -> None:
        """A backend that tells its load has fallen silent."""
        backend = self.backends.get(key)
        if backend is not None:
            backend.forget_load(self._clock())

    def tidy(self) -> None:
        """To be called each second or so."""
        now = self._clock()
        for backend in self.backends.values():
            backend.tidy(now)

    def renew_connections(self) -> None:
        """Others are believed, or another certificate is shown: no new request on what was connected before."""
        for backend in self.backends.values():
            if backend.endpoint.scheme == "https":
                backend.renew_connections()

    def keep_breakers(self, rules: Iterable[BreakerRule]) -> None:
        """A new policy is in force: forget the breakers under other rules, which nobody would close any more."""
        keys = {rule.key for rule in rules}
        for backend in self.backends.values():
            backend.keep_breakers(keys)
        self._count_open()

    def close(self) -> None:
        """Close all idle connections."""
        for backend in self.backends.values():
            backend.close()

    def _changed(self) -> None:
        self._groups, self._grpc_groups = {}, {}
        endpoints = [backend.endpoint for backend in self.backends.values()]
        self._models = frozenset(model.name for endpoint in endpoints for model in endpoint.models)
        self._versions = frozenset(model.version for endpoint in endpoints for model in endpoint.models)
        self._services = frozenset(endpoint.service for endpoint in endpoints)
        self._count_open()

    def _breaker_changed(self, backend: Backend, state: State) -> None:
        if state is State.CLOSED:
            backend.since = self._clock()  # it comes back slowly
        self._count_open()
        self._tell_breaker(backend, state)

    def _count_open(self) -> None:
        self._open_breakers = sum(backend.has_open_breaker for backend in self.backends.values())

    # What requests ask

    def known_model(self, name: str | None) -> str:
        """The name if some backend serves it, else "other": safe as a label and in a log."""
        return name if name in self._models else "other"

    def offered(self) -> Iterable[tuple[str, str, str]]:
        """(service, model, version) of every backend that serves."""
        for backend in self.backends.values():
            if not backend.endpoint.draining:
                for model in backend.endpoint.models:
                    yield backend.endpoint.service, model.name, model.version

    def group(
        self, target: Target, model: str | None, asked_version: str | None = None, over_grpc: bool = False
    ) -> Group | None:
        """Who can serve this; None when nobody does. Unhealthy ones are in it, draining ones are not."""
        version = target.version or asked_version
        if asked_version is not None and version != asked_version:
            return None
        groups = self._grpc_groups if over_grpc else self._groups
        group = groups.get((target.service, version, model))
        if group is None:
            group = self._group_of(target.service, version, model, over_grpc)
        return group if group is not None and group.serving else None

    def _group_of(self, service: str, version: str | None, model: str | None, over_grpc: bool) -> Group | None:
        """The group, made and remembered, unless for a version that nobody has: clients invent them without end."""
        if version is not None and version not in self._versions:
            return None
        if model is not None and model not in self._models:
            model = _UNLISTED
        key = (service, version, model)
        groups = self._grpc_groups if over_grpc else self._groups
        group = groups.get(key)
        if group is None:
            serving = (
                b
                for b in self.backends.values()
                if not b.endpoint.draining and not (over_grpc and b.endpoint.grpc_port is None)
            )
            group = Group(tuple(b for b in serving if _offers(b.endpoint, service, model, version)), over_grpc)
            if group.serving or version is None:
                groups[key] = group
        return group

    def missing(
        self, route: Route, model: str | None, version: str | None = None, over_grpc: bool = False
    ) -> errors.Refusal:
        """Why no target of a route has a backend for this model. One that only drains will be back: that is no 404."""
        if over_grpc and any(self.group(target, model, version) is not None for target in route.to):
            return errors.NoBackend(
                "No backend of this route speaks gRPC: none is registered with a `grpc_port`.",
                rule=f"routes.{route.name}.to",
            )
        if (
            model is None
            or not any(target.service in self._services for target in route.to)
            or any(
                _offers(backend.endpoint, target.service, model, target.version or version)
                for target in route.to
                for backend in self.backends.values()
                if backend.endpoint.draining
            )
        ):
            return errors.NoBackend("No backend is in service for this route.", rule=f"routes.{route.name}.to")
        return errors.ModelNotFound("No backend of this route serves the model.", param="model")

    def lease(self, group: Group, route: Route, tried: tuple[Backend, ...], hash_key: str, chain: Chain = ()) -> Lease:
        """Balance and guard: choose a backend and own a place in it, in one step without waiting.

        Raises CircuitOpen when breakers keep all of them shut, Overloaded when all are full, NoBackend when every one
        has been tried.
        """
        now = self._clock()
        rule = route.breaker
        refused: tuple[Backend, ...] = tried
        if self._open_breakers:
            refused += tuple(b for b in group.usable if not b.breaker(rule).is_available(now))
        backend = group.chooser.choose(route.balance, self._rng, now, hash_key, refused, chain)
        if backend is None:
            raise self._no_choice(group, route, tried, refused, now)
        breaker = backend.breaker(rule)
        return Lease(
            backend, breaker, breaker.enter(now), self._clock, lambda failing: self._may_open(group, failing, route)
        )

    def _no_choice(
        self, group: Group, route: Route, tried: tuple[Backend, ...], refused: tuple[Backend, ...], now: float
    ) -> errors.Refusal:
        if any(backend not in refused for backend in group.usable):
            return errors.Overloaded("Every backend of this route is at its limit of requests.", retry_after=1.0)
        shut = [backend for backend in group.usable if backend not in tried]
        if shut:
            after = min(backend.breaker(route.breaker).retry_after(now) for backend in shut)
            rule = f"routes.{route.name}.breaker"
            return errors.CircuitOpen(
                "The backends of this route keep failing; they are being left alone.", rule=rule, retry_after=after
            )
        return errors.NoBackend("No backend of this route could be reached.", retry_after=1.0)

    def _may_open(self, group: Group, failing: Backend, route: Route) -> bool:
        rule = route.breaker
        others = [b for b in group.serving if b is not failing]
        open_now = sum(not b.breaker(rule).is_closed for b in others)
        return may_eject(open_now, len(group.serving), rule.eject_at_most)


def _offers(endpoint: Endpoint, service: str, model: str | None, version: str | None) -> bool:
    if endpoint.service != service:
        return False
    if not endpoint.models:
        return version is None
    return any(
        (model is None or offered.name == model) and (version is None or offered.version == version)
        for offered in endpoint.models
    )
