"""Who may use what: the `allow` list of a route, and the list of models that follows from all of them.

An entry about callers (group, consumer, scope) lets in whoever it names; with no such entry everybody is let in. An
entry about models lets them be asked for; with none every model is. Where both are given both must hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from policies import errors
from policies.policy import ANONYMOUS, EVERYBODY, Allow, Principal, Route

# Where a model of the list may be asked for. Of the last the name is left open: routes rarely have one in their path.
_PATHS: Final = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/images/generations",
    "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/messages", "/v2/models/any/infer",
)  # fmt: skip


def check(route: Route, principal: Principal, model: str | None) -> None:
    """Raise Unauthenticated if a token might help, Forbidden if none of this caller's will; else do nothing."""
    allow = route.allow
    if allow is EVERYBODY:
        return
    if not _admits(allow, principal):
        rule = f"routes.{route.name}.allow"
        if principal == ANONYMOUS:
            raise errors.Unauthenticated("This route needs a token.", rule=rule)
        raise errors.Forbidden("This caller may not use this route.", rule=rule)
    if allow.models and not _covers(allow, model):
        raise errors.Forbidden("This route may not be asked for this model.", rule=f"routes.{route.name}.allow")


def visible_models(routes: Iterable[Route], principal: Principal, offered: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return the names, sorted, of the models that this caller may ask for. `offered`: (service, name, version).

    That is: on some path of the API, with some headers, the first route that matches the model allows it and the
    caller, and has a target that serves it.
    """
    all_routes = tuple(routes)
    on_paths = {tuple(number for number, route in enumerate(all_routes) if _has_path(route, path)) for path in _PATHS}
    ways = [[all_routes[number] for number in numbers] for numbers in on_paths]
    places: dict[str, set[tuple[str, str]]] = {}
    for service, name, version in offered:
        places.setdefault(name, set()).add((service, version))
    return sorted(name for name, where in places.items() if any(_reaches(way, principal, name, where) for way in ways))


def _reaches(routes: Iterable[Route], principal: Principal, name: str, where: set[tuple[str, str]]) -> bool:
    """Whether a request for the model would be served by these routes, which all have its path."""
    for route in routes:
        pattern = route.match.model
        if pattern is not None and not pattern.fullmatch(name):
            continue
        if _is_allowed(route.allow, principal, name) and _serves(route, where):
            return True
        if not route.match.headers:  # else the caller may leave them out, and the next one decides
            return False
    return False


def _has_path(route: Route, path: str) -> bool:
    return route.match.path is None or route.match.path.fullmatch(path) is not None


def _is_allowed(allow: Allow, principal: Principal, model: str) -> bool:
    return _admits(allow, principal) and (not allow.models or _covers(allow, model))


def _serves(route: Route, where: set[tuple[str, str]]) -> bool:
    return any(
        target.service == service and target.version in (None, version)
        for target in route.to
        for service, version in where
    )


def _admits(allow: Allow, principal: Principal) -> bool:
    if not (allow.groups or allow.consumers or allow.scopes):
        return True
    return (
        principal.consumer in allow.consumers
        or not allow.groups.isdisjoint(principal.groups)
        or not allow.scopes.isdisjoint(principal.scopes)
    )


def _covers(allow: Allow, model: str | None) -> bool:
    return model is not None and any(pattern.fullmatch(model) for pattern in allow.models)
