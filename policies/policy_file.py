"""What may stand in a policy.yaml: its keys, their types, and what each is for.

The descriptions go into the JSON Schema, for people who write policies in an editor. A key whose effect does not exist
yet is not declared: it is refused, never accepted and ignored. What concerns one section alone is checked here; what
ties sections together is in `policies/cross_check.py`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from policies import policy
from policies.fields import Count, Duration, Flag, Header, Name, OneOrMany, Positive, Rate, Share, Text
from policies.policy_fields import BALANCE_WORDS, Algorithm, AllowEntry, Balance, Jwks, PathGlob, Version
from policies.typed_tree import Section


class ClaimsSection(Section):
    consumer: Text = Field(default="sub", description="Claim that names the consumer (default `sub`).")
    groups: Text = Field(default="groups", description="Claim that lists the consumer's groups (default `groups`).")


class IssuerSection(Section):
    """Who may sign tokens."""

    issuer: Text = Field(description="The `iss` of its tokens, compared exactly.")
    audience: OneOrMany = Field(description="What `aud` must hold; one, or a list of which one is enough.")
    algorithms: list[Algorithm] = Field(
        min_length=1, description="Signatures that are accepted, whatever a token says of itself."
    )
    jwks: Jwks = Field(description="Its keys: an http(s) URL, or a file (relative to this one).")
    claims: ClaimsSection = Field(default=ClaimsSection(), description="Which claims name the consumer and its groups.")


class PlanSection(Section):
    """How much one consumer may send."""

    LATER: ClassVar = frozenset({"budget", "weight"})

    requests: Rate | None = Field(
        default=None, description="Requests per second, minute, hour, day or month (30 days)."
    )
    burst: Positive | None = Field(
        default=None,
        description="Requests that may come at once after a pause. Default: what one period allows, but no more than "
        "what a minute allows, and at least 1.",
    )
    tokens: Rate | None = Field(
        default=None,
        description="Tokens of language models, of prompts and answers together. What one period allows may be used "
        "at once after a pause; no single request may use more.",
    )
    concurrency: Positive | None = Field(default=None, description="Requests in flight at one time.")
    priority: Literal["high", "normal", "low"] | None = Field(
        default=None,
        description="How urgent its requests are where they wait in a backend that asks (header `x-weir-priority`).",
    )
    when_store_is_down: Literal["share", "open", "closed"] = Field(
        default="share",
        description="While Redis is away: `share` the limit among the gateways (default), `open` without limit, "
        "`closed` to refuse.",
    )

    @model_validator(mode="after")
    def _needs_requests(self) -> PlanSection:
        if self.burst is not None and self.requests is None:
            raise ValueError("`burst` does nothing without `requests`")
        return self


class ConsumerMatch(Section):
    """Exactly one of the three."""

    group: Text | None = Field(default=None, description="A group in the caller's token.")
    consumer: Text | None = Field(default=None, description="The caller's name; without a token it is `anonymous`.")
    any: Flag | None = Field(default=None, description="`true`: everybody.")

    @model_validator(mode="after")
    def _exactly_one(self) -> ConsumerMatch:
        if self.any is False:
            raise ValueError("`any: false` matches nobody: write `any: true`, a `group` or a `consumer`")
        if sum(value is not None for value in (self.group, self.consumer, self.any)) != 1:
            raise ValueError("expected exactly one of `group`, `consumer` and `any`")
        return self


class ConsumerSection(Section):
    match: ConsumerMatch = Field(description="Whom the plan is for.")
    plan: Name = Field(description="One of `plans`.")


class MatchSection(Section):
    path: PathGlob | None = Field(default=None, description="The request's path; `*` stands for any characters.")
    model: Text | None = Field(default=None, description="The request's model; `*` stands for any characters.")
    header: dict[Header, Text] = Field(default={}, description="Headers that must have exactly these values.")

    @field_validator("header", mode="before")
    @classmethod
    def _name_once(cls, header: object) -> object:
        if isinstance(header, dict) and len({str(name).lower() for name in header}) < len(header):
            raise ValueError("names the same header twice: upper and lower case are the same")
        return header


class TargetSection(Section):
    LATER: ClassVar = frozenset({"rollback"})

    service: Name = Field(description="A service in discovery.")
    version: Text | None = Field(
        default=None, description="Only backends with this version of the model. Default: any."
    )
    weight: Count = Field(default=1, description="Share of the requests, relative to the other weights (default 1).")


class TimeoutSection(Section):
    connect: Duration = Field(default=policy.Timeouts().connect, description="To connect to a backend (default 1s).")
    first_byte: Duration = Field(
        default=policy.Timeouts().first_byte, description="To the answer's first byte (default 30s)."
    )
    idle: Duration = Field(default=policy.Timeouts().idle, description="Between two pieces of an answer (default 60s).")
    total: Duration = Field(
        default=policy.Timeouts().total, description="For the whole request, retries too (default 10m)."
    )


class RetrySection(Section):
    attempts: Positive = Field(
        default=policy.RetryRule().attempts, description="Backends tried at most, the first one included (default 2)."
    )
    budget: Share = Field(
        default=policy.RetryRule().budget, description="Retries at most, as a share of the requests (default 20%)."
    )
    idempotent: Flag = Field(
        default=policy.RetryRule().idempotent,
        description="`true`: a request may run twice, so those that broke midway are retried too (default `false`).",
    )


class BreakerSection(Section):
    failures: Share = Field(
        default=policy.BreakerRule().failures, description="Share of failures that opens it (default 50%)."
    )
    of_at_least: Positive = Field(
        default=policy.BreakerRule().of_at_least,
        description="Outcomes to judge by (default 20); when so many in a row failed it opens whatever the share.",
    )
    window: Duration = Field(
        default=policy.BreakerRule().window, description="How far back outcomes count (default 10s)."
    )
    open: Duration = Field(default=policy.BreakerRule().open, description="Rest before it is tried again (default 5s).")
    probes: Positive = Field(default=policy.BreakerRule().probes, description="Requests that try it (default 3).")
    eject_at_most: Share = Field(
        default=policy.BreakerRule().eject_at_most,
        description="Share of a service that may be open at once (default 50%).",
    )

    @field_validator("failures")
    @classmethod
    def _some(cls, failures: float) -> float:
        if not failures:
            raise ValueError("must be more than 0%: at 0% it would be open always")
        return failures


class RouteSection(Section):
    """One way through the gateway. The first route that matches decides."""

    LATER: ClassVar = frozenset({"queue", "cache", "hedge", "fallback", "guard"})

    name: Name = Field(description="Its name in metrics, traces and the console.")
    match: MatchSection = Field(default=MatchSection(), description="Requests it is for. Default: all.")
    allow: list[AllowEntry] | None = Field(
        default=None,
        description="Who may use it: any of the groups, consumers and scopes, for any of the models. "
        "Default: everybody, for all models.",
    )
    to: list[TargetSection] = Field(description="Where it sends; several share the requests by weight.")
    stick: Literal["consumer"] | None = Field(default=None, description="Keeps a consumer on one of the targets.")
    balance: Balance = Field(
        default=policy.Balance(),
        description=f"How a backend is chosen: {', '.join(BALANCE_WORDS)} (default least_load).",
    )
    timeout: TimeoutSection = Field(default=TimeoutSection(), description="How long each phase may take.")
    retry: RetrySection = Field(
        default=RetrySection(), description="When another backend is tried. Never after the first byte."
    )
    breaker: BreakerSection = Field(default=BreakerSection(), description="When a backend that fails is left alone.")

    @field_validator("allow")
    @classmethod
    def _allow_somebody(cls, allow: list[tuple[str, str]] | None) -> list[tuple[str, str]] | None:
        if allow == []:
            raise ValueError("is empty and would let nobody in: remove it to let everybody in")
        return allow

    @field_validator("to")
    @classmethod
    def _to_somewhere(cls, to: list[TargetSection]) -> list[TargetSection]:
        if not sum(target.weight for target in to):
            raise ValueError("needs at least one target with a weight above 0")
        if len({(target.service, target.version) for target in to}) < len(to):
            raise ValueError("names the same service and version twice")
        return to


class PolicyFile(Section):
    """Weir policy: who may send how much to which backends."""

    LATER: ClassVar = frozenset({"api_keys"})

    version: Version = Field(description="The version of this format: 1.")
    issuers: list[IssuerSection] = Field(default=[], description="Who may sign callers' tokens.")
    anonymous: Flag = Field(
        default=False,
        description="`true`: callers without a token are served, as the consumer `anonymous` (default `false`).",
    )
    plans: dict[Name, PlanSection] = Field(default={}, description="How much a consumer may send, by name of the plan.")
    consumers: list[ConsumerSection] = Field(
        default=[], description="Who is on which plan. The first that matches decides."
    )
    routes: list[RouteSection] = Field(min_length=1, description="Where requests go. The first that matches decides.")
