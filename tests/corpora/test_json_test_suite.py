"""JSONTestSuite (https://github.com/nst/JSONTestSuite) as bodies of requests to a real gateway.

Alone, each of its documents is a request that names no model. Inside a good request, what is JSON reaches the backend
byte for byte, and what is not never does: a backend that cannot read a body answers 500, and clients could open its
breaker with that. Which of the two a document is, Python's reader says, kept from what RFC 8259 does not have.
"""

import json

import pytest

from tests.support.corpora import corpus
from tests.support.raw_client import Answer, RawClient
from tests.support.running_gateway import running_gateway
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"


def documents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(corpus("JSONTestSuite").glob("test_*/*.json"))}


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def is_json(document: bytes) -> bool:
    """RFC 8259: UTF-8, no NaN; and no half of a surrogate pair, which no UTF-8 could tell."""
    try:
        json.dumps(json.loads(document.decode(), parse_constant=refuse), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


async def post(client: RawClient, body: bytes, path: str = "/v1/chat/completions") -> Answer:
    lines = f"POST {path} HTTP/1.1", "host: gateway", "content-type: application/json", f"content-length: {len(body)}"
    client.send("\r\n".join([*lines, "", ""]).encode() + body)
    return await client.answer()


def is_bad_request(answer: Answer) -> bool:
    kind = answer.json["error"]["type"]
    return (answer.status, answer.headers["content-type"], kind) == (400, "application/json", "invalid_request_error")


def test_the_reader_that_judges_agrees_with_the_suite() -> None:
    verdicts = {name: is_json(document) for name, document in documents().items() if name[:2] in ("y_", "n_")}
    assert verdicts == {name: name.startswith("y_") for name in verdicts}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_alone_each_is_a_bad_request(tmp_path, path) -> None:
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        for name, document in documents().items():
            assert is_bad_request(await post(client, document, path)), name
    assert backend.bodies == []


async def test_inside_a_request_what_is_json_goes_on_unchanged_and_what_is_not_never_does(tmp_path) -> None:
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        for name, document in documents().items():
            body = b'{"model":"tiny","messages":[],"x":%b}' % document
            answer = await post(client, body)
            if is_json(document):
                assert (answer.status, backend.bodies) == (200, [body]), name
                backend.bodies.clear()
            else:
                assert is_bad_request(answer), name
    assert backend.bodies == []
