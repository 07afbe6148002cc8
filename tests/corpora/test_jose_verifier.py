"""Tokens that other people made to break verifiers: Wycheproof (https://github.com/C2SP/wycheproof) and the examples of
RFC 7515, 7520, 7797 and 8037 (https://github.com/ietf-jose/cookbook).

Their payloads are no claims, so the signature alone is judged; then each of them goes through a gateway, where all of
them must be 401. No vector that its authors call invalid is accepted. Those they call valid and that are refused here
are listed, each with the reason.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from policies import identity
from policies.errors import Unauthenticated
from policies.identity import ALGORITHMS, InvalidKeys, UnknownKey, parse_jwks
from policies.policy import Issuer
from tests.support.admin_client import scrape
from tests.support.corpora import corpus
from tests.support.jwks_server import jwks_server
from tests.support.raw_client import RawClient
from tests.support.running_gateway import running_gateway
from tests.support.scripted_backend import ScriptedBackend

LOOP = "uvloop"
IDP = "https://idp.example.com"

SYMMETRIC = "an HMAC key: whoever can check such a signature can also make one, so no issuer may use it"
ENCRYPTED = "a JWE: nothing here decrypts tokens"
NOT_ITS_ALGORITHM = "PS384 by a key whose `alg` is PS256"
NO_ALGORITHM = "its key's `alg` is ES521, which RFC 7518 does not have"
LOOSE_BASE64 = "a character that is not base64url, which a strict reader does not skip; and an HMAC key"
DETACHED = "its content is elsewhere (RFC 7515, F)"
UNENCODED = "`b64` is false: what is signed is not what the token says (RFC 7797); and an HMAC key"
JSON_FORM = "not the compact form, the only one that a header can hold (RFC 7519, 3)"

# (suite, tcId) of each vector that is called valid and refused here.
WYCHEPROOF_REFUSED = {
    ("signature", 1): SYMMETRIC,
    ("signature", 346): NOT_ITS_ALGORITHM,
    ("signature", 347): NO_ALGORITHM,
    ("signature", 348): SYMMETRIC,
    ("signature", 350): NOT_ITS_ALGORITHM,
    ("signature", 351): NO_ALGORITHM,
    ("signature", 352): SYMMETRIC,
    ("signature", 357): SYMMETRIC,  # 367 and 370 are the same bytes and called invalid
    ("signature", 358): SYMMETRIC,
    ("signature", 359): SYMMETRIC,
    ("signature", 372): LOOSE_BASE64,
    ("signature", 373): LOOSE_BASE64,
    ("signature", 376): SYMMETRIC,
    ("signature", 377): SYMMETRIC,
    ("key", 2): SYMMETRIC,
    ("key", 13): SYMMETRIC,
    ("key", 14): SYMMETRIC,
    ("key", 15): SYMMETRIC,
    ("crypto", 1): SYMMETRIC,
    ("crypto", 48): SYMMETRIC,
    ("crypto", 50): ENCRYPTED,
    ("crypto", 67): ENCRYPTED,
}
CASES = {"signature": 401, "key": 26, "crypto": 83, "encryption": 139}

# Each example of a signature; those that are not here encrypt.
COOKBOOK_REFUSED = {
    "curve25519/jws.json": None,
    "jws/4_1.rsa_v15_signature.json": None,
    "jws/4_2.rsa-pss_signature.json": None,
    "jws/4_3.ecdsa_signature.json": None,
    "jws/4_4.hmac-sha2_integrity_protection.json": SYMMETRIC,
    "jws/4_5.signature_with_detached_content.json": DETACHED,
    "jws/4_6.protecting_specific_header_fields.json": JSON_FORM,
    "jws/4_7.protecting_content_only.json": JSON_FORM,
    "jws/4_8.multiple_signatures.json": JSON_FORM,
    "rfc7797/4.2.hmac-sha2_b64_false.json": UNENCODED,
    "rfc7797/hmac-sha2_b64_false.json": UNENCODED,
}


class Vector(NamedTuple):
    """`token` in the form in which a client would send it. `keys` are those it must be judged by."""

    id: tuple[str, object]
    token: str
    keys: list[dict[str, Any]]
    is_valid: bool


def wycheproof(suite: str) -> Iterator[Vector]:
    document = json.loads(corpus("wycheproof-jose", f"json_web_{suite}_test.json").read_bytes())
    for group in document["testGroups"]:
        keys = group.get("public") or group["private"]
        for case in group["tests"]:
            yield Vector(
                (suite, case["tcId"]),
                as_sent(case.get("jws", case.get("jwe"))),
                keys.get("keys", [keys]),
                case["result"] == "valid",
            )


def cookbook() -> Iterator[Vector]:
    """Each form of each example. Of private keys the public part is taken, or they would be refused for that."""
    for path in sorted(corpus("jose-cookbook").rglob("*.json")):
        example = json.loads(path.read_bytes())
        name = path.relative_to(corpus("jose-cookbook")).as_posix()
        key = example.get("input", {}).get("key", [])
        keys = [public_part(each) for each in (key if isinstance(key, list) else [key]) if isinstance(each, dict)]
        for form, token in example.get("output", {}).items():
            yield Vector((name, form), as_sent(token), keys, is_valid=True)


def public_part(jwk: dict[str, Any]) -> dict[str, Any]:
    if jwk.get("kty") == "oct":
        return jwk
    return {name: value for name, value in jwk.items() if name not in identity._PRIVATE_MEMBERS}


def as_sent(token: object) -> str:
    return token if isinstance(token, str) else json.dumps(token)


def is_accepted(vector: Vector, algorithms=ALGORITHMS) -> bool:
    """Judge the signature alone."""
    issuer = Issuer(IDP, ("weir",), tuple(algorithms), "/keys.json")
    try:
        keys = parse_jwks(json.dumps({"keys": vector.keys}).encode(), algorithms)
        identity._check_signature(identity._open(vector.token), issuer, keys)
    except (Unauthenticated, UnknownKey, InvalidKeys):
        return False
    return True


@pytest.mark.parametrize("suite", ["signature", "key", "crypto"])
def test_wycheproof_is_judged_as_labelled_but_for_what_is_listed(suite):
    vectors = list(wycheproof(suite))
    assert len(vectors) == CASES[suite]
    accepted = {vector.id for vector in vectors if is_accepted(vector)}
    valid = {vector.id for vector in vectors if vector.is_valid}
    assert accepted - valid == set()
    assert valid - accepted == {vector_id for vector_id in WYCHEPROOF_REFUSED if vector_id[0] == suite}
    assert accepted or suite != "signature"


def test_two_vectors_of_wycheproof_are_mislabelled():
    tokens = {vector.id[1]: vector.token for vector in wycheproof("signature")}
    assert tokens[357] == tokens[367] == tokens[370]


def test_wycheproofs_encrypted_tokens_are_no_tokens():
    vectors = list(wycheproof("encryption"))
    assert len(vectors) == CASES["encryption"]
    for vector in vectors:
        assert not is_accepted(vector)


def test_the_cookbook_is_accepted_in_compact_form_but_for_what_is_listed():
    signed = [vector for vector in cookbook() if vector.id[0] in COOKBOOK_REFUSED]
    assert {vector.id[0] for vector in signed} == set(COOKBOOK_REFUSED)
    for vector in signed:
        name, form = vector.id
        expected = form == "compact" and COOKBOOK_REFUSED[name] is None
        assert is_accepted(vector) is expected, vector.id
        assert not is_accepted(vector, ["ES256"]), "by an algorithm that the issuer does not use"


def test_the_cookbooks_encrypted_tokens_are_no_tokens():
    encrypted = [vector for vector in cookbook() if vector.id[0] not in COOKBOOK_REFUSED]
    assert len(encrypted) > 20
    for vector in encrypted:
        assert not is_accepted(vector)


@pytest.mark.integration
async def test_each_of_them_is_401_at_the_door(tmp_path):
    """With the keys that signed them in force: what is signed well is still no claims of this issuer's."""
    vectors = [vector for suite in CASES for vector in wycheproof(suite)] + list(cookbook())
    keys = [key for vector in vectors for key in vector.keys if vector.id[0] == "signature"]
    usable = list({json.dumps(key): key for key in keys if key.get("kty") != "oct"}.values())[:64]
    async with (
        jwks_server(json.dumps({"keys": usable}).encode()) as idp,
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=policy(idp.url)) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        for vector in vectors:
            if len(vector.token) > 16_000 or not vector.token.isprintable():
                continue  # another refusal's case: the head is too large, or is none
            answer = await client.ask(None, f"authorization: Bearer {vector.token}")
            assert (answer.status, answer.json["error"]["code"]) == (401, "unauthenticated"), vector.id
            assert not vector.token or vector.token not in answer.body.decode()
        assert backend.heads == []
        assert (await scrape(gateway)).value("weir_requests_total", status="401", reason="auth") > 600


def policy(jwks: str) -> str:
    return f"""
version: 1
issuers:
- {{issuer: "{IDP}", audience: weir, algorithms: [{", ".join(ALGORITHMS)}], jwks: "{jwks}"}}
routes:
- {{name: all, match: {{path: "/*"}}, to: [{{service: tiny}}]}}
"""
