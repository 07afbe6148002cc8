"""Rows D of the fault matrix: tokens, the keys that prove them, and the clock that judges them."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from types import SimpleNamespace

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from gateway import identify
from gateway.keys import KeyStore, Timing
from policies.identity import generate_signing_key, jwks_of, mint
from tests.support import jwks_server as provider
from tests.support.admin_client import page, scrape
from tests.support.jwks_server import jwks_server
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import until
from tests.support.scripted_backend import BackendConnection, ScriptedBackend

pytestmark = pytest.mark.integration

IDP = "https://idp.example.com"
KEY, NEW_KEY, STRANGERS = generate_signing_key(), generate_signing_key(), generate_signing_key()
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
STREAM = {**CHAT, "stream": True}
MISSING = "a bearer token is needed: send `Authorization: Bearer TOKEN`"


def jwks(*keys: bytes, also: tuple[dict, ...] = ()) -> bytes:
    return json.dumps({"keys": [*(jwk for key in keys for jwk in json.loads(jwks_of(key))["keys"]), *also]}).encode()


KID = json.loads(jwks(KEY))["keys"][0]["kid"]


def token(key: bytes = KEY, **changes) -> str:
    told = {"sub": "ann", "issuer": IDP, "audience": "weir", "ttl": 300.0, "wall": time.time()}
    return mint(key, **{**told, **changes})


def signed(key: bytes = KEY, header: dict | None = None, **changes) -> str:
    """A token with a right signature over any claims; None leaves one out."""
    now = int(time.time())
    claims = {"iss": IDP, "aud": "weir", "sub": "ann", "iat": now, "exp": now + 300} | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm="ES256", headers={"kid": KID, **(header or {})})


def bearer(of: str) -> str:
    return f"authorization: Bearer {of}"


def segment(document: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()


def policy(idp, more: str = "") -> str:
    return f"""
version: 1
issuers:
- {{issuer: "{IDP}", audience: weir, algorithms: [RS256, ES256], jwks: "{idp.url}"}}
routes:
- {{name: all, match: {{path: "/*"}}, to: [{{service: tiny}}]}}
{more}"""


@contextlib.asynccontextmanager
async def guarded(row, document: bytes | None = None, script=None, policy_more: str = "", status: int = 200, **options):
    """An identity provider, a backend, and a gateway that lets nobody in without a token."""
    row.more_tasks = row.more_descriptors = 4  # connections between the gateway and the provider, kept by both
    backend = ScriptedBackend(script) if script else ScriptedBackend()
    async with jwks_server(jwks(KEY) if document is None else document) as idp, backend:
        idp.status = status
        async with row.gateway(backend.url, policy=policy(idp, policy_more), **options) as gateway:
            yield SimpleNamespace(gateway=gateway, idp=idp, backend=backend, address=gateway.data_address)


async def ask(at, *lines: str, **options):
    """On a connection of its own, because some refusals end it."""
    async with RawClient(at.address) as client:
        return await client.ask(options.pop("document", None), *lines, **options)


def without_id(answer) -> dict:
    error = answer.json["error"]
    return {name: value for name, value in error.items() if name != "request_id"}


class Wall:
    """A wall clock that can be set wrong."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def wall(monkeypatch) -> Wall:
    """The clock of every gateway of the test; what is measured, and not judged, goes by another."""
    wall = Wall()
    monkeypatch.setattr("gateway.app.time", SimpleNamespace(time=wall, perf_counter=time.perf_counter))
    return wall


@pytest.fixture
def quick_keys(monkeypatch):
    """Key sets are read as often as they are asked for, and a fetch has 0.3 s: the promised times, scaled down."""
    timing = Timing(url_refresh=600.0, fetch=0.3, refetch=0.0, retry=600.0, retry_at_most=600.0)
    monkeypatch.setattr(KeyStore.__init__, "__defaults__", (timing,))


async def test_D01_no_blank_basic_and_two_authorizations(row):
    rows = [
        ([], MISSING),
        (["authorization: "], MISSING),
        (["authorization: Bearer"], MISSING),
        (["authorization: Bearer "], MISSING),
        (["authorization: Basic YW5uOnB3"], MISSING),
        (["authorization: Negotiate abc"], MISSING),
        ([bearer("abc")], "token not accepted"),
        ([bearer(token(STRANGERS))], "token not accepted"),
        ([bearer(token(STRANGERS, kid=KID))], "token not accepted"),
        ([bearer(token(issuer="https://evil.example"))], "token not accepted"),
        ([bearer(token(audience="other"))], "token not accepted"),
    ]
    bodies: dict[str, list[dict]] = {MISSING: [], "token not accepted": []}
    async with guarded(row) as at:
        for lines, message in rows:
            answer = await ask(at, *lines)
            assert (answer.status, answer.json["error"]["message"]) == (401, message), lines
            assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
            bodies[message].append(without_id(answer))
        two = await ask(at, bearer(token()), bearer(token()))
        assert (two.status, two.json["error"]["code"]) == (400, "bad_request")
        assert (await ask(at, bearer(token()))).status == 200
        assert len(at.backend.heads) == 1
    for same in bodies.values():  # no oracle: which check failed cannot be told from outside
        assert all(body == same[0] for body in same)
    rules = [line.get("rule") for line in row.lines if line["status"] == 401]
    assert rules[:6] == ["token.missing"] * 6
    assert rules[6:] == ["token.form", "token.unknown_key", "token.signature", "token.issuer", "token.audience"]


async def test_D02_claims_that_are_wrong_missing_or_of_another_type(row):
    now = int(time.time())
    rows = [
        ("expired", {"exp": now - 31}, "token expired"),
        ("expired", {"exp": 0}, "token expired"),
        ("not_yet_valid", {"nbf": now + 3600}, "token not yet valid"),
        ("not_yet_valid", {"iat": now + 3600}, "token not yet valid"),
        ("times", {"exp": None}, "token not accepted"),
        ("times", {"exp": str(now + 300)}, "token not accepted"),
        ("times", {"exp": [now + 300]}, "token not accepted"),
        ("times", {"exp": True}, "token not accepted"),
        ("times", {"nbf": "0"}, "token not accepted"),
        ("issuer", {"iss": None}, "token not accepted"),
        ("issuer", {"iss": [IDP]}, "token not accepted"),
        ("issuer", {"iss": {IDP: 1}}, "token not accepted"),
        ("issuer", {"iss": IDP + "/"}, "token not accepted"),
        ("audience", {"aud": None}, "token not accepted"),
        ("audience", {"aud": "wei"}, "token not accepted"),
        ("audience", {"aud": "weirs"}, "token not accepted"),
        ("audience", {"aud": "weir other"}, "token not accepted"),
        ("names", {"aud": {"weir": 1}}, "token not accepted"),
        ("names", {"aud": [["weir"]]}, "token not accepted"),
        ("consumer", {"sub": None}, "token not accepted"),
        ("consumer", {"sub": ""}, "token not accepted"),
        ("consumer", {"sub": 7}, "token not accepted"),
        ("consumer", {"sub": ["ann"]}, "token not accepted"),
        ("consumer", {"sub": "ann\r\nx-weir-consumer: root"}, "token not accepted"),
        ("names", {"groups": {"admins": True}}, "token not accepted"),
    ]
    async with guarded(row) as at:
        for check, changes, message in rows:
            try:
                bad = signed(**changes)
            except TypeError:  # PyJWT will not write such an `iss`
                claims = {"iss": IDP, "aud": "weir", "sub": "ann", "exp": now + 300} | changes
                bad = jwt.api_jws.encode(json.dumps(claims).encode(), KEY, algorithm="ES256", headers={"kid": KID})
            answer = await ask(at, bearer(bad))
            assert (answer.status, answer.json["error"]["message"]) == (401, message), (check, changes)
        assert at.backend.heads == []
    assert [line["rule"] for line in row.lines] == [f"token.{check}" for check, _, _ in rows]


async def test_D03_attacks_on_the_header(row):
    rsa_key = rsa.generate_private_key(65537, 2048)
    rsa_pem = rsa_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = rsa_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    rsa_kid = json.loads(jwks_of(rsa_pem))["keys"][0]["kid"]
    claims = segment({"iss": IDP, "aud": "weir", "sub": "root", "exp": time.time() + 300})

    def hmac_with(secret: bytes) -> str:
        text = f"{segment({'alg': 'HS256', 'kid': rsa_kid})}.{claims}"
        mac = hmac.digest(secret, text.encode(), hashlib.sha256)
        return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

    async with jwks_server(jwks(STRANGERS)) as evil, guarded(row, jwks(KEY, rsa_pem)) as at:
        strange = json.loads(jwks(STRANGERS))["keys"][0]
        attacks = [
            *(f"{segment({'alg': alg, 'kid': KID})}.{claims}." for alg in ("none", "None", "nOnE", "", "XS256")),
            *(f"{segment({'alg': alg, 'kid': KID})}.{claims}.AAAA" for alg in ("none", "HS256", "ES257", "RSA-OAEP")),
            hmac_with(public_pem),
            hmac_with(public_pem.strip()),
            hmac_with(b""),
            signed(header={"crit": ["exp"]}),
            signed(header={"b64": False, "crit": ["b64"]}),
            signed(header={"typ": "logout+jwt"}),
            signed(STRANGERS),
            signed(STRANGERS, {"jku": evil.url}),
            signed(STRANGERS, {"x5u": evil.url}),
            signed(STRANGERS, {"jwk": strange, "kid": strange["kid"]}),
            signed(STRANGERS, {"x5c": ["MIIB"]}),
            signed(STRANGERS, {"kid": "../../../../etc/passwd"}),
            signed(STRANGERS, {"kid": f"{evil.url}#1"}),
            signed(STRANGERS, {"kid": "' OR 1=1 --"}),
        ]
        for attack in attacks:
            answer = await ask(at, bearer(attack))
            assert (answer.status, answer.json["error"]["message"]) == (401, "token not accepted"), attack
        assert evil.asked == 0
        assert at.backend.heads == []
        assert at.idp.asked <= 2  # an unknown `kid` may make us look once
    assert {line["rule"] for line in row.lines} == {
        f"token.{check}" for check in ("form", "algorithm", "header", "signature", "unknown_key")
    }


async def test_D04_a_thousand_unknown_kids(row):
    """1000 in four connections, as fast as they are answered."""

    async def flood(at, count: int) -> None:
        async with RawClient(at.address) as client:
            for number in range(count):
                answer = await client.ask(None, bearer(signed(STRANGERS, {"kid": f"{id(client)}-{number}"})))
                assert answer.status == 401

    async with guarded(row) as at:
        begun = asyncio.get_running_loop().time()
        await asyncio.gather(*(flood(at, 250) for _ in range(4)))
        windows = 1 + (asyncio.get_running_loop().time() - begun) // 10
        assert 1 < at.idp.asked <= 1 + windows
        assert (await ask(at, bearer(token()))).status == 200
        told = await scrape(at.gateway)
        assert told.value("weir_jwks_refresh_total", issuer=IDP) == at.idp.asked
        assert told.value("weir_tokens_remembered", found="refused") == 0  # they may be published any moment


async def test_D05_the_provider_is_away_and_its_keys_are_known(row, monkeypatch):
    """Keys are served stale for a day, here for 1.5 s, and are read each 0.1 s instead of 5 minutes."""
    timing = Timing(url_refresh=0.1, fetch=0.3, refetch=0.0, retry=0.05, retry_at_most=0.1, stale_at_most=1.5)
    monkeypatch.setattr(KeyStore.__init__, "__defaults__", (timing,))
    async with guarded(row) as at:
        assert (await ask(at, bearer(token()))).status == 200
        at.idp.status = 500
        asked = at.idp.asked
        await until(lambda: at.idp.asked > asked + 3)
        answer = await ask(at, bearer(token(sub="bob")))
        told = await scrape(at.gateway)
        if told.value("weir_jwks_age_seconds", issuer=IDP) < 1.5:  # a machine that was elsewhere for so long
            assert answer.status == 200
        assert told.value("weir_jwks_age_seconds", issuer=IDP) > 0
        assert told.value("weir_jwks_refresh_total", issuer=IDP, result="failed") >= 3
        async with asyncio.timeout(20):
            while (answer := await ask(at, bearer(token(sub="carol")))).status == 200:
                await asyncio.sleep(0.02)
        assert (answer.status, answer.json["error"]["code"]) == (503, "keys_unavailable")
        at.idp.status = 200
        async with asyncio.timeout(20):
            while (await ask(at, bearer(token(sub="dave")))).status != 200:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("cold", [True, False], ids=["at the start", "a key not known"])
async def test_D06_the_provider_is_away_and_the_key_is_not_known(row, quick_keys, cold):
    async with guarded(row, status=500 if cold else 200) as at:
        at.idp.status = 500
        tried = token() if cold else token(NEW_KEY)
        at.idp.document = jwks(KEY, NEW_KEY)
        refused = await ask(at, bearer(tried))
        assert (refused.status, refused.json["error"]["code"]) == (503, "keys_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await ask(at, bearer(token(issuer="https://evil.example")))).status == 401  # no key could prove it
        assert at.backend.heads == []
        assert (await page(at.gateway, "/readyz")).status == 200  # the bystander's issuer can be proved
        at.idp.status = 200
        assert (await ask(at, bearer(tried))).status == 200


async def test_D06_without_any_keys_it_is_not_ready(row, quick_keys):
    async with guarded(row, status=500, bystander=False) as at:
        (row.home / "row-keys.json").unlink()
        at.gateway.policy.reload()
        (row.home / "policy.yaml").write_text(policy(at.idp))
        await until(lambda: len(at.gateway.policy.policy.issuers) == 1)
        not_ready = await page(at.gateway, "/readyz")
        assert (not_ready.status, "no issuer's keys" in not_ready.text) == (503, True)
        at.idp.status = 200
        assert (await ask(at, bearer(token()))).status == 200
        assert (await page(at.gateway, "/readyz")).status == 200


SMALL_RSA = {"kty": "RSA", "kid": "small", "n": "AQAB" * 40, "e": "AQAB"}
SYMMETRIC = {"kty": "oct", "kid": "shared", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}


async def test_D07_bad_answers_take_no_good_key_away(row, quick_keys):
    twice = json.loads(jwks(NEW_KEY))["keys"][0]
    async with jwks_server(jwks(NEW_KEY)) as metadata, guarded(row) as at:
        rows = [
            ("slow", {"answer": provider.silence}, "failed"),
            ("drips", {"answer": provider.drip}, "failed"),
            ("10 MiB", {"answer": provider.flood}, "rejected"),
            ("cut", {"answer": provider.cut(jwks(NEW_KEY))}, "failed"),
            ("HTML", {"document": b"<!doctype html><title>Sign in</title>"}, "rejected"),
            ("elsewhere", {"status": 302, "headers": {"location": metadata.url}}, "failed"),
            ("empty set", {"document": b'{"keys": []}'}, "rejected"),
            ("nothing", {"document": b""}, "rejected"),
            ("not JSON", {"document": b'{"keys": ['}, "rejected"),
            ("deep", {"document": b"[" * 100_000}, "rejected"),
            ("one kid twice", {"document": json.dumps({"keys": [twice, twice]}).encode()}, "rejected"),
            ("RSA-1024", {"document": json.dumps({"keys": [SMALL_RSA]}).encode()}, "rejected"),
            ("symmetric", {"document": json.dumps({"keys": [SYMMETRIC]}).encode()}, "rejected"),
        ]
        for name, behaviour, result in rows:
            for attribute, normal in (("document", b""), ("status", 200), ("headers", {}), ("answer", None)):
                setattr(at.idp, attribute, behaviour.get(attribute, normal))
            counts = (await scrape(at.gateway)).value("weir_jwks_refresh_total", issuer=IDP, result=result)
            unknown = await ask(at, bearer(token(NEW_KEY)))  # makes it look; the key may exist all the same
            assert (unknown.status, unknown.json["error"]["code"]) == (503, "keys_unavailable"), name
            assert (await ask(at, bearer(token()))).status == 200, name
            told = await scrape(at.gateway)
            assert told.value("weir_jwks_refresh_total", issuer=IDP, result=result) == counts + 1, name
        assert metadata.asked == 0
        # A bad key costs no other key its place.
        at.idp.answer, at.idp.headers, at.idp.status = None, {}, 200
        at.idp.document = jwks(KEY, NEW_KEY, also=(SMALL_RSA, SYMMETRIC))
        for key in (NEW_KEY, KEY):
            assert (await ask(at, bearer(token(key)))).status == 200


async def test_D08_rotation(row, monkeypatch):
    """The set is read each 0.2 s instead of each 5 minutes."""
    timing = Timing(url_refresh=0.2, refetch=0.0)
    monkeypatch.setattr(KeyStore.__init__, "__defaults__", (timing,))
    async with guarded(row) as at:
        old, new = token(), token(NEW_KEY)
        assert [(await ask(at, bearer(each))).status for each in (old, new)] == [200, 401]
        at.idp.document = jwks(KEY, NEW_KEY)
        assert [(await ask(at, bearer(each))).status for each in (new, old)] == [200, 200]  # at its first token
        at.idp.document = jwks(NEW_KEY)
        async with asyncio.timeout(20):
            while (await ask(at, bearer(old))).status == 200:
                await asyncio.sleep(0.02)
        assert [(await ask(at, bearer(each))).status for each in (old, new)] == [401, 200]
    assert {line["status"] for line in row.lines} == {200, 401}


@pytest.mark.parametrize(("ahead", "message"), [(3600.0, "token expired"), (-3600.0, "token not yet valid")])
async def test_D09_a_clock_that_is_an_hour_off(row, wall, ahead, message):
    """What is measured (limits, timeouts) goes by another clock; only tokens are judged by this one."""
    plans = "plans: {p: {requests: 2/hour, burst: 2}}\nconsumers: [{match: {any: true}, plan: p}]\n"
    async with guarded(row, policy_more=plans, bystander=False) as at:
        assert (await ask(at, bearer(token()))).status == 200
        wall.ahead = ahead
        for of in (token(), token(sub="bob")):
            refused = await ask(at, bearer(of))
            if refused.status == 200:  # known from before the jump: until it ends by this clock
                assert ahead < 0
                continue
            assert (refused.status, refused.json["error"]["message"]) == (401, message)
        there = {"wall": time.time() + ahead}
        statuses = [(await ask(at, bearer(token(**there)))).status for _ in range(2)]
        assert statuses[-1] == 429  # an hour that never passed refills nothing
    async with guarded(row, bystander=False) as at:
        skew = (await scrape(at.gateway)).value("weir_clock_skew_seconds", issuer=IDP)
        assert abs(skew - ahead) < 30
        wall.ahead = 0.0
        assert (await ask(at, bearer(token()))).status == 200


async def test_D10_variants_of_one_token_are_one_caller(row):
    header, claims, signature = token().split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    r, s = raw[:32], P256_ORDER - int.from_bytes(raw[32:], "big")
    high = f"{header}.{claims}.{base64.urlsafe_b64encode(r + s.to_bytes(32, 'big')).rstrip(b'=').decode()}"
    plans = "plans: {p: {requests: 1/month, burst: 3}}\nconsumers: [{match: {any: true}, plan: p}]\n"
    async with guarded(row, policy_more=plans) as at:
        spelt = [f"{header}.{claims}.{signature}{tail}" for tail in ("=", "==", "A", "%3D", " x")]
        spelt += [f"{header}=.{claims}.{signature}", f"{header}.{claims}=.{signature}"]
        for variant in spelt:
            assert (await ask(at, bearer(variant))).status in (400, 401), variant
        assert (await ask(at, bearer(high))).status == 200
        assert (await ask(at, f"authorization: bearer  {header}.{claims}.{signature}")).status == 200
        assert (await ask(at, bearer(f"{header}.{claims}.{signature}"))).status == 200
        assert (await ask(at, bearer(high))).status == 429  # one bucket for all of them
    assert {line["consumer"] for line in row.lines if line["status"] in (200, 429)} == {"ann"}


async def test_D11_a_token_that_ends_in_the_middle_of_a_stream(row, wall):
    go_on = asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await go_on.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    async with guarded(row, script=slow, bystander=False) as at:
        of = token(ttl=300.0)
        async with RawClient(at.address) as client:
            client.send(chat_request(STREAM, bearer(of)))
            await until(lambda: at.backend.heads)
            wall.ahead = 3600.0
            late = await ask(at, bearer(of))
            assert (late.status, late.json["error"]["message"]) == (401, "token expired")
            go_on.set()
            answer = await client.answer()
        assert (answer.status, answer.whole) == (200, True)
        assert answer.body.endswith(b"data: [DONE]\n\n")
    assert sorted((line["status"], line["end_reason"]) for line in row.lines) == [(200, "ok"), (401, "auth")]


async def test_D12_more_tokens_than_are_remembered(row, monkeypatch):
    """300 callers where 100 are remembered (20,000 as shipped), 200 bad tokens where 50 are (10,000), 100 accounts."""
    monkeypatch.setattr(identify, "_MAX_REFUSED", 50)
    monkeypatch.setattr("gateway.admission.MOST_ACCOUNTS", 100)
    async with guarded(row) as at, RawClient(at.address) as client:
        at.gateway.pipeline._identifier._capacity = 100
        for number in range(300):
            assert (await client.ask(None, bearer(token(sub=f"caller-{number}")))).status == 200
        for number in range(200):
            assert (await client.ask(None, bearer(token(STRANGERS, sub=f"caller-{number}", kid=KID)))).status == 401
        told = await scrape(at.gateway)
        assert told.value("weir_tokens_remembered", found="verified") == 100
        assert told.value("weir_tokens_remembered", found="refused") == 50
        assert len(at.gateway.pipeline._admission._accounts) <= 100
        assert (await client.ask(None, bearer(token(sub="caller-0")))).status == 200  # forgotten, and known again
