"""Key sets that other people wrote, through the key loader: the fixtures of PyJWT (https://github.com/jpadilla/pyjwt), and
the keys of the JOSE cookbook. They come from an endpoint on loopback, as an identity provider's do.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from random import Random

import aiohttp
import jwt
import pytest

from gateway.keys import KeyStore, Timing
from observability.events import KeysRefreshed
from policies.identity import ALGORITHMS, verify
from policies.policy import Issuer
from tests.support.corpora import corpus
from tests.support.jwks_server import JwksServer, jwks_server

pytestmark = pytest.mark.integration

IDP = "https://idp.example.com"
WALL = 1_800_000_000.0
PRIVATE, SYMMETRIC = "holds its private part", "symmetric"
OTHER_CURVE = "its type, curve or alg fits none of the issuer's algorithms"
NOT_TO_SIGN = "its use is not sig"

# File -> how many of its keys may be used, and why the others may not.
PYJWT = {
    "jwk_rsa_pub.json": (1, None),
    "jwk_ec_pub_P-256.json": (1, None),
    "jwk_ec_pub_P-384.json": (1, None),
    "jwk_ec_pub_P-521.json": (1, None),
    "jwk_okp_pub_Ed25519.json": (1, None),
    "jwk_okp_pub_Ed448.json": (0, OTHER_CURVE),
    "jwk_ec_pub_secp256k1.json": (0, OTHER_CURVE),
    "jwk_rsa_key.json": (0, PRIVATE),
    "jwk_ec_key_P-256.json": (0, PRIVATE),
    "jwk_ec_key_P-384.json": (0, PRIVATE),
    "jwk_ec_key_P-521.json": (0, PRIVATE),
    "jwk_ec_key_secp256k1.json": (0, PRIVATE),
    "jwk_okp_key_Ed25519.json": (0, PRIVATE),
    "jwk_okp_key_Ed448.json": (0, PRIVATE),
    "jwk_hmac.json": (0, SYMMETRIC),
    "jwk_empty.json": (0, "not a JSON object"),
    "jwk_keyset_with_unknown_alg.json": (1, NOT_TO_SIGN),
    "jwk_keyset_only_unknown_alg.json": (0, NOT_TO_SIGN),
}
COOKBOOK = {
    "3_1.ec_public_key.json": (1, None),
    "3_2.ec_private_key.json": (0, PRIVATE),
    "3_3.rsa_public_key.json": (1, None),
    "3_4.rsa_private_key.json": (0, PRIVATE),
    "3_5.symmetric_key_mac_computation.json": (0, SYMMETRIC),
    "3_6.symmetric_key_encryption.json": (0, SYMMETRIC),
}
PAIRS = {  # a private key, its public half, and what they sign with
    "jwk_rsa_key.json": ("jwk_rsa_pub.json", "RS256"),
    "jwk_ec_key_P-256.json": ("jwk_ec_pub_P-256.json", "ES256"),
    "jwk_ec_key_P-384.json": ("jwk_ec_pub_P-384.json", "ES384"),
    "jwk_ec_key_P-521.json": ("jwk_ec_pub_P-521.json", "ES512"),
    "jwk_okp_key_Ed25519.json": ("jwk_okp_pub_Ed25519.json", "EdDSA"),
}


def as_set(text: bytes) -> bytes:
    """A fixture as an endpoint would publish it: alone it is no key set."""
    document = json.loads(text) if text.strip() else None
    if document is None or "keys" in document:
        return text
    return json.dumps({"keys": [document]}).encode()


class Loader:
    """A key store with one issuer, and what it told."""

    def __init__(self, idp: JwksServer, store: KeyStore, issuer: Issuer, events: list[KeysRefreshed]) -> None:
        self.idp, self.store, self.issuer, self.events = idp, store, issuer, events

    async def load(self, document: bytes) -> KeysRefreshed:
        """Publish a document; what the next read made of it."""
        self.idp.document = document
        await self.store.refetch(self.issuer)
        return self.events[-1]

    @property
    def count(self) -> int:
        return len(self.store.keys_of(self.issuer) or ())


@contextlib.asynccontextmanager
async def loader(first: bytes) -> AsyncIterator[Loader]:
    events: list[KeysRefreshed] = []
    async with jwks_server(first) as idp, aiohttp.ClientSession() as session:
        issuer = Issuer(IDP, ("weir",), ALGORITHMS, idp.url)
        timing = Timing(refetch=0.0, retry=3600.0, retry_at_most=3600.0)
        store = KeyStore([issuer], session, events.append, Random(1), lambda: WALL, timing)
        running = asyncio.create_task(store.run())
        try:
            await store.wait_tried()
            yield Loader(idp, store, issuer, events)
        finally:
            running.cancel()
            await asyncio.wait([running])


GOOD = [("pyjwt-jwk-fixtures", "jwk_ec_pub_P-256.json"), ("pyjwt-jwk-fixtures", "jwk_rsa_pub.json")]


def good_set() -> bytes:
    return json.dumps({"keys": [json.loads(corpus(*where).read_bytes()) for where in GOOD]}).encode()


def fixtures():
    return [("pyjwt-jwk-fixtures", (name,), *told) for name, told in PYJWT.items()] + [
        ("jose-cookbook", ("jwk", name), *told) for name, told in COOKBOOK.items()
    ]


@pytest.mark.parametrize(("name", "path", "usable", "why"), fixtures())
async def test_a_set_is_taken_for_its_usable_keys_or_leaves_the_one_before_it(name, path, usable, why):
    document = as_set(corpus(name, *path).read_bytes())
    async with loader(good_set()) as loading:
        assert loading.count == 2
        told = await loading.load(document)
        assert told.result == ("ok" if usable else "rejected")
        assert loading.count == (usable or 2)
        assert loading.store.is_failing(loading.issuer) is not bool(usable)
        assert (why or "") in told.reason


async def test_nothing_is_left_out_of_the_tables():
    assert {path.name for path in corpus("pyjwt-jwk-fixtures").glob("*.json")} == set(PYJWT)
    assert {path.name for path in corpus("jose-cookbook", "jwk").glob("*.json")} == set(COOKBOOK)


@pytest.mark.parametrize(("private", "public", "algorithm"), [(key, *of) for key, of in PAIRS.items()])
async def test_what_the_private_key_signs_the_published_key_verifies(private, public, algorithm):
    key = jwt.PyJWK(json.loads(corpus("pyjwt-jwk-fixtures", private).read_bytes()), algorithm).key
    claims = {"iss": IDP, "aud": "weir", "sub": "ann", "exp": WALL + 60}
    token = jwt.encode(claims, key, algorithm=algorithm)
    async with loader(as_set(corpus("pyjwt-jwk-fixtures", public).read_bytes())) as loading:
        trusted = {IDP: (loading.issuer, loading.store.keys_of(loading.issuer))}
        assert verify(token, trusted, WALL).consumer == "ann"
