"""Who may use what: the `allow` list of a route, and the list of models that follows from all of them.

An entry about callers (group, consumer, scope) lets in whoever it names; with no such entry everybody is let in. An
entry about models lets them be asked for; with none every model is. Where both are given both must hold.
"""

from __future__ import annotations

from collections.abc import Iterable

from policies import errors
from policies.policy import ANONYMOUS, Allow, Principal, Route


def check(route: Route, principal: Principal, model: str | None) -> None:
    """Raise Unauthenticated if a token might help, Forbidden if none of this caller's will; else do nothing."""
    allow = route.allow
    if not _admits(allow, principal):
        rule = f"routes.{route.name}.allow"
        if principal == ANONYMOUS:
            raise errors.Unauthenticated("This route needs a token.", rule=rule)
        raise errors.Forbidden("This caller may not use this route.", rule=rule)
    if allow.models and not _covers(allow, model):
        raise errors.Forbidden("This route may not be asked for this model.", rule=f"routes.{route.name}.allow")


def visible_models(routes: Iterable[Route], principal: Principal, offered: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return the names, sorted, of the models that this caller may ask for. `offered`: (service, name, version).

    That is: some route matches the model, allows it and the caller, and has a target that serves it.
    """
    to_service: dict[str, list[tuple[Route, str | None]]] = {}
    for route in routes:
        if _admits(route.allow, principal):
            for target in route.to:
                to_service.setdefault(target.service, []).append((route, target.version))
    return sorted(
        {name for service, name, version in set(offered) if _has_way(to_service.get(service, ()), name, version)}
    )


def _has_way(ways: Iterable[tuple[Route, str | None]], name: str, version: str) -> bool:
    return any(wanted in (None, version) and _takes(route, name) for route, wanted in ways)


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


def _takes(route: Route, model: str) -> bool:
    pattern = route.match.model
    if pattern is not None and not pattern.fullmatch(model):
        return False
    return not route.allow.models or _covers(route.allow, model)
