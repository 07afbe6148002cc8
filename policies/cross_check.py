"""What must be right between the sections of a policy: names that exist, names given once, entries that can be reached.

The checks read the tree and not the typed sections, so that a slip in one section hides none in another; what has not
the expected shape is passed over, for its own section reports it. Only what is certainly wrong is a problem.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator

from policies.problems import MAX_PROBLEMS, Problem, did_you_mean, dotted, shown
from policies.yaml_tree import Mapping, Node, Scalar, Sequence

_Conditions = tuple[str, str, frozenset[tuple[str, str | None]]]  # path, model, headers


def glob(text: str) -> re.Pattern[str]:
    """Compile a pattern in which `*` stands for any characters and everything else for itself; anchored at both ends.

    fnmatch writes each `*` as an atomic group: matching a hostile name takes no exponential time.
    """
    return re.compile(fnmatch.translate(re.sub(r"[\[?]", r"[\g<0>]", text)))


def cross_check(root: Node) -> Iterator[Problem]:
    """Yield what is wrong between the sections of a policy."""
    if not isinstance(root, Mapping):
        return
    checks = (
        _check_callers(root),
        _check_told_apart(root),
        _check_unique(root, "issuers", "issuer"),
        _check_unique(root, "routes", "name"),
        _check_consumers(root),
        _check_reachable(_items(root, "routes")),
    )
    yield from itertools.islice(itertools.chain.from_iterable(checks), MAX_PROBLEMS)


def _check_callers(root: Mapping) -> Iterator[Problem]:
    if not _has_issuers(root) and _text(root, "anonymous") != "true":
        message = "nobody could call: name an issuer under `issuers`, or say `anonymous: true`"
        yield Problem(root.line, root.column, "", message)


def _check_told_apart(root: Mapping) -> Iterator[Problem]:
    """Report what is decided by the consumer where all callers are the same one."""
    if _has_issuers(root):
        return
    for index, route in enumerate(_items(root, "routes")):
        for key, value in (("stick", "consumer"), ("balance", "hash:consumer")):
            node = route.get(key) if isinstance(route, Mapping) else None
            if isinstance(node, Scalar) and node.text == value:
                message = "would send everything one way: without `issuers` all callers are the consumer `anonymous`"
                yield Problem(node.line, node.column, dotted(("routes", index, key)), message)


def _has_issuers(root: Mapping) -> bool:
    issuers = root.get("issuers")
    return issuers is not None and (not isinstance(issuers, Sequence) or bool(issuers.items))


def _check_unique(root: Mapping, section: str, key: str) -> Iterator[Problem]:
    seen: dict[str, Node] = {}
    for index, item in enumerate(_items(root, section)):
        name = item.get(key) if isinstance(item, Mapping) else None
        if not isinstance(name, Scalar):
            continue
        first = seen.setdefault(name.text, name)
        if first is not name:
            message = f"{shown(name.text)} was already given on line {first.line}"
            yield Problem(name.line, name.column, dotted((section, index, key)), message)


def _check_consumers(root: Mapping) -> Iterator[Problem]:
    plans = root.get("plans")
    known = plans.entries if isinstance(plans, Mapping) else {}
    everybody: Node | None = None
    for index, item in enumerate(_items(root, "consumers")):
        plan = item.get("plan") if isinstance(item, Mapping) else None
        if isinstance(plan, Scalar) and plan.text not in known:
            hint = did_you_mean(plan.text, known)
            message = f"there is no plan {shown(plan.text)}{hint}"
            yield Problem(plan.line, plan.column, dotted(("consumers", index, "plan")), message)
        if everybody is not None:
            message = f"is never reached: the entry on line {everybody.line} matches everybody"
            yield Problem(item.line, item.column, dotted(("consumers", index)), message)
        elif isinstance(item, Mapping) and _matches_everybody(item.get("match")):
            everybody = item


def _matches_everybody(match: Node | None) -> bool:
    return isinstance(match, Mapping) and len(match.entries) == 1 and _text(match, "any") == "true"


def _check_reachable(routes: list[Node]) -> Iterator[Problem]:
    """Report the routes that an earlier one certainly leaves nothing for, in time linear in the routes."""
    first: dict[_Conditions, Node] = {}
    globs: set[str] = set()
    lengths: set[int] = set()  # of what stands before the `*` in those that end with one
    for index, route in enumerate(routes):
        conditions = _conditions(route)
        if conditions is None:
            continue
        earlier = next((first[wider] for wider in _wider(conditions, globs, lengths) if wider in first), None)
        if earlier is not None:
            message = f"is never reached: the route on line {earlier.line} matches everything that this one does"
            yield Problem(route.line, route.column, dotted(("routes", index)), message)
        first.setdefault(conditions, route)
        globs.update(conditions[:2])
        lengths.update(len(text) - 1 for text in conditions[:2] if text.endswith("*"))


def _conditions(route: Node) -> _Conditions | None:
    """Return what a route asks for, `*` where it does not ask; None where its section is wrong anyway."""
    if not isinstance(route, Mapping):
        return None
    match = route.get("match") or Mapping({}, route.line, route.column)
    if not isinstance(match, Mapping) or not match.entries.keys() <= {"path", "model", "header"}:
        return None
    header = match.get("header")
    names = header.entries if isinstance(header, Mapping) else {}
    headers = frozenset((name.lower(), _text(header, name)) for name in names)
    return _text(match, "path") or "*", _text(match, "model") or "*", headers


def _wider(conditions: _Conditions, known: set[str], lengths: set[int]) -> Iterator[_Conditions]:
    """Yield conditions that hold wherever these do: the same, a shorter beginning and `*`, no headers."""
    path, model, headers = conditions
    paths, models = _wider_globs(path, known, lengths), _wider_globs(model, known, lengths)
    return itertools.product(paths, models, (headers, frozenset()))


def _wider_globs(text: str, known: set[str], lengths: set[int]) -> list[str]:
    return [
        wide for wide in (text, *(f"{text[:length]}*" for length in lengths if length < len(text))) if wide in known
    ]


def _items(root: Mapping, section: str) -> list[Node]:
    node = root.get(section)
    return node.items if isinstance(node, Sequence) else []


def _text(node: Node | None, key: str) -> str | None:
    value = node.get(key) if isinstance(node, Mapping) else None
    return value.text if isinstance(value, Scalar) else None
