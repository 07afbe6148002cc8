"""Token + keys -> Principal: who is calling, decided from bytes and the wall time alone.

The rules, and where they come from (RFC 7515 to 7519, RFC 8725 "JWT Best Current Practices"):

- The `iss` claim, not yet trusted, only *selects* an entry of the policy. Algorithms come from that entry and keys
  from that entry's key set; nothing in a token names an algorithm, a key or a URL that the policy did not name.
- Keys are vetted once, when a set is read (`parse_jwks`), because libraries do not: no symmetric or private key, no
  small, odd or ROCA-weak RSA, curve and `alg` and `use` and `key_ops` must fit. A kid that stands for two usable keys
  stands for none: which of them was meant would be a guess. One bad key never costs the others their place.
- A set is replaced whole or not at all: a document without one usable key raises `InvalidKeys`, the old set stays.
- Strict base64url (RFC 7515, 2): one token has one spelling. Headers that would change what is verified or where
  keys come from (`crit`, `b64`, `jku`, `jwk`, `x5u`, `x5c`) are refused even where they are harmless.
- The signature is checked before any claim but `iss`, so "expired" is told only to a bearer of an authentic token. A
  refusal says expired, not yet valid or not accepted, and no more; which check failed is for the log.

Whatever the bytes: `verify` returns a Principal or raises Unauthenticated, UnknownKey or KeysMissing.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, TypeGuard

import jwt
import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from policies.errors import Unauthenticated
from policies.policy import Issuer, Principal

EXPIRED = "token expired"
NOT_YET_VALID = "token not yet valid"
NOT_ACCEPTED = "token not accepted"

LEEWAY_SECONDS = 30.0
MAX_TOKEN_BYTES = 8 * 1024
MAX_DOCUMENT_BYTES = 256 * 1024
MAX_KEYS = 64
MAX_NAME_LENGTH = 256
MAX_NAMES = 512  # groups or scopes of one token: more than any 8 KiB token of sane names holds
MAX_INSTANT = float(2**53)  # the last second that a JSON number tells exactly

# Which algorithms a key may serve, by type and curve (RFC 7518, 3.1; RFC 8037, 3.1). The first is the one to sign with.
_FITTING: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
ALGORITHMS: tuple[str, ...] = tuple(name for names in _FITTING.values() for name in names)

_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})  # RFC 7518, 6
_PUBLIC_MEMBERS = frozenset({"kty", "crv", "x", "y", "n", "e"})
_NUMBERS = frozenset({"x", "y", "n", "e"})
_REFUSED_HEADERS = frozenset({"crit", "b64", "jku", "jwk", "x5u", "x5c"})
_TOKEN_TYPES = frozenset({"jwt", "at+jwt"})  # RFC 7519, 5.1; RFC 9068, 2.1
_SIGNERS: tuple[tuple[type, str], ...] = (
    (RSAPrivateKey, "RS256"),
    (EllipticCurvePrivateKey, "ES256"),
    (Ed25519PrivateKey, "EdDSA"),
)

_JSON_OBJECT = msgspec.json.Decoder(dict[str, Any])

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
SigningKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey


class InvalidKeys(ValueError):  # noqa: N818  what it is about, not that it is an error
    """A key, or a document of keys, that cannot be used. The message says why and holds no key material."""


class UnknownKey(Exception):  # noqa: N818  a question to the key store, not an error
    """The token names a key that its issuer's set does not have: fetching the set again may help."""

    def __init__(self, issuer: Issuer, kid: str) -> None:
        super().__init__(issuer.issuer, kid)
        self.issuer = issuer
        self.kid = kid


class KeysMissing(Exception):  # noqa: N818  a question to the key store, not an error
    """No key set of this issuer is there: the token cannot be judged, neither way."""

    def __init__(self, issuer: Issuer) -> None:
        super().__init__(issuer.issuer)
        self.issuer = issuer


@dataclass(frozen=True, slots=True)
class Key:
    """A vetted public key, and the algorithms that it may verify here."""

    kid: str | None
    algorithms: frozenset[str]
    public: PublicKey


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys of one issuer, and for each key left out, why. Sets with equal keys are equal."""

    named: Mapping[str, Key]
    unnamed: tuple[Key, ...] = ()
    rejected: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.named) + len(self.unnamed)

    def fitting(self, algorithm: str) -> list[Key]:
        return [key for key in (*self.named.values(), *self.unnamed) if algorithm in key.algorithms]


Trusted = tuple[Issuer, KeySet | None]


def verify(token: str | bytes, issuers: Mapping[str, Trusted], wall: float) -> Principal:
    """Return whom the token names. `issuers` is keyed by the `iss` claim; `wall` is Unix seconds.

    Raises Unauthenticated; UnknownKey when the issuer may have published a new key; KeysMissing when none is loaded.
    The token stays acceptable, as far as time goes, until `expires_at` + LEEWAY_SECONDS.
    """
    jws = _open(token)
    claims = _json_object(jws.payload)
    name = claims.get("iss")
    if not isinstance(name, str) or name not in issuers:
        raise Unauthenticated(NOT_ACCEPTED, check="token.issuer")
    issuer, keys = issuers[name]
    _check_signature(jws, issuer, keys)
    return _principal(claims, issuer, wall)


def parse_jwks(document: bytes, algorithms: Iterable[str]) -> KeySet:
    """Read a JWK set (RFC 7517) and keep the keys that may verify one of `algorithms`.

    Raises InvalidKeys when the document is not a key set, is too large, or holds no usable key.
    """
    allowed = frozenset(algorithms)
    usable: list[Key] = []
    rejected: list[str] = []
    for position, jwk in enumerate(_members(document)):
        try:
            usable.append(_vetted(jwk, allowed))
        except InvalidKeys as why:
            rejected.append(f"{_label(jwk, position)}: {why}")
    count = Counter(key.kid for key in usable)
    named = {key.kid: key for key in usable if key.kid is not None and count[key.kid] == 1}
    rejected += [f"kid {kid!a}: stands for {n} keys" for kid, n in count.items() if kid is not None and n > 1]
    unnamed = tuple(key for key in usable if key.kid is None)
    if not named and not unnamed:
        raise InvalidKeys("; ".join(["the set holds no usable key", *rejected[:4]]))
    return KeySet(named, unnamed, tuple(rejected))


def mint(
    key_pem: bytes,
    *,
    sub: str,
    groups: Iterable[str] = (),
    scopes: Iterable[str] = (),
    issuer: str,
    audience: str,
    ttl: float,
    wall: float,
    kid: str | None = None,
) -> str:
    """Sign a token that `verify` accepts for `ttl` seconds. Without `kid`, the key's thumbprint names it.

    Raises InvalidKeys when `key_pem` is not a private key that can sign.
    """
    private, jwk = _signing_key(key_pem)
    claims = {
        "iss": issuer,
        "aud": audience,
        "sub": sub,
        "iat": int(wall),
        "exp": int(wall + ttl),
        "groups": sorted(groups),
        "scope": " ".join(sorted(scopes)),
    }
    return jwt.encode(claims, private, algorithm=jwk["alg"], headers={"kid": kid or jwk["kid"]})


def generate_signing_key() -> bytes:
    """Return a new EC P-256 private key in PEM form. It is as random as the operating system makes it."""
    return generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def jwks_of(key_pem: bytes) -> bytes:
    """Return the JWK set that verifies what `mint` signs with this key. Raises InvalidKeys."""
    _, jwk = _signing_key(key_pem)
    return msgspec.json.format(msgspec.json.encode({"keys": [jwk]}), indent=2)


def certificate_expiry(pem: bytes) -> float:
    """Until when the first certificate of a chain is valid, in Unix seconds. Raises InvalidKeys."""
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    except ValueError:
        raise InvalidKeys("holds no certificate in PEM form") from None


class _Jws(NamedTuple):
    """A token taken apart (RFC 7515, 3.1). Nothing in it is trusted."""

    header: dict[str, Any]
    payload: bytes
    signing_input: bytes
    signature: bytes


def _open(token: str | bytes) -> _Jws:
    try:
        octets = token.encode("ascii") if isinstance(token, str) else token
        if len(octets) > MAX_TOKEN_BYTES:
            raise Unauthenticated(NOT_ACCEPTED, check="token.form")
        header, payload, signature = octets.split(b".")
        signing_input = octets[: -len(signature) - 1]
        return _Jws(_json_object(_octets(header)), _octets(payload), signing_input, _octets(signature))
    except ValueError:  # not ASCII, not three parts, or not base64url
        raise Unauthenticated(NOT_ACCEPTED, check="token.form") from None


def _check_signature(jws: _Jws, issuer: Issuer, keys: KeySet | None) -> None:
    header = jws.header
    if not _REFUSED_HEADERS.isdisjoint(header) or not _is_token_type(header.get("typ", "JWT")):
        raise Unauthenticated(NOT_ACCEPTED, check="token.header")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
        raise Unauthenticated(NOT_ACCEPTED, check="token.algorithm")
    if keys is None:
        raise KeysMissing(issuer)
    key = _key_named(header["kid"], issuer, keys) if "kid" in header else _only_key(algorithm, keys)
    if algorithm not in key.algorithms:
        raise Unauthenticated(NOT_ACCEPTED, check="token.key")
    if not jwt.get_algorithm_by_name(algorithm).verify(jws.signing_input, key.public, jws.signature):
        raise Unauthenticated(NOT_ACCEPTED, check="token.signature")


def _key_named(kid: object, issuer: Issuer, keys: KeySet) -> Key:
    if not isinstance(kid, str) or len(kid) > MAX_NAME_LENGTH:
        raise Unauthenticated(NOT_ACCEPTED, check="token.key")
    key = keys.named.get(kid)
    if key is None:
        raise UnknownKey(issuer, kid)
    return key


def _only_key(algorithm: str, keys: KeySet) -> Key:
    """Find the key of a token without `kid`: the only one that fits. Trying several would let a caller set the cost."""
    fitting = keys.fitting(algorithm)
    if len(fitting) != 1:
        raise Unauthenticated(NOT_ACCEPTED, check="token.key")
    return fitting[0]


def _is_token_type(typ: object) -> bool:
    return isinstance(typ, str) and typ.lower().removeprefix("application/") in _TOKEN_TYPES


def _principal(claims: dict[str, Any], issuer: Issuer, wall: float) -> Principal:
    """Judge the claims of a token whose signature is right."""
    audience = claims.get("aud")
    meant_for = _names([audience] if isinstance(audience, str) else audience)
    consumer = _claim(claims, issuer.claims.consumer)
    if meant_for.isdisjoint(issuer.audience):
        raise Unauthenticated(NOT_ACCEPTED, check="token.audience")
    if not _is_name(consumer):
        raise Unauthenticated(NOT_ACCEPTED, check="token.consumer")
    groups = _names(_claim(claims, issuer.claims.groups))
    scopes = _names(claims["scope"] if "scope" in claims else claims.get("scp"))
    expires_at = _check_times(claims, wall)
    return Principal(consumer, groups, scopes, issuer.issuer, expires_at)


def _check_times(claims: dict[str, Any], wall: float) -> float:
    """Return `exp`, which must be there; `nbf` and `iat` count where they are."""
    expires_at = _instant(claims.get("exp"))
    begins = [_instant(claims[name]) for name in ("nbf", "iat") if name in claims]
    if wall >= expires_at + LEEWAY_SECONDS:
        raise Unauthenticated(EXPIRED, check="token.expired")
    if any(begin > wall + LEEWAY_SECONDS for begin in begins):
        raise Unauthenticated(NOT_YET_VALID, check="token.not_yet_valid")
    return expires_at


def _instant(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_INSTANT:
        raise Unauthenticated(NOT_ACCEPTED, check="token.times")
    return float(value)


def _claim(claims: dict[str, Any], name: str) -> object:
    """Return the claim of exactly this name, else follow its dots: `realm_access.roles`. None: not there."""
    if name in claims:
        return claims[name]
    value: object = claims
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _names(value: object) -> frozenset[str]:
    """Read a list of strings, or a string of names with spaces between (RFC 8693, 4.2). None is an empty list."""
    if value is None:
        return frozenset()
    names = [name for name in value.split(" ") if name] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_NAMES or not all(map(_is_name, names)):
        raise Unauthenticated(NOT_ACCEPTED, check="token.names")
    return frozenset(names)


def _is_name(value: object) -> TypeGuard[str]:
    """Names go into headers, logs and keys: no control characters, and no spaces that a header would lose."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable() and value == value.strip()
    )


def _json_object(document: bytes) -> dict[str, Any]:
    try:
        return _JSON_OBJECT.decode(document)
    except (ValueError, RecursionError):
        raise Unauthenticated(NOT_ACCEPTED, check="token.form") from None


def _octets(text: bytes) -> bytes:
    """Decode base64url as RFC 7515, 2 has it. Raises ValueError on padding, other characters and stray bits."""
    octets = urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    if _base64url(octets) != text:
        raise ValueError
    return octets


def _base64url(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def _members(document: bytes) -> list[Any]:
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InvalidKeys(f"longer than {MAX_DOCUMENT_BYTES // 1024} KiB")
    try:
        keys = _JSON_OBJECT.decode(document).get("keys")
    except (ValueError, RecursionError):
        raise InvalidKeys("not a JSON object") from None
    if not isinstance(keys, list) or not keys:
        raise InvalidKeys('no keys: a set is {"keys": [...]} with at least one')
    if len(keys) > MAX_KEYS:
        raise InvalidKeys(f"{len(keys)} keys: at most {MAX_KEYS} are read")
    return keys


def _label(jwk: object, position: int) -> str:
    kid = jwk.get("kid") if isinstance(jwk, dict) else None
    return f"kid {kid[:80]!a}" if isinstance(kid, str) else f"key {position}"


def _vetted(jwk: object, allowed: frozenset[str]) -> Key:
    if not isinstance(jwk, dict):
        raise InvalidKeys("not a JSON object")
    kid = jwk.get("kid")
    if kid is not None and not (isinstance(kid, str) and len(kid) <= MAX_NAME_LENGTH):
        raise InvalidKeys(f"its kid is not a string of at most {MAX_NAME_LENGTH} characters")
    if jwk.get("kty") == "oct":
        raise InvalidKeys("symmetric: whoever can check such a signature can also make one")
    if not _PRIVATE_MEMBERS.isdisjoint(jwk):
        raise InvalidKeys("holds its private part: replace it, and publish the public part only")
    if jwk.get("use", "sig") != "sig":
        raise InvalidKeys("its use is not sig")
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise InvalidKeys("its key_ops do not have verify")
    serves = allowed.intersection(_fitting(jwk))
    if "alg" in jwk:
        serves = frozenset(name for name in serves if name == jwk["alg"])
    if not serves:
        raise InvalidKeys("its type, curve or alg fits none of the issuer's algorithms")
    return Key(kid, serves, _load(jwk, next(iter(serves))))


def _fitting(jwk: dict[str, Any]) -> tuple[str, ...]:
    kind, curve = jwk.get("kty"), jwk.get("crv")
    if kind == "RSA":
        return _FITTING["RSA", None]
    return _FITTING.get((kind, curve), ()) if isinstance(kind, str) and isinstance(curve, str) else ()


def _load(jwk: dict[str, Any], algorithm: str) -> PublicKey:
    members = {name: jwk[name] for name in _PUBLIC_MEMBERS.intersection(jwk)}
    try:
        numbers = {name: int.from_bytes(_octets(members[name].encode("ascii"))) for name in _NUMBERS & members.keys()}
        if jwk["kty"] == "RSA":
            _vet_rsa(numbers["n"], numbers["e"])
        public: PublicKey = jwt.PyJWK(members, algorithm).key
    except InvalidKeys:
        raise
    except (ValueError, KeyError, AttributeError, jwt.PyJWTError, UnsupportedAlgorithm):
        raise InvalidKeys("its parameters do not make a public key") from None
    return public


def _vet_rsa(modulus: int, exponent: int) -> None:
    bits = modulus.bit_length()
    if not 2048 <= bits <= 8192:  # NIST SP 800-131A; above, one check costs a millisecond
        raise InvalidKeys(f"RSA of {bits} bits: 2048 to 8192 are accepted")
    if modulus % 2 == 0 or exponent % 2 == 0 or not 3 <= exponent < 2**64:  # OpenSSL's own bound for large keys
        raise InvalidKeys("RSA with an even modulus, or an exponent that is even, 1 or over 64 bits")
    if all(pow(modulus, order, prime) == 1 for prime, order in _ROCA):
        raise InvalidKeys("RSA with the ROCA weakness (CVE-2017-15361): it can be factored")


def _order(base: int, prime: int) -> int:
    """Return the smallest k > 0 with base ** k = 1 modulo a prime."""
    return next(k for k in range(1, prime) if pow(base, k, prime) == 1)


# ROCA keys are powers of 65537 modulo each small prime (Nemec et al., "The Return of Coppersmith's Attack", CCS 2017,
# 4.1). The group is cyclic, so n is such a power exactly when n ** order(65537) = 1; a sound key is so by chance once
# in 2 ** 27.
_ROCA = tuple((p, _order(65537, p)) for p in range(3, 168) if all(p % d for d in range(2, p)))


def _signing_key(pem: bytes) -> tuple[SigningKey, dict[str, Any]]:
    """Return the private key and its public JWK with `kid`, `use` and `alg`, vetted as any other."""
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidKeys("not a private key in PEM form without a password") from None
    if not isinstance(private, SigningKey):
        raise InvalidKeys("neither an RSA, an EC nor an Ed25519 key")
    family = next(name for kind, name in _SIGNERS if isinstance(private, kind))
    public = jwt.get_algorithm_by_name(family).to_jwk(private.public_key(), as_dict=True)
    jwk = {name: public[name] for name in _PUBLIC_MEMBERS.intersection(public)}
    _vetted(jwk, frozenset(ALGORITHMS))
    return private, jwk | {"kid": _thumbprint(jwk), "use": "sig", "alg": _fitting(jwk)[0]}


def _thumbprint(jwk: dict[str, Any]) -> str:
    """RFC 7638: the SHA-256 of the public members, in order and without white space."""
    return _base64url(sha256(msgspec.json.encode(jwk, order="sorted")).digest()).decode()
