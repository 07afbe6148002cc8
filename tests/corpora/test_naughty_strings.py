"""The Big List of Naughty Strings (https://github.com/minimaxir/big-list-of-naughty-strings) in each place of a request,
as a caller's name, and as what a registration says.

Whatever stands there: what may pass reaches the backend as it was sent, the rest is a refusal in JSON and never a 5xx;
the log stays one printable JSON line a request, and no label of a metric takes a value that a client made up.
"""

import json
import re
import time
from dataclasses import dataclass
from urllib.parse import quote, unquote

import pytest

from discovery.etcd import EtcdClient, EtcdSettings
from observability.events import END_REASONS
from observability.text import printable
from policies.identity import MAX_NAME_LENGTH, generate_signing_key, jwks_of, mint
from tests.support.admin_client import api, scrape
from tests.support.corpora import naughty_strings
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import CHAT, Answer, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, etcd_gateway, running_gateway, until
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"
IDP = "https://idp.example.com"
PASS, REFUSED = {200}, {400, 404}

# What stands at a label of a metric after a plain request, and the ends that a request may have.
KNOWN_LABELS = {"chat", "tiny", "other", "gateway", "", "input", "output", *END_REASONS, *map(str, range(200, 600))}


@dataclass(frozen=True)
class Place:
    """Where a string stands: the request with it, the statuses that are right, what the backend must see of it."""

    request: object
    statuses: object
    seen: object = lambda text: b""


def header(name: str):
    return lambda text: chat_request(None, f"{name}: {text}")


def at_path(path: str):
    return lambda text: chat_request(None, path=path.format(quote(text, safe="")))


def is_a_line(text: str) -> bool:
    """Whether HTTP lets it stand in a header: no control characters but tabs (RFC 9110, 5.5)."""
    return not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text)


PLACES = {
    "model": Place(
        lambda text: chat_request({**CHAT, "model": text}),
        lambda text: {404} if 0 < len(text) <= 256 else {400},
    ),
    "user and message": Place(
        lambda text: chat_request({**CHAT, "user": text, "messages": [{"role": "user", "content": text}]}),
        lambda text: PASS,
        lambda text: json.dumps(text).encode(),
    ),
    "message, unescaped": Place(
        lambda text: raw_chat(json.dumps({**CHAT, "user": text}, ensure_ascii=False).encode()),
        lambda text: PASS,
        lambda text: json.dumps(text, ensure_ascii=False).encode(),
    ),
    "header": Place(
        header("x-team"),
        lambda text: PASS if is_a_line(text) else {400},
        lambda text: b"x-team: %b\r\n" % text.encode().strip(b" \t"),
    ),
    "request id": Place(header("x-request-id"), lambda text: PASS if is_a_line(text) else {400}),
    "trace": Place(header("traceparent"), lambda text: PASS if is_a_line(text) else {400}),
    "host": Place(header("host"), lambda text: {400}),  # the second one
    "content type": Place(
        lambda text: chat_request(None).replace(b"application/json", text.encode()),
        lambda text: {200, 400},
    ),
    "query": Place(
        at_path("/v1/chat/completions?q={}"),
        lambda text: {200, 400},  # an encoded line end is not let through
        lambda text: b"?q=" + quote(text, safe="").encode(),
    ),
    "path": Place(
        at_path("/v1/{}"), lambda text: PASS | REFUSED, lambda text: b" /v1/" + quote(text, safe="").encode() + b" "
    ),
    "path, unescaped": Place(
        lambda text: chat_request(None, path=f"/v1/{text}"), lambda text: PASS | REFUSED
    ),
    "model of KServe": Place(at_path("/v2/models/{}/infer"), lambda text: REFUSED),
    "token": Place(header("authorization"), lambda text: PASS if is_a_line(text) else {400}),  # nobody is asked for one
}  # fmt: skip


def raw_chat(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(gateway, request: bytes) -> Answer:
    async with RawClient(gateway.data_address) as client:
        client.send(request)
        return await client.answer()


def check(answer: Answer, text: str) -> None:
    """An answer is whole and in JSON, and a refusal repeats nothing of what was sent."""
    assert answer.whole
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    if answer.status != 200:
        error = answer.json["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message.isascii()
        assert message.isprintable()
        assert len(text) < 8 or text not in message


def access_lines(out: str) -> list[dict]:
    """The access log. Every line of the log is printable, short and a JSON object."""
    lines = out.split("\n")[:-1]
    assert all(line.isprintable() and len(line) < 8192 for line in lines)
    return [line for line in map(json.loads, lines) if "request_id" in line]


@pytest.mark.parametrize("name", PLACES)
async def test_a_naughty_string_in_a_request(tmp_path, capfd, name) -> None:
    place, strings = PLACES[name], naughty_strings()
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        for text in strings:
            answer = await ask(gateway, place.request(text))
            check(answer, text)
            assert answer.status in place.statuses(text), repr(text)
            if answer.status == 200:
                assert place.seen(text) in backend.heads.pop() + backend.bodies.pop(), repr(text)
            assert backend.heads == []
        told = await scrape(gateway)
    lines = access_lines(capfd.readouterr().out)
    assert len(lines) == len(strings)
    assert {line["end_reason"] for line in lines} <= {"ok", "policy", "parse_error"}
    ours = [sample for sample in told.samples if sample.name.startswith(("weir_requests", "weir_limited", "gen_ai_"))]
    assert ours
    labels = {value for sample in ours for label, value in sample.labels.items() if label != "le"}
    assert labels <= KNOWN_LABELS


async def test_a_naughty_string_as_the_name_of_a_caller(tmp_path, capfd) -> None:
    """Of a token that is good but for its `sub`: the backend and the log see the same name, or nobody is let in."""
    key = generate_signing_key()
    (tmp_path / "keys.json").write_bytes(jwks_of(key))
    policy = OPEN_POLICY.replace(
        "anonymous: true",
        f"issuers: [{{issuer: '{IDP}', audience: weir, algorithms: [ES256], jwks: keys.json}}]",
    )
    names = []
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        for text in naughty_strings():
            token = mint(key, sub=text, groups=[text], issuer=IDP, audience="weir", ttl=300.0, wall=time.time())
            answer = await ask(gateway, chat_request(None, f"authorization: Bearer {token}"))
            check(answer, text)
            is_name = 0 < len(text) <= MAX_NAME_LENGTH and text.isprintable() and text == text.strip()
            assert answer.status == (200 if is_name else 401), repr(text)
            if is_name:
                names.append(text)
                [line] = re.findall(rb"x-weir-consumer: ([!-~ ]*)\r\n", backend.heads[-1])
                assert unquote(line.decode()) == text
    assert [line["consumer"] for line in access_lines(capfd.readouterr().out) if line["status"] == 200] == names


async def test_naughty_strings_in_registrations(tmp_path, capfd) -> None:
    """As models of one that is good, and as each of its other fields: what is refused hurts nobody else."""
    strings = naughty_strings()
    models = [text for text in strings if 0 < len(text) <= 200 and text.isprintable()]
    prefix = "/weir/v1/backends/"
    with EtcdServer(tmp_path) as etcd:
        async with (
            ScriptedBackend() as backend,
            etcd_gateway(tmp_path, etcd.url) as gateway,
            EtcdClient(EtcdSettings((etcd.url,))) as writer,
        ):
            for number, text in enumerate(strings):
                place = ("url", "zone", "state", "health", "protocols", "weight", "models", "extra")[number % 8]
                await writer.put(f"{prefix}{text}/key", document(backend.url))
                await writer.put(f"{prefix}poisoned/{number}", document(backend.url, {place: text}))
            for number in range(0, len(models), 100):
                named = [{"name": text} for text in models[number : number + 100]]
                await writer.put(f"{prefix}tiny/{number}", document(backend.url, {"models": named}))
            await until(
                lambda: sum(key.startswith("tiny/") for key in gateway.fleet.backends) == 1 + len(models) // 100
            )
            async with RawClient(gateway.data_address) as client:
                client.send(b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n")
                listed = (await client.answer()).json["data"]
                asked = [await client.ask({**CHAT, "model": text}) for text in models]
            told, shown = await scrape(gateway), await api(gateway, "backends")
    assert {model["id"] for model in listed} == set(models)
    assert {answer.status for answer in asked} == {200}
    assert {model["name"] for each in shown["backends"] for model in each["models"]} == set(models) | {"x"}
    counted = {labels["model"] for labels in told.series("gen_ai_client_token_usage_count")}
    assert counted == {printable(text) for text in models}
    assert len(access_lines(capfd.readouterr().out)) == 1 + len(models)


def document(url: str, changes: dict[str, object] | None = None) -> bytes:
    return json.dumps({"url": url, "models": [{"name": "x"}], **(changes or {})}).encode()
