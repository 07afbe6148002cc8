"""Tokens and key sets that nobody at an identity provider would make, beside PyJWT's own decoder."""

import json
from base64 import urlsafe_b64encode

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import assume, example, given
from hypothesis import strategies as st

from policies.errors import Unauthenticated
from policies.identity import (
    ALGORITHMS,
    LEEWAY_SECONDS,
    MAX_NAME_LENGTH,
    InvalidKeys,
    KeySet,
    UnknownKey,
    generate_signing_key,
    jwks_of,
    mint,
    parse_jwks,
    verify,
)
from policies.policy import Issuer, Principal

WALL = 1_800_000_000.0
IDP = "https://idp.example.com"
RSA_PEM = rsa.generate_private_key(65537, 2048).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
EC_PEM, STRANGERS_PEM = generate_signing_key(), generate_signing_key()
PRIVATE = {
    name: serialization.load_pem_private_key(pem, None)  # which takes as long as thirty signatures
    for name, pem in (("RS256", RSA_PEM), ("ES256", EC_PEM), ("strangers", STRANGERS_PEM))
}
JWKS = json.dumps({"keys": [key for pem in (RSA_PEM, EC_PEM) for key in json.loads(jwks_of(pem))["keys"]]}).encode()
GOOD_KEYS = json.loads(JWKS)["keys"]
KIDS = [key["kid"] for key in GOOD_KEYS]
PYJWT_KEYS = jwt.PyJWKSet.from_json(JWKS.decode())
ISSUER = Issuer(IDP, ("weir", "other"), ("RS256", "ES256"), "/keys.json")
TRUSTED = {IDP: (ISSUER, parse_jwks(JWKS, ISSUER.algorithms))}
GOOD = mint(EC_PEM, sub="ann", groups=["research"], issuer=IDP, audience="weir", ttl=60.0, wall=WALL)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.just(10**400)
)
things = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
instants = st.sampled_from(
    [WALL + d for d in (-61.0, -31.0, -30.0, -29.0, 0.0, 29.0, 30.0, 31.0, 60.0)]
) | st.sampled_from(
    [0, -1, 2**53, 2**53 + 1, 1e308, int(WALL) + 60, str(int(WALL) + 60), True, float("inf"), float("nan")]
)
names = st.sampled_from(
    ["ann", "", " ann", "a\nb", "x" * MAX_NAME_LENGTH, "x" * (MAX_NAME_LENGTH + 1), "größe", "\u202e", "a b"]
)
CLAIMS = {
    "iss": st.sampled_from([IDP, IDP, IDP, IDP + "/", "", None]),
    "aud": st.sampled_from(["weir", "weir", ["weir"], ["x", "other"], [], "x", ["weir", 1], {"weir": 1}, None]),
    "sub": names,
    "exp": instants,
    "nbf": instants,
    "iat": instants,
    "groups": st.lists(names, max_size=2) | names | things,
    "scope": names | things,
    "scp": st.lists(names, max_size=2) | things,
}


def b64(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def sign(header: object, payload: object, signer: str) -> bytes:
    signing_input = b64(json.dumps(header).encode()) + b"." + b64(json.dumps(payload).encode())
    algorithm = jwt.get_algorithm_by_name("RS256" if signer == "RS256" else "ES256")
    return signing_input + b"." + b64(algorithm.sign(signing_input, PRIVATE[signer]))


def judge(token: str | bytes, trusted=TRUSTED) -> Principal | str:
    """Whom it names, or in a word why nobody. Anything but a refusal and the question for a key is a failure."""
    try:
        return verify(token, trusted, WALL)
    except Unauthenticated as refusal:
        return refusal.message
    except UnknownKey:
        return "unknown key"


@st.composite
def payloads(draw) -> dict[str, object]:
    """Claims that are good but for some."""
    changed = draw(st.sets(st.sampled_from(sorted(CLAIMS)), max_size=2))
    good = {"iss": IDP, "aud": "weir", "sub": "ann", "exp": WALL + 60.0}
    return good | {name: draw(CLAIMS[name]) for name in sorted(changed)}


@st.composite
def headers(draw) -> dict[str, object]:
    changes = {
        "alg": st.sampled_from(["RS256", "ES256", "none", "HS256", "PS256", "es256", "", None, 1]),
        "kid": st.sampled_from([*KIDS, "x", "", None, 1, "x" * 300]),
        "typ": st.sampled_from(["JWT", "jwt", "at+jwt", "application/at+jwt", "x", None]),
        "crit": things,
        "jku": things,
        "b64": st.booleans(),
        "x": things,
    }
    chosen = draw(st.sets(st.sampled_from(sorted(changes)), max_size=1))
    return {name: draw(changes[name]) for name in sorted(chosen)}


@given(payloads(), headers(), st.sampled_from(["RS256", "ES256", "ES256", "strangers"]))
def test_whom_a_token_names_is_whom_another_library_reads(payload, changes, signer) -> None:
    """What is accepted here is accepted by PyJWT with the same keys, and says there what it says here."""
    algorithm = "RS256" if signer == "RS256" else "ES256"
    kid = {"RS256": KIDS[0]}.get(signer, KIDS[1])
    token = sign({"alg": algorithm, "kid": kid} | changes, payload, signer)
    judged = judge(token)
    if isinstance(judged, str):
        assert judged in ("token expired", "token not yet valid", "token not accepted", "unknown key")
        return
    assert signer != "strangers"
    key = PYJWT_KEYS[jwt.get_unverified_header(token)["kid"]]
    read = jwt.decode(
        token.decode(), key, algorithms=[algorithm], audience=["weir", "other"], issuer=IDP,
        options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "require": ["exp", "iss", "aud", "sub"]},
    )  # fmt: skip
    assert (judged.consumer, judged.issuer, judged.expires_at) == (read["sub"], IDP, read["exp"])
    assert judged.expires_at + LEEWAY_SECONDS > WALL
    assert all(read[name] <= WALL + LEEWAY_SECONDS for name in ("nbf", "iat") if name in read)
    for name in (judged.consumer, *judged.groups, *judged.scopes):
        assert 0 < len(name) <= MAX_NAME_LENGTH
        assert name.isprintable()
        assert name == name.strip()


@given(payloads())
def test_a_plain_token_is_taken_whatever_else_it_says(payload) -> None:
    """The other way: what PyJWT takes for plain names and times is taken here."""
    plain = {name: payload[name] for name in ("iss", "aud", "exp")} | {"sub": "ann"}
    token = sign({"alg": "ES256", "kid": KIDS[1]}, plain, "ES256")
    try:
        jwt.decode(
            token.decode(),
            PYJWT_KEYS[KIDS[1]],
            algorithms=["ES256"],
            audience="weir",
            issuer=IDP,
            options={"verify_exp": False},
        )
    except jwt.PyJWTError:
        assume(False)
    assume(isinstance(plain["exp"], float) and WALL - LEEWAY_SECONDS < plain["exp"] < 2**53)
    assert judge(token) == Principal("ann", frozenset(), frozenset(), IDP, plain["exp"])


@given(st.data())
def test_a_token_has_one_spelling(data) -> None:
    """A good token with a few bytes of it changed, lost or added names nobody."""
    spoilt = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(spoilt)))
        spoilt[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.text("ABCDwxyz0189-_=.+/ ", max_size=2).map(str.encode)
        )
    assume(bytes(spoilt) != GOOD.encode())
    assert isinstance(judge(bytes(spoilt)), str)


@given(
    st.binary(max_size=60) | st.lists(st.binary(max_size=20).map(b64), max_size=4).map(b".".join) | st.text(max_size=20)
)
@example(b"..")
@example(
    b64(b'{"alg":"ES256"}') + b"." + b64(b'{"iss":"https://idp.example.com","exp":1' + b"0" * 5000 + b"}") + b".AA"
)
def test_what_is_no_token_names_nobody(token) -> None:
    assert judge(token) == "token not accepted"


MEMBERS = ["kty", "crv", "x", "y", "n", "e", "kid", "alg", "use", "key_ops", "d", "k", "x5c"]
WORDS = [
    "RSA",
    "EC",
    "OKP",
    "oct",
    "P-256",
    "P-384",
    "Ed25519",
    "Ed448",
    "RS256",
    "ES256",
    "EdDSA",
    "sig",
    "enc",
    "AQAB",
    "AA",
    "",
    "=",
    "A" * 400,
]


@st.composite
def key_sets(draw) -> list[object]:
    """Keys that are good, with members changed in some, and things that are none."""
    keys: list[object] = []
    for key in draw(st.lists(st.sampled_from(GOOD_KEYS), max_size=4)):
        changes = draw(st.dictionaries(st.sampled_from(MEMBERS), st.sampled_from(WORDS) | things, max_size=3))
        keys.append(draw(st.just(key | changes) | things) if changes else key)
    return keys


def read_keys(document: bytes, algorithms) -> KeySet | str:
    """The set, or why there is none. Anything but InvalidKeys is a failure."""
    try:
        return parse_jwks(document, algorithms)
    except InvalidKeys as refused:
        return str(refused)


@given(key_sets(), st.sets(st.sampled_from(ALGORITHMS), min_size=1))
def test_a_key_set_holds_what_is_sound_of_it_or_is_refused(keys, algorithms) -> None:
    good = [key for key in GOOD_KEYS if keys.count(key) == 1 and key["alg"] in algorithms]
    others = {json.dumps(key["kid"]) for key in keys if isinstance(key, dict) and key not in good and "kid" in key}
    expected = {key["kid"] for key in good if json.dumps(key["kid"]) not in others}
    found = read_keys(json.dumps({"keys": keys}).encode(), algorithms)
    if isinstance(found, str):
        assert expected == set()
        assert found.isprintable()
        return
    assert expected <= found.named.keys()
    for key in (*found.named.values(), *found.unnamed):
        assert key.algorithms
        assert key.algorithms <= algorithms
    assert "".join(found.rejected).isprintable()


@given(
    st.binary(max_size=60)
    | things.map(lambda thing: json.dumps(thing).encode())
    | things.map(lambda thing: json.dumps({"keys": thing}).encode())
)
@example(b'{"keys":[{"kty":"RSA","n":1' + b"0" * 5000 + b"}]}")
def test_what_is_no_key_set_is_refused(document) -> None:
    assert isinstance(read_keys(document, ALGORITHMS), str)
