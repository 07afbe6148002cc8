"""Who may pass: tokens, keys that rotate or cannot be had, allow lists, and where a token must never turn up."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from policies.identity import generate_signing_key, jwks_of, mint
from tests.support.admin_client import page, scrape
from tests.support.jwks_server import jwks_server
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.raw_client import CHAT, RawClient
from tests.support.running_gateway import running_gateway, until
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"
IDP = "https://idp.example.com"
RSA = rsa.generate_private_key(65537, 2048).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
EC, NEW_EC, STRANGERS = generate_signing_key(), generate_signing_key(), generate_signing_key()


def keys(*private: bytes) -> bytes:
    """The key set that an identity provider publishes for these."""
    return json.dumps({"keys": [key for each in private for key in json.loads(jwks_of(each))["keys"]]}).encode()


BOTH = keys(RSA, EC)


def token(key: bytes = EC, **changes) -> str:
    claims = {"sub": "ann", "issuer": IDP, "audience": "weir", "ttl": 300.0, "wall": time.time()}
    return mint(key, **{**claims, **changes})


def bearer(of: str) -> str:
    return f"authorization: Bearer {of}"


def policy(jwks: str) -> str:
    return f"""
version: 1
issuers:
- {{issuer: "{IDP}", audience: weir, algorithms: [RS256, ES256], jwks: "{jwks}"}}
routes:
- {{name: research, match: {{model: "tiny*"}}, allow: ["group:research", "consumer:ci", "scope:chat"], to: [{{service: tiny}}]}}
- {{name: narrow, match: {{path: "/v1/embeddings"}}, allow: ["model:small"], to: [{{service: tiny}}]}}
- {{name: open, match: {{path: "/*"}}, to: [{{service: tiny}}]}}
"""


@contextlib.asynccontextmanager
async def guarded(home, document=BOTH, config="", status=200):
    """An identity provider, a backend of the models tiny and small, and a gateway that lets nobody in without a token."""
    async with jwks_server(document) as idp, ScriptedBackend() as backend:
        idp.status = status
        async with (
            running_gateway(
                home, backend.url, policy=policy(idp.url), models="[tiny, small]", config=config
            ) as gateway,
            RawClient(gateway.data_address) as client,
        ):
            yield gateway, client, idp, backend


async def ask(client, of: str, **options):
    document = options.pop("document", None)
    return await client.ask(document, bearer(of), **options)


def segment(document: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()


def signed_with_the_public_key() -> str:
    """The classic confusion: HS256, and the secret is what everybody knows."""
    claims = {"iss": IDP, "aud": "weir", "sub": "ann", "exp": time.time() + 300}
    signing_input = f"{segment({'alg': 'HS256', 'typ': 'JWT'})}.{segment(claims)}"
    public = serialization.load_pem_private_key(RSA, None).public_key()
    secret = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signature = base64.urlsafe_b64encode(hmac.digest(secret, signing_input.encode(), hashlib.sha256)).rstrip(b"=")
    return f"{signing_input}.{signature.decode()}"


def tampered() -> str:
    header, _, signature = token().split(".")
    return f"{header}.{segment({'iss': IDP, 'aud': 'weir', 'sub': 'root', 'exp': time.time() + 300})}.{signature}"


async def test_both_kinds_of_signature_are_taken_and_the_backend_hears_who_it_is(tmp_path) -> None:
    async with guarded(tmp_path) as (gateway, client, idp, backend):
        for key in (RSA, EC):
            answer = await ask(client, token(key, sub="ci"), document=CHAT)
            assert (answer.status, answer.json["usage"]["prompt_tokens"]) == (200, 3)
        assert gateway.recent.requests()[0]["consumer"] == "ci"
    assert idp.asked == 1
    for head in backend.heads:
        assert b"x-weir-consumer: ci\r\n" in head
        assert b"authorization" not in head.lower()


async def test_who_cannot_prove_it_is_told_no_more_than_needed(tmp_path) -> None:
    now = time.time()
    rows = [
        ("nothing", None, "a bearer token is needed"),
        ("another scheme", "authorization: Basic YTpi", "a bearer token is needed"),
        ("not a token", bearer("abc"), "token not accepted"),
        ("no signature", bearer(f"{segment({'alg': 'none'})}.{segment({'iss': IDP, 'sub': 'ann'})}."), "token not accepted"),
        ("the public key as a secret", bearer(signed_with_the_public_key()), "token not accepted"),
        ("changed claims", bearer(tampered()), "token not accepted"),
        ("a stranger's key", bearer(token(STRANGERS)), "token not accepted"),
        ("a stranger's key under a known name", bearer(token(STRANGERS, kid=json.loads(keys(EC))["keys"][0]["kid"])), "token not accepted"),
        ("another issuer", bearer(token(issuer="https://evil.example.com")), "token not accepted"),
        ("another audience", bearer(token(audience="other")), "token not accepted"),
        ("expired", bearer(token(wall=now - 3600)), "token expired"),
        ("not yet valid", bearer(token(wall=now + 3600)), "token not yet valid"),
        ("two tokens", bearer(f"{token()} {token()}"), "token not accepted"),
    ]  # fmt: skip
    async with guarded(tmp_path) as (gateway, client, _, backend):
        for name, line, message in rows:
            answer = await client.ask(None, *([line] if line else []))
            error = answer.json["error"]
            assert (answer.status, error["code"], error["type"]) == (401, "unauthenticated", "authentication_error"), (
                name
            )
            assert error["message"].startswith(message), name
            assert answer.headers["www-authenticate"].startswith("Bearer"), name
            assert error["request_id"] == answer.headers["x-request-id"]
            assert answer.headers["x-weir-policy"] == gateway.policy.policy.version
            assert "server-timing" in answer.headers
            if line:
                assert line.split()[-1] not in answer.body.decode()
            if answer.headers.get("connection") == "close":
                await client.__aexit__()
                await client.__aenter__()
        assert {request["end_reason"] for request in gateway.recent.requests()} == {"auth"}
    assert backend.heads == []


async def test_allow_lists_decide_by_group_consumer_scope_and_model(tmp_path) -> None:
    async with guarded(tmp_path) as (_, client, _, backend):
        for claims in ({"groups": ["research"]}, {"sub": "ci"}, {"scopes": ["chat", "x"]}):
            assert (await ask(client, token(**claims))).status == 200
        refused = await ask(client, token(groups=["sales"], scopes=["x"]))
        assert (refused.status, refused.json["error"]["code"]) == (403, "forbidden")
        assert refused.json["error"]["type"] == "permission_error"
        assert refused.json["error"]["rule"] == "routes.research.allow"
        assert "retry-after" not in refused.headers
        small = {"model": "small", "input": "x"}
        assert (await ask(client, token(), document=small, path="/v1/embeddings")).status == 200
        other = await ask(client, token(), document={"model": "huge", "input": "x"}, path="/v1/embeddings")
        assert (other.status, other.json["error"]["rule"]) == (403, "routes.narrow.allow")
    assert len(backend.heads) == 4


async def test_everybody_sees_the_models_that_are_for_them(tmp_path) -> None:
    async with guarded(tmp_path) as (_, client, _, _):

        async def get(of: str, path: str):
            client.send(f"GET {path} HTTP/1.1\r\nhost: a\r\n{bearer(of)}\r\n\r\n".encode())
            return await client.answer()

        async def models(of: str) -> list[str]:
            return [model["id"] for model in (await get(of, "/v1/models")).json["data"]]

        assert await models(token(groups=["research"])) == ["small", "tiny"]
        assert await models(token()) == ["small"]
        assert (await get(token(), "/v1/models/small")).json["id"] == "small"
        hidden, unknown = await get(token(), "/v1/models/tiny"), await get(token(), "/v1/models/none")
        assert hidden.status == unknown.status == 404
        assert hidden.json["error"]["message"] == unknown.json["error"]["message"]  # which of them exists is not told
        assert (await get("x.y.z", "/v1/models")).status == 401


async def test_a_refusal_has_the_form_of_the_protocol(tmp_path) -> None:
    async with guarded(tmp_path) as (_, client, _, _):
        anthropic = await client.ask(None, path="/v1/messages")
        assert anthropic.json["type"] == "error"
        assert anthropic.json["error"]["type"] == "authentication_error"
        assert anthropic.json["request_id"] == anthropic.headers["x-request-id"]
        await client.__aexit__()
        await client.__aenter__()
        oip = await client.ask(None, path="/v2/models/tiny/infer")
        assert (oip.status, oip.json["code"]) == (401, "unauthenticated")
        assert isinstance(oip.json["error"], str)


async def test_a_new_key_is_found_when_its_first_token_comes_and_an_old_one_dropped(tmp_path) -> None:
    async with guarded(tmp_path, keys(EC)) as (_, client, idp, _):
        old, new = token(EC, sub="ci"), token(NEW_EC, sub="ci")
        assert (await ask(client, old)).status == 200
        idp.document = keys(NEW_EC)
        assert (await ask(client, old)).status == 200
        assert idp.asked == 1
        assert (await ask(client, new)).status == 200
        assert idp.asked == 2
        assert (await ask(client, old)).status == 401  # remembered, and forgotten with its key
        for _ in range(20):
            assert (await ask(client, token(STRANGERS))).status == 401
        assert idp.asked == 2  # whoever invents key ids does not make us ask


async def test_without_keys_it_is_503_and_not_401_until_they_come(tmp_path) -> None:
    async with guarded(tmp_path, status=500) as (_, client, idp, backend):
        refused = await ask(client, token(sub="ci"))
        assert (refused.status, refused.json["error"]["code"]) == (503, "keys_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await ask(client, token(issuer="https://evil.example.com"))).status == 401  # no key could help it
        idp.status = 200
        async with asyncio.timeout(10):
            while (await ask(client, token(sub="ci"))).status != 200:
                await asyncio.sleep(0.05)
    assert len(backend.heads) == 1


@pytest.mark.parametrize("broken", ["outage", "empty set", "not JSON"])
async def test_keys_once_had_outlive_the_provider(tmp_path, broken) -> None:
    async with guarded(tmp_path) as (gateway, client, idp, _):
        assert (await ask(client, token(sub="ci"))).status == 200
        idp.status = 500 if broken == "outage" else 200
        idp.document = b'{"keys": []}' if broken == "empty set" else b"<html>"
        unknown = await ask(client, token(NEW_EC, sub="ci"))  # makes it ask; the key may exist all the same
        assert (unknown.status, unknown.json["error"]["code"]) == (503, "keys_unavailable")
        assert idp.asked == 2
        for key in (RSA, EC):
            assert (await ask(client, token(key, sub="ci"))).status == 200
        result = "failed" if broken == "outage" else "rejected"
        assert (await scrape(gateway)).value("weir_jwks_refresh_total", result=result) >= 1


async def test_a_token_that_is_remembered_is_judged_anew_by_a_new_policy(tmp_path) -> None:
    async with guarded(tmp_path) as (gateway, client, idp, _):
        of = token(groups=["research"])
        assert (await ask(client, of)).status == 200
        for change, status in ((("group:research", "group:others"), 403), (("audience: weir", "audience: other"), 401)):
            before = gateway.policy.policy
            (tmp_path / "policy.yaml").write_text(policy(idp.url).replace(*change))
            await until(lambda before=before: gateway.policy.policy is not before)
            answer = await ask(client, of)
            assert (answer.status, answer.headers["x-weir-policy"]) == (status, gateway.policy.policy.version)


async def test_a_token_turns_up_nowhere(tmp_path, capfd) -> None:
    good, expired, refused = token(sub="ci"), token(wall=time.time() - 3600), token(sub="eve")
    async with OtlpReceiver() as receiver:
        config = f"telemetry: {{otlp: {receiver.url}, sample: 100%}}\n"
        async with guarded(tmp_path, config=config) as (gateway, client, _, backend):
            assert [(await ask(client, each)).status for each in (good, expired, refused)] == [200, 401, 403]
            seen = [
                (await page(gateway, path)).text for path in ("/metrics", "/api/requests", "/api/policy", "/api/routes")
            ]
            seen += map(repr, backend.heads)
            await until(lambda: sum(span.kind == "server" for span in receiver.spans) == 3)
            seen.append(repr(receiver.spans))
        logged = capfd.readouterr()  # all lines are out when the gateway has stopped
    seen += [logged.out, logged.err]
    assert '"status":403' in logged.out
    for secret in (good, expired, refused):
        for part in secret.split(".")[1:]:
            assert not [text for text in seen if part in text]
