"""The types of values that only a policy.yaml has: how each is read from text, with the sentence when it cannot be."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from policies import policy
from policies.fields import parse_header, parse_text, pattern, reader
from policies.problems import did_you_mean, shown

BALANCE_WORDS = ("round_robin", "least_load", "peak_ewma", "prefix", "hash:consumer", "hash:header:NAME")
ALLOW_WORDS = ("group", "consumer", "scope", "model")


def _parse_version(text: str) -> str:
    if text != "1":
        raise ValueError(f"{shown(text)} is not a version this Weir reads: expected `1`")
    return text


def _parse_balance(text: str) -> policy.Balance:
    if text.startswith("hash:header:"):
        return policy.Balance(policy.BalanceKind.HASH, parse_header(text.removeprefix("hash:header:")))
    if text == "hash:consumer":
        return policy.Balance(policy.BalanceKind.HASH)
    if text not in BALANCE_WORDS[:4]:
        raise ValueError(f"unknown value {shown(text)}{did_you_mean(text, BALANCE_WORDS) or _expected(BALANCE_WORDS)}")
    return policy.Balance(policy.BalanceKind(text))


def _parse_path(text: str) -> str:
    if not text.startswith(("/", "*")) or "?" in text or "#" in text:
        raise ValueError(f"{shown(text)} is not a path: it begins with `/`, and has no query; `*` stands for anything")
    return parse_text(text)


def _parse_allow(text: str) -> tuple[str, str]:
    kind, colon, name = parse_text(text).partition(":")
    if not colon or not name:
        raise ValueError(f"{shown(text)}: expected `group:NAME`, `consumer:NAME`, `scope:NAME` or `model:GLOB`")
    if kind not in ALLOW_WORDS:
        raise ValueError(f"unknown kind {shown(kind)}{did_you_mean(kind, ALLOW_WORDS) or _expected(ALLOW_WORDS)}")
    return kind, name


def _parse_jwks(text: str) -> str:
    """Return an http(s) URL, or the path of a file."""
    if "://" not in text:
        return parse_text(text)
    if re.search("//[^/?#]*@", text):  # messages would show it
        raise ValueError("a URL must not carry a user or password")
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{shown(text)} is neither an http(s) URL nor the path of a file")
    return text


def _refuse_weak(value: object) -> object:
    """Say why an algorithm will never be on the list; others get the list."""
    if isinstance(value, str) and value.upper().startswith("HS"):
        raise ValueError(f"{shown(value)} is refused: with a shared secret, whoever can check a token can make one")
    if isinstance(value, str) and value.lower() == "none":
        raise ValueError(f"{shown(value)} is refused: a token without a signature proves nothing")
    return value


def _expected(words: tuple[str, ...]) -> str:
    return f": expected {', '.join(shown(word) for word in words)}"


Version = Annotated[str, reader(_parse_version, "`1`"), pattern("1", "integer")]
Algorithm = Annotated[
    Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"],
    BeforeValidator(_refuse_weak),
]
Balance = Annotated[
    policy.Balance,
    reader(_parse_balance, "a way to balance"),
    pattern("round_robin|least_load|peak_ewma|prefix|hash:consumer|hash:header:[A-Za-z0-9-]+"),
]
Jwks = Annotated[str, reader(_parse_jwks, "a URL or a path"), pattern(".+")]
PathGlob = Annotated[str, reader(_parse_path, "a path"), pattern("[/*][^?#]*")]
AllowEntry = Annotated[tuple[str, str], reader(_parse_allow, "text"), pattern("(group|consumer|scope|model):.+")]
