"""Which way a request goes: the first route that matches it, the plan its caller is under, the target within the route.

A `Router` is the routes of one policy, compiled: path and model are looked up by what their globs say literally, so
that a request is tried against the few routes that may match it and not against all. Of those the first in the file
wins. Paths and models are compared as they are: raw, exact case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import log
from random import Random
from re import Pattern
from typing import Final, Generic, TypeVar

from policies import errors
from policies.policy import Plan, Policy, Principal, Route, Target

# A glob as fnmatch.translate writes it: what it says literally, and what comes from its first `*` on.
_GLOB: Final = re.compile(
    r"\(\?s:((?:[^\\.^$*+?{}\[\]|()]|\\[^0-9A-Za-z])*)((?:[.\[(](?:[^\\|]|\\.)*)?)\)\\[Zz]", re.DOTALL
)
_MOST_KNOWN: Final = 1024  # clients choose what is asked for: what comes later is found the long way
_ANYTHING: Final = ".*"
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)

T = TypeVar("T")


class Router:
    """The routes of `policy`, ready to be asked."""

    __slots__ = ("_by_path", "_known")

    def __init__(self, policy: Policy) -> None:
        alike: dict[str | None, list[tuple[int, Route]]] = {}
        for numbered in enumerate(policy.routes):
            path = numbered[1].match.path
            alike.setdefault(None if path is None else path.pattern, []).append(numbered)
        self._by_path = _Index(
            (numbered[0][1].match.path, _Index((route.match.model, (number, route)) for number, route in numbered))
            for numbered in alike.values()
        )
        self._known: dict[tuple[str, str | None], Route] = {}  # found without looking at a header

    def route(self, path: str, model: str | None, header: Callable[[str], str | None]) -> Route:
        """Return the first route that matches. `header` returns a value by lower-case name.

        Raises NoRoute; ModelNotFound when routes have the path and none takes the model; BadRequest when each of them
        asks for a model and the request names none.
        """
        known = self._known.get((path, model))
        if known is not None:
            return known
        by_model = self._by_path.matching(path)
        if len(by_model) == 1:
            found = by_model[0].matching(model)
        else:
            found = sorted((numbered for index in by_model for numbered in index.matching(model)), key=_number)
        for place, (_, route) in enumerate(found):
            headers = route.match.headers
            if not headers:
                if not place and len(self._known) < _MOST_KNOWN:
                    self._known[path, model] = route
                return route
            if _has_headers(headers, header):
                return route
        if not by_model:
            raise errors.NoRoute("No route has this path.")
        if found:
            raise errors.NoRoute("No route takes a request with these headers.")
        if model is None:
            raise errors.BadRequest("The request names no model.", param="model")
        raise errors.ModelNotFound("No route serves this model.", param="model")

    def __repr__(self) -> str:
        return f"<Router by path {self._by_path!r}>"


def plan_of(policy: Policy, principal: Principal) -> Plan | None:
    """Return the plan of the first consumer rule that matches; None, which is no limits, when none does."""
    for rule in policy.consumers:
        if rule.any or rule.consumer == principal.consumer or rule.group in principal.groups:
            return policy.plans[rule.plan]
    return None


def pick_target(route: Route, rng: Random, consumer: str, has_backend: Callable[[Target], bool]) -> Target | None:
    """Return the target that gets the request, by weight among those that have a backend; None if none has.

    With `stick` it is the same one for the same consumer while the weights stand, in every replica. A weight that
    changes moves the consumers that it must and no others: the hash of consumer and target gives the moment at which
    the target comes, exponentially distributed with its weight as the rate, and the first to come wins (weighted
    rendezvous hashing: Schindelhauer and Schomaker, 2005).
    """
    able = [target for target in route.to if target.weight > 0 and has_backend(target)]
    if len(able) < 2:
        return able[0] if able else None
    if route.stick:
        return min(able, key=lambda target: _arrival(consumer, target.service, target.version) / target.weight)
    mark = rng.random() * sum([target.weight for target in able])
    for target in able[:-1]:
        mark -= target.weight
        if mark < 0:
            return target
    return able[-1]


class _Index(Generic[T]):
    """Values by glob: finds those whose glob matches a text, in the order given. None as a glob matches everything.

    Globs stand under the text that they begin with: a text is looked up once for each length that such beginnings have.
    """

    __slots__ = ("_globs", "_lengths", "_literals", "_unconditional", "_without")

    def __init__(self, entries: Iterable[tuple[Pattern[str] | None, T]]) -> None:
        self._unconditional: list[tuple[int, T]] = []
        self._globs: dict[str, list[tuple[int, T, Pattern[str] | None]]] = {}
        literals: dict[str, list[tuple[int, T]]] = {}
        for number, (pattern, value) in enumerate(entries):
            if pattern is None:
                self._unconditional.append((number, value))
                continue
            beginning, rest = _literally(pattern)
            if rest:
                self._globs.setdefault(beginning, []).append((number, value, None if rest == _ANYTHING else pattern))
            else:
                literals.setdefault(beginning, []).append((number, value))
        self._lengths = sorted({len(beginning) for beginning in self._globs})
        self._literals = {text: _in_order(these + self._search(text)) for text, these in literals.items()}
        self._without = _in_order(self._unconditional)

    def matching(self, text: str | None) -> Sequence[T]:
        """Return the values whose globs match; for None those without a glob."""
        if text is None:
            return self._without
        known = self._literals.get(text)
        if known is not None:
            return known
        return _in_order(self._search(text)) if self._lengths else self._without

    def _search(self, text: str) -> list[tuple[int, T]]:
        found = self._unconditional.copy()
        for length in self._lengths:
            if length > len(text):
                break
            for number, value, pattern in self._globs.get(text[:length], ()):
                if pattern is None or pattern.fullmatch(text):
                    found.append((number, value))
        return found

    def __repr__(self) -> str:
        return f"<_Index of {len(self._literals)} texts and {sum(map(len, self._globs.values()))} globs>"


def _number(numbered: tuple[int, T]) -> int:
    return numbered[0]


def _in_order(numbered: list[tuple[int, T]]) -> Sequence[T]:
    if len(numbered) > 1:
        numbered.sort(key=_number)
    return [value for _, value in numbered]


def _literally(pattern: Pattern[str]) -> tuple[str, str]:
    """Return the text that a glob begins with, and the expression for the rest.

    A pattern of another make gives no text and all of itself: that costs time at each request and changes no answer.
    """
    parts = _GLOB.fullmatch(pattern.pattern)
    if parts is None:
        return "", pattern.pattern
    return _ESCAPED.sub(r"\1", parts[1]), parts[2]


def _has_headers(wanted: Iterable[tuple[str, str]], header: Callable[[str], str | None]) -> bool:
    return all(header(name) == value for name, value in wanted)


@lru_cache(maxsize=4096)
def _arrival(consumer: str, service: str, version: str | None) -> float:
    """Return a number drawn from the hash of the names, exponentially distributed around 1."""
    names = "\n".join((consumer, service, version or ""))
    digest = blake2b(names.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -log(((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52)  # of 52 bits: never 0, never 1
