"""Identity: attacks as tables, and Hypothesis for whatever nobody thought of."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from base64 import urlsafe_b64encode

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import identity
from policies.errors import Unauthenticated
from policies.identity import (
    ALGORITHMS,
    EXPIRED,
    NOT_ACCEPTED,
    NOT_YET_VALID,
    InvalidKeys,
    KeySet,
    KeysMissing,
    UnknownKey,
    certificate_expiry,
    generate_signing_key,
    jwks_of,
    mint,
    parse_jwks,
    verify,
)
from policies.policy import Claims, Issuer, Principal
from tests.support.certificates import Authority

WALL = 1_800_000_000.0
IDP = "https://idp.example.com"


def pem_of(key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


RSA = rsa.generate_private_key(65537, 2048)
RSA_PEM = pem_of(RSA)
EC_PEM = generate_signing_key()
ED_PEM = pem_of(ed25519.Ed25519PrivateKey.generate())
PEMS = {"RS256": RSA_PEM, "ES256": EC_PEM, "EdDSA": ED_PEM}

ISSUER = Issuer(IDP, ("weir", "weir-staging"), ("RS256", "ES256", "EdDSA"), "/keys.json")
KEYS = {name: parse_jwks(jwks_of(pem), ISSUER.algorithms) for name, pem in PEMS.items()}
TRUSTED = {IDP: (ISSUER, KEYS["ES256"])}
KID = next(iter(KEYS["ES256"].named))


def jwk_of(pem: bytes = EC_PEM, **changes) -> dict:
    """The public JWK of a key, with members changed, or left out where None."""
    jwk = json.loads(jwks_of(pem))["keys"][0] | changes
    return {name: value for name, value in jwk.items() if value is not None}


def jwks(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def b64(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def claims(**changes) -> dict:
    """Claims that are accepted, with some changed, or left out where None."""
    good = {
        "iss": IDP,
        "aud": "weir",
        "sub": "ann",
        "iat": WALL - 5,
        "exp": WALL + 60,
        "groups": ["research"],
    } | changes
    return {name: value for name, value in good.items() if value is not None}


def sign(payload: object = None, header: dict | None = None, *, pem: bytes = EC_PEM, algorithm: str = "ES256") -> bytes:
    """A token with a right signature over any header and any payload (bytes go in as they are)."""
    if payload is None:
        payload = claims()
    head = {"alg": algorithm, "typ": "JWT", "kid": KID} | (header or {})
    head = {name: value for name, value in head.items() if value is not None}
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signing_input = b64(json.dumps(head).encode()) + b"." + b64(body)
    key = serialization.load_pem_private_key(pem, None)
    return signing_input + b"." + b64(jwt.get_algorithm_by_name(algorithm).sign(signing_input, key))


def judge(token: str | bytes, trusted=TRUSTED, wall: float = WALL) -> str:
    """What became of a token, as one word or one message."""
    try:
        verify(token, trusted, wall)
    except Unauthenticated as refusal:
        return refusal.message
    except UnknownKey:
        return "unknown key"
    except KeysMissing:
        return "keys missing"
    return "accepted"


# Who is told by a good token


@pytest.mark.parametrize("algorithm", PEMS)
def test_minted_token_names_its_bearer(algorithm):
    token = mint(
        PEMS[algorithm], sub="ann", groups=["research", "ops"], scopes=["chat"], issuer=IDP, audience="weir",
        ttl=60, wall=WALL,
    )  # fmt: skip

    principal = verify(token, {IDP: (ISSUER, KEYS[algorithm])}, WALL)

    assert principal == Principal("ann", frozenset({"research", "ops"}), frozenset({"chat"}), IDP, WALL + 60)
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    assert verify(token.encode(), {IDP: (ISSUER, KEYS[algorithm])}, WALL) == principal


def test_kid_is_the_thumbprint_of_rfc_7638():
    """The example of RFC 8037, A.3."""
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert identity._thumbprint(jwk) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_public_set_of_a_signing_key_holds_no_secret():
    for pem in PEMS.values():
        assert identity._PRIVATE_MEMBERS.isdisjoint(json.loads(jwks_of(pem))["keys"][0])


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        (b"", "PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "PEM"),
        (jwks_of(EC_PEM), "PEM"),
        (pem_of(rsa.generate_private_key(65537, 1024)), "1024 bits"),  # noqa: S505  weak on purpose
        (pem_of(ec.generate_private_key(ec.SECP256K1())), "curve"),
        (pem_of(dsa.generate_private_key(2048)), "neither"),
        (
            RSA.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            ),
            "password",
        ),
    ],
)
def test_key_that_cannot_sign_is_refused(pem, reason):
    with pytest.raises(InvalidKeys, match=reason):
        mint(pem, sub="ann", issuer=IDP, audience="weir", ttl=60, wall=WALL)


@pytest.mark.parametrize(
    ("given_claims", "groups"),
    [
        ({"groups": ["a", "b"]}, {"a", "b"}),
        ({"groups": "a  b "}, {"a", "b"}),
        ({"groups": ["two words"]}, {"two words"}),
        ({"groups": []}, set()),
        ({}, set()),
    ],
)
def test_groups_are_a_list_or_a_string(given_claims, groups):
    assert verify(sign(claims(groups=None) | given_claims), TRUSTED, WALL).groups == groups


@pytest.mark.parametrize(
    ("given_claims", "scopes"),
    [
        ({"scope": "read write"}, {"read", "write"}),
        ({"scp": ["read"]}, {"read"}),
        ({"scp": "read write"}, {"read", "write"}),
        ({"scope": "read", "scp": "write"}, {"read"}),
    ],
)
def test_scopes_come_from_scope_or_scp(given_claims, scopes):
    assert verify(sign(claims(**given_claims)), TRUSTED, WALL).scopes == scopes


def test_claims_may_be_named_and_nested():
    issuer = Issuer(IDP, ("weir",), ("ES256",), "/keys.json", Claims("azp", "realm_access.roles"))
    token = sign(claims(sub=None, azp="app", realm_access={"roles": ["r"]}))
    principal = verify(token, {IDP: (issuer, KEYS["ES256"])}, WALL)
    assert (principal.consumer, principal.groups) == ("app", {"r"})


def test_claim_of_the_exact_name_comes_before_a_path():
    issuer = Issuer(IDP, ("weir",), ("ES256",), "/keys.json", Claims("sub", "https://x.example/groups"))
    token = sign(claims(**{"https://x.example/groups": ["g"], "https://x": {"example/groups": ["h"]}}))
    assert verify(token, {IDP: (issuer, KEYS["ES256"])}, WALL).groups == {"g"}


# What the log is told


@pytest.mark.parametrize(
    ("token", "check"),
    [
        (lambda: b"abc", "form"),
        (lambda: sign(b"[]"), "form"),
        (lambda: sign(claims(iss="https://evil.example")), "issuer"),
        (lambda: unsigned("none"), "algorithm"),
        (lambda: hs256(PUBLIC_PEM), "algorithm"),
        (lambda: sign(header={"jku": "https://evil.example/jwks"}), "header"),
        (lambda: sign(header={"kid": 7}), "key"),
        (lambda: sign(pem=generate_signing_key()), "signature"),
        (lambda: sign(claims(aud="other")), "audience"),
        (lambda: sign(claims(sub=7)), "consumer"),
        (lambda: sign(claims(groups=7)), "names"),
        (lambda: sign(claims(exp="soon")), "times"),
        (lambda: sign(claims(exp=0)), "expired"),
        (lambda: sign(claims(nbf=WALL + 3600)), "not_yet_valid"),
    ],
)
def test_a_refusal_names_the_check_that_failed(token, check):
    with pytest.raises(Unauthenticated) as caught:
        verify(token(), TRUSTED, WALL)
    assert caught.value.check == f"token.{check}"


# Attacks: the header


PUBLIC_PEM = (
    serialization.load_pem_private_key(EC_PEM, None)
    .public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
)


def hs256(secret: bytes) -> bytes:
    signing_input = b64(json.dumps({"alg": "HS256", "kid": KID}).encode()) + b"." + b64(json.dumps(claims()).encode())
    return signing_input + b"." + b64(hmac.new(secret, signing_input, hashlib.sha256).digest())


def unsigned(alg: object) -> bytes:
    return b64(json.dumps({"alg": alg, "kid": KID}).encode()) + b"." + b64(json.dumps(claims()).encode()) + b"."


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, "ES257", ["ES256"], {"a": 1}, 0, "HS256", "A256KW"])
def test_algorithm_of_the_token_opens_nothing(alg):
    assert judge(unsigned(alg)) == NOT_ACCEPTED


@pytest.mark.parametrize("secret", [PUBLIC_PEM, PUBLIC_PEM.strip(), jwks_of(EC_PEM), b""])
@pytest.mark.parametrize("algorithms", [("ES256",), ("ES256", "HS256"), ("HS256", "none")])
def test_public_key_is_no_hmac_secret(secret, algorithms):
    """Even where an entry allowed HS256: no key serves it."""
    issuer = Issuer(IDP, ("weir",), algorithms, "/keys.json")
    assert judge(hs256(secret), {IDP: (issuer, KEYS["ES256"])}) == NOT_ACCEPTED


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": True},
        {"b64": True},
        {"b64": False},
        {"jku": "https://evil.example/jwks"},
        {"x5u": "https://evil.example/cert"},
        {"jwk": jwk_of()},
        {"x5c": ["MIIB"]},
        {"typ": "JWE"},
        {"typ": "logout+jwt"},
        {"typ": "dpop+jwt"},
        {"typ": ["JWT"]},
        {"typ": 1},
        {"alg": "RS256"},
        {"alg": "EdDSA"},
        {"kid": 7},
        {"kid": [KID]},
        {"kid": "k" * 257},
    ],
)
def test_header_that_changes_the_rules_is_refused(header):
    assert judge(sign(header=header)) == NOT_ACCEPTED


@pytest.mark.parametrize(
    "header", [{}, {"typ": None}, {"typ": "at+jwt"}, {"typ": "application/AT+JWT"}, {"x5t": "abc"}]
)
def test_ordinary_header_is_accepted(header):
    assert judge(sign(header=header)) == "accepted"


def test_token_signed_by_a_key_it_brings_itself_is_refused():
    stranger = generate_signing_key()
    assert judge(sign(pem=stranger)) == NOT_ACCEPTED
    assert judge(sign(header={"kid": None, "jwk": jwk_of(stranger)}, pem=stranger)) == NOT_ACCEPTED


STRANGE_KIDS = {
    "another": "other",
    "none": "",
    "a path": "../../etc/passwd",
    "with a zero": KID + "\x00",
    "in lower case": KID.lower() + "x",
    "a quote": "' OR 1=1",
}


@pytest.mark.parametrize("kid", STRANGE_KIDS.values(), ids=STRANGE_KIDS)
def test_unknown_kid_is_a_question_to_the_key_store(kid):
    with pytest.raises(UnknownKey) as caught:
        verify(sign(header={"kid": kid}), TRUSTED, WALL)
    assert (caught.value.issuer, caught.value.kid) == (ISSUER, kid)


def test_without_any_set_the_token_cannot_be_judged():
    with pytest.raises(KeysMissing) as caught:
        verify(sign(), {IDP: (ISSUER, None)}, WALL)
    assert caught.value.issuer is ISSUER
    assert judge(unsigned("none"), {IDP: (ISSUER, None)}) == NOT_ACCEPTED


def test_token_without_kid_is_for_the_only_key_that_fits():
    token = sign(header={"kid": None})
    second = jwk_of(generate_signing_key())
    assert judge(token) == "accepted"
    assert judge(token, {IDP: (ISSUER, parse_jwks(jwks(jwk_of(kid=None)), ["ES256"]))}) == "accepted"
    assert judge(token, {IDP: (ISSUER, parse_jwks(jwks(jwk_of(), jwk_of(ED_PEM)), ALGORITHMS))}) == "accepted"
    assert judge(token, {IDP: (ISSUER, parse_jwks(jwks(jwk_of(), second), ["ES256"]))}) == NOT_ACCEPTED
    assert judge(token, {IDP: (ISSUER, KEYS["EdDSA"])}) == NOT_ACCEPTED


def test_key_serves_only_the_algorithm_it_names():
    keys = parse_jwks(jwks(jwk_of(RSA_PEM, alg="RS512", kid=KID)), ["RS256", "RS512"])
    assert judge(sign(pem=RSA_PEM, algorithm="RS256"), {IDP: (ISSUER, keys)}) == NOT_ACCEPTED


# Attacks: the form


GOOD = sign()
HEAD, BODY, SIGNATURE = GOOD.split(b".")


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b".",
        b"..",
        b"...",
        HEAD + b"." + BODY,
        GOOD + b".",
        b"." + GOOD,
        GOOD + b".a.b",
        HEAD + b"." + BODY + b".",
        HEAD + b".." + SIGNATURE,
        GOOD + b"=",
        GOOD + b"==",
        GOOD + b"\n",
        b" " + GOOD,
        GOOD.replace(b".", b". "),
        GOOD.replace(b".", b" "),
        GOOD[:-1],
        GOOD[:-1] + b"+",
        GOOD[:-2] + bytes([GOOD[-2] ^ 1]) + GOOD[-1:],
        GOOD[:20] + b"%41" + GOOD[20:],
        GOOD + b"\xff",
        b"\xff" * 40,
        GOOD + b", " + GOOD,
        b'{"payload":"e30","protected":"e30","signature":""}',
        GOOD + b"A" * 8192,
        b"A" * 10_000,
        b"." * 8192,
        "ä".encode() + GOOD,
        "tökén",
        "\ud800",
        "\udc85" + GOOD.decode(),
    ],
)
def test_malformed_token_is_refused(token):
    assert judge(token) == NOT_ACCEPTED


def test_one_token_has_one_spelling():
    """The last character of a 64-byte signature carries four bits that must be zero."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spellings = [GOOD[:-1] + bytes([last]) for last in alphabet]
    assert [token for token in spellings if judge(token) == "accepted"] == [GOOD]


def signed_of_length(octets: int) -> bytes:
    """A good token but for its length. Base64url has no text of length 4n + 1, so padding is put in header and body."""
    for header_padding in range(3):
        rest = octets - len(sign(claims(pad=""), {"x": "h" * header_padding}))
        for padding in range(rest * 3 // 4 - 3, rest * 3 // 4 + 4):
            token = sign(claims(pad="p" * padding), {"x": "h" * header_padding})
            if len(token) == octets:
                return token
    raise AssertionError


def test_token_may_have_eight_kib():
    assert judge(signed_of_length(8192)) == "accepted"
    assert judge(signed_of_length(8193)) == NOT_ACCEPTED


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b'"iss"',
        b"1",
        b"{",
        b"{}",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + json.dumps(claims()).encode(),
        json.dumps(claims()).encode() + b"\x00",
        json.dumps(claims()).encode("utf-16"),
        b'{"iss": "https://idp.example.com", "sub": "\xff"}',
        b"[" * 4000,
        b'{"a":' * 1100,
        b'{"iss":["https://idp.example.com"]}',
        b'{"iss":{"https://idp.example.com":1}}',
        b'{"iss":null}',
        json.dumps(claims(iss="https://idp.example.com/")).encode(),
        json.dumps(claims(iss="https://IDP.example.com")).encode(),
        json.dumps(claims(iss="")).encode(),
    ],
)
def test_payload_that_is_no_claims_of_a_known_issuer_is_refused(payload):
    assert judge(sign(payload)) == NOT_ACCEPTED


# Attacks: the claims


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": None},
        {"aud": ""},
        {"aud": "other"},
        {"aud": "wei"},
        {"aud": "weir2"},
        {"aud": "weir other"},
        {"aud": "WEIR"},
        {"aud": []},
        {"aud": ["other"]},
        {"aud": [["weir"]]},
        {"aud": ["weir", 1]},
        {"aud": ["weir", None]},
        {"aud": {"weir": True}},
        {"aud": 1},
        {"sub": None},
        {"sub": ""},
        {"sub": " "},
        {"sub": " ann"},
        {"sub": "ann\n"},
        {"sub": "ann\x00"},
        {"sub": "ann\u2028x"},
        {"sub": "\x1b[31m"},
        {"sub": "a" * 257},
        {"sub": 7},
        {"sub": ["ann"]},
        {"sub": {"ann": 1}},
        {"sub": True},
        {"groups": 7},
        {"groups": {"a": 1}},
        {"groups": ["a", 1]},
        {"groups": [""]},
        {"groups": ["a", ["b"]]},
        {"groups": ["a\r\nb"]},
        {"groups": ["g" * 257]},
        {"groups": [str(n) for n in range(513)]},
        {"scope": 7},
        {"scope": "a\tb"},
        {"exp": None},
        {"exp": str(int(WALL + 60))},
        {"exp": True},
        {"exp": [WALL + 60]},
        {"exp": -1},
        {"exp": 10**30},
        {"exp": 1e300},
        {"exp": math.nan},
        {"exp": math.inf},
        {"nbf": "0"},
        {"iat": "0"},
        {"iat": -5},
    ],
)
def test_wrong_claim_is_refused(changes):
    assert judge(sign(claims(**changes))) == NOT_ACCEPTED


def test_integer_too_long_to_read_is_refused():
    body = json.dumps(claims()).encode().replace(b'"exp": 1800000060.0', b'"exp": ' + b"9" * 5000)
    assert judge(sign(body)) == NOT_ACCEPTED


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "weir-staging"},
        {"aud": ["other", "weir"]},
        {"aud": ["weir", "weir"]},
        {"sub": "a" * 256},
        {"sub": "Zoë 🙂"},
        {"sub": "' OR 1=1 --"},
        {"exp": WALL + 0.5},
        {"exp": int(WALL) + 10**6},
        {"iat": None},
        {"nbf": WALL},
        {"groups": None},
    ],
)
def test_right_claim_is_accepted(changes):
    assert judge(sign(claims(**changes))) == "accepted"


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"exp": WALL - 29.9}, "accepted"),
        ({"exp": WALL - 30}, EXPIRED),
        ({"exp": WALL - 3600}, EXPIRED),
        ({"exp": 0}, EXPIRED),
        ({"nbf": WALL + 30}, "accepted"),
        ({"nbf": WALL + 30.1}, NOT_YET_VALID),
        ({"iat": WALL + 30}, "accepted"),
        ({"iat": WALL + 31}, NOT_YET_VALID),
        ({"exp": WALL - 31, "aud": "other"}, NOT_ACCEPTED),
        ({"exp": WALL - 31, "nbf": "x"}, NOT_ACCEPTED),
    ],
)
def test_times_have_a_leeway_of_thirty_seconds(changes, result):
    assert judge(sign(claims(**changes))) == result


def test_only_a_bearer_of_an_authentic_token_hears_that_it_expired():
    forged = sign(claims(exp=0), pem=generate_signing_key())
    assert judge(forged) == NOT_ACCEPTED


# Key sets


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"<html><body>Sign in</body></html>",
        b'{"keys": []}',
        b'{"keys": {}}',
        b'{"keys": null}',
        b'{"keys": [1, null, "x", []]}',
        b'{"keys": [{}]}',
        b"\xff" * 100,
        b"[" * 100_000,
        b'{"keys":' * 10_000,
        jwks(*[jwk_of(kid=str(n)) for n in range(65)]),
        jwks(jwk_of()) + b" " * (256 * 1024),
    ],
)
def test_document_without_usable_keys_is_refused(document):
    with pytest.raises(InvalidKeys):
        parse_jwks(document, ALGORITHMS)


def rsa_jwk(n: int, e: int = 65537) -> dict:
    return {
        "kty": "RSA",
        "kid": "bad",
        "n": b64(n.to_bytes((n.bit_length() + 7) // 8, "big")).decode(),
        "e": b64(e.to_bytes(max(1, (e.bit_length() + 7) // 8), "big")).decode(),
    }


MODULUS = RSA.public_key().public_numbers().n


SMALL_PRIMES = [p for p in range(3, 168) if all(p % d for d in range(2, p))]
PRIMORIAL = math.prod(SMALL_PRIMES)
ROCA = pow(65537, 1234, PRIMORIAL) + (PRIMORIAL << (2048 - PRIMORIAL.bit_length()))  # a power of 65537 modulo each
ROCA += PRIMORIAL * (1 - ROCA % 2)  # and odd


@pytest.mark.parametrize(
    ("jwk", "reason"),
    [
        ({"kty": "oct", "kid": "bad", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}, "symmetric"),
        (jwk_of(kid="bad", d="AAAA"), "private"),
        (jwk_of(RSA_PEM, kid="bad", p="AAAA"), "private"),
        (jwk_of(kid="bad", use="enc"), "use"),
        (jwk_of(kid="bad", use=["sig"]), "use"),
        (jwk_of(kid="bad", key_ops=["sign"]), "key_ops"),
        (jwk_of(kid="bad", key_ops="verify"), "key_ops"),
        (jwk_of(kid="bad", alg="RS256"), "fits none"),
        (jwk_of(kid="bad", alg="ES384"), "fits none"),
        (jwk_of(kid="bad", alg="none"), "fits none"),
        (jwk_of(kid="bad", alg=["ES256"]), "fits none"),
        (jwk_of(kid="bad", alg=None, crv="secp256k1"), "fits none"),
        (jwk_of(kid="bad", alg=None, crv="P-384"), "do not make"),
        (jwk_of(kid="bad", alg=None, crv=["P-256"]), "fits none"),
        (jwk_of(kid="bad", kty="RSA", alg=None), "do not make"),
        (jwk_of(kid="bad", kty=7), "fits none"),
        (jwk_of(kid="bad", x="AAAA"), "do not make"),
        (jwk_of(kid="bad", x=None), "do not make"),
        (jwk_of(kid="bad", x=7), "do not make"),
        (jwk_of(kid="bad", x="ä"), "do not make"),
        (jwk_of(kid="bad", x=jwk_of()["x"] + "="), "do not make"),
        (jwk_of(kid="bad", x=jwk_of()["y"]), "do not make"),
        (jwk_of(ED_PEM, kid="bad", x="AAAA"), "do not make"),
        (rsa_jwk(MODULUS >> 1024 | 1), "1024 bits"),
        (rsa_jwk(MODULUS << 7000 | 1), "9048 bits"),
        (rsa_jwk(MODULUS, 1), "exponent"),
        (rsa_jwk(MODULUS, 2), "exponent"),
        (rsa_jwk(MODULUS, 65536), "exponent"),
        (rsa_jwk(MODULUS, 2**64 + 1), "exponent"),
        (rsa_jwk(MODULUS - 1), "even modulus"),
        (rsa_jwk(ROCA), "ROCA"),
        (jwk_of(kid="bad") | {"kid": "k" * 257}, "kid"),
        (jwk_of(kid="bad") | {"kid": 7}, "kid"),
    ],
)
def test_bad_key_is_left_out_with_a_reason_and_the_others_stay(jwk, reason):
    keys = parse_jwks(jwks(jwk, jwk_of()), ALGORITHMS)
    assert list(keys.named) == [KID]
    assert keys.unnamed == ()
    assert len(keys.rejected) == 1
    assert reason in keys.rejected[0]
    with pytest.raises(InvalidKeys, match="no usable key"):
        parse_jwks(jwks(jwk), ALGORITHMS)


def test_kid_that_stands_for_two_keys_stands_for_none():
    other = jwk_of(generate_signing_key(), kid="twice")
    keys = parse_jwks(jwks(jwk_of(kid="twice"), other, jwk_of(RSA_PEM)), ALGORITHMS)
    assert "twice" not in keys.named
    assert len(keys.named) == 1
    assert "stands for 2 keys" in keys.rejected[0]


def test_unusable_key_does_not_take_a_kid_from_a_usable_one():
    keys = parse_jwks(jwks(jwk_of(RSA_PEM, kid=KID, use="enc"), jwk_of()), ALGORITHMS)
    assert list(keys.named) == [KID]


def test_key_outside_the_issuers_algorithms_is_left_out():
    keys = parse_jwks(jwks(jwk_of(), jwk_of(ED_PEM)), ["EdDSA"])
    assert [key.algorithms for key in keys.named.values()] == [frozenset({"EdDSA"})]


def test_sets_with_equal_keys_are_equal():
    """What is left out and how the document is spelt do not count."""
    one = parse_jwks(jwks(jwk_of(), jwk_of(ED_PEM)), ALGORITHMS)
    same = parse_jwks(jwks(jwk_of(ED_PEM), {"kty": "oct"}, jwk_of(extra=1)) + b"\n", ALGORITHMS)
    assert one == same
    assert one != parse_jwks(jwks(jwk_of(), jwk_of(RSA_PEM)), ALGORITHMS)
    assert one != parse_jwks(jwks(jwk_of(generate_signing_key(), kid=KID), jwk_of(ED_PEM)), ALGORITHMS)


def test_reasons_hold_no_key_material_and_no_control_characters():
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"
    document = jwks({"kty": "oct", "kid": "a\nb\x1b[31m" + "é" * 300, "k": secret}, jwk_of())
    (reason,) = parse_jwks(document, ALGORITHMS).rejected
    assert secret not in reason
    assert reason.isprintable()
    assert reason.isascii()
    assert len(reason) < 500


# Whatever else


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(IDP) | st.just("weir"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
CLAIM_NAMES = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "groups", "scope", "scp", "jti"])
HEADER_NAMES = st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jku", "jwk", "x5u", "cty", "zip"])
OUTCOMES = {"accepted", EXPIRED, NOT_YET_VALID, NOT_ACCEPTED, "unknown key", "keys missing"}


SAME_EVERY_TIME = settings(deadline=None, derandomize=True, max_examples=40)


@SAME_EVERY_TIME
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_have_one_of_the_known_outcomes(token):
    assert judge(token) == NOT_ACCEPTED


@SAME_EVERY_TIME
@given(st.dictionaries(CLAIM_NAMES, JSON), st.dictionaries(HEADER_NAMES, JSON), st.booleans())
def test_any_signed_json_has_one_of_the_known_outcomes(changed_claims, changed_header, is_loaded):
    body = json.dumps(claims() | changed_claims).encode()
    token = sign(body, changed_header)
    assert judge(token, {IDP: (ISSUER, KEYS["ES256"] if is_loaded else None)}) in OUTCOMES


@SAME_EVERY_TIME
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_no_flipped_bit_is_accepted(position, bit):
    token = bytearray(GOOD)
    token[position] ^= 1 << bit
    assert judge(bytes(token)) in {NOT_ACCEPTED, "unknown key"}


def keys_or_reason(document: bytes) -> KeySet | str:
    try:
        return parse_jwks(document, ALGORITHMS)
    except InvalidKeys as why:
        return str(why)


@SAME_EVERY_TIME
@given(st.lists(st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "kid", "use", "alg", "d"]), JSON)))
def test_any_document_is_a_key_set_or_invalid(members):
    document = jwks(*members, *({**jwk_of(), **member} for member in members))
    assert keys_or_reason(document)


# Certificates


def test_until_when_a_certificate_holds(tmp_path):
    authority = Authority(tmp_path)
    tomorrow = authority.issue("a", ["a"], days=1).cert.read_bytes()
    yesterday = authority.issue("b", ["b"], days=-1).cert.read_bytes()
    assert certificate_expiry(tomorrow) - certificate_expiry(yesterday) == pytest.approx(2 * 86_400, abs=60)
    assert certificate_expiry(tomorrow + yesterday) == certificate_expiry(tomorrow)  # a chain begins with its own


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_told(pem):
    with pytest.raises(InvalidKeys, match="holds no certificate in PEM form"):
        certificate_expiry(pem)
