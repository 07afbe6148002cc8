"""policy.yaml in, one frozen Policy out: the only place where the text of a policy gets its meaning.

text -> tree with positions (`yaml_tree`) -> sections with types (`typed_tree`, `policy_file`) -> checks across sections
(`cross_check`) -> Policy. A document is accepted whole or refused whole, and a refusal lists everything that could be
found, each with its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from policies import policy
from policies.cross_check import cross_check, glob
from policies.policy_file import BreakerSection, IssuerSection, PlanSection, PolicyFile, RouteSection
from policies.problems import InvalidDocument
from policies.typed_tree import read
from policies.yaml_tree import compose

BURST_SECONDS = 60.0


def parse(text: str | bytes, *, base: Path) -> policy.Policy:
    """Return the policy that a document means. Files it names are relative to `base`; none is opened.

    Raises InvalidDocument with every problem found, whatever the document holds.
    """
    tree = compose(text)
    document, problems = read(tree, PolicyFile)
    problems.extend(cross_check(tree.root))
    if document is None or problems:
        raise InvalidDocument(problems)
    return _compile(document, _version(text), base)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy.yaml, for editors."""
    schema = PolicyFile.model_json_schema(schema_generator=_SchemaForPeople)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


class _SchemaForPeople(GenerateJsonSchema):
    """Without nulls, which a policy never holds, and without defaults in inner units: the descriptions tell them."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: object) -> bool:
        del schema
        return False


def _version(text: str | bytes) -> str:
    raw = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(raw).hexdigest()[:12]


def _compile(document: PolicyFile, version: str, base: Path) -> policy.Policy:
    return policy.Policy(
        version=version,
        issuers=tuple(_issuer(section, base) for section in document.issuers),
        anonymous=document.anonymous,
        plans=MappingProxyType({name: _plan(name, section) for name, section in document.plans.items()}),
        consumers=tuple(
            policy.ConsumerRule(entry.plan, entry.match.group, entry.match.consumer, bool(entry.match.any))
            for entry in document.consumers
        ),
        routes=tuple(_route(section) for section in document.routes),
    )


def _issuer(section: IssuerSection, base: Path) -> policy.Issuer:
    jwks = section.jwks if "://" in section.jwks else str((base / section.jwks).absolute())
    claims = policy.Claims(section.claims.consumer, section.claims.groups)
    return policy.Issuer(section.issuer, tuple(section.audience), tuple(section.algorithms), jwks, claims)


def _plan(name: str, section: PlanSection) -> policy.Plan:
    return policy.Plan(
        name=name,
        requests=section.requests,
        burst=section.burst or _default_burst(section.requests),
        tokens=section.tokens,
        token_burst=1 if section.tokens is None else max(1, int(section.tokens.count)),
        concurrency=section.concurrency,
        priority=section.priority,
        when_store_is_down=policy.WhenStoreIsDown(section.when_store_is_down),
    )


def _default_burst(rate: policy.Rate | None) -> int:
    """Return what one period allows, no more than a minute allows, at least 1."""
    return 1 if rate is None else max(1, int(min(rate.count, rate.per_second * BURST_SECONDS)))


def _route(section: RouteSection) -> policy.Route:
    match = section.match
    return policy.Route(
        name=section.name,
        match=policy.Match(
            path=None if match.path is None else glob(match.path),
            model=None if match.model is None else glob(match.model),
            headers=tuple(match.header.items()),
        ),
        to=tuple(policy.Target(target.service, target.version, target.weight) for target in section.to),
        allow=_allow(section.allow) if section.allow else policy.EVERYBODY,
        stick=section.stick is not None,
        balance=section.balance,
        timeout=policy.Timeouts(**dict(section.timeout)),
        retry=policy.RetryRule(**dict(section.retry)),
        breaker=_breaker(section.breaker),
    )


def _allow(entries: Iterable[tuple[str, str]]) -> policy.Allow:
    names: dict[str, list[str]] = {"group": [], "consumer": [], "scope": [], "model": []}
    for kind, name in entries:
        names[kind].append(name)
    return policy.Allow(
        groups=frozenset(names["group"]),
        consumers=frozenset(names["consumer"]),
        scopes=frozenset(names["scope"]),
        models=tuple(glob(name) for name in names["model"]),
    )


def _breaker(section: BreakerSection) -> policy.BreakerRule:
    values = dict(section)
    return policy.BreakerRule(**values, key=" ".join(f"{name}={value:g}" for name, value in values.items()))
