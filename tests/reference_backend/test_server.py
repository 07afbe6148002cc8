"""The paths beside those of the protocols, and what wraps all of them."""

import aiohttp
import pytest
from yarl import URL

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.served import State  # noqa: E402
from tests.support.raw_client import RawClient, chat_request  # noqa: E402
from tests.support.tiny_model import running_api  # noqa: E402


@pytest.mark.parametrize(
    ("state", "told", "status"),
    [
        (State.READY, "ready", 200),
        (State.ASLEEP, "ready", 200),  # who asks for it wakes it
        (State.DRAINING, "draining", 503),
        (State.LOADING, "loading", 503),
        (State.FAILED, "failed", 503),
    ],
)
async def test_health_is_readiness(state, told, status):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        backend.served.state = state
        found = {}
        for path in ("/health", "/v2/health/ready", "/v2/health/live"):
            async with session.get(backend.url + path) as response:
                found[path] = (response.status, await response.json())
    assert found == {
        "/health": (status, {"status": told}),
        "/v2/health/ready": (status, {"ready": status == 200}),
        "/v2/health/live": (200, {"live": True}),
    }


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "why"),
    [
        (b"NOT HTTP\r\n\r\n", 400, "the request cannot be read: Invalid method encountered: b'NOT HTTP' ^"),
        (HEAD + b"a header\r\n\r\n", 400, "cannot be read: Invalid header token"),
        (HEAD + b"x: " + b"y" * 10_000 + b"\r\n\r\n", 400, "cannot be read: Got more than 8190 bytes"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "cannot be read: Invalid character in chunk size"),
        (HEAD + b"content-length: -1\r\n\r\n", 400, "cannot be read: Invalid character in Content-Length"),
        (HEAD + b"expect: \xff\r\ncontent-length: 0\r\n\r\n", 400, "cannot be read: 'utf-8' codec can't encode"),
        (chat_request(None, "expect: tea"), 417, "only 100-continue is known"),
        (chat_request(None, "expect: tea", path="/v1/nowhere"), 417, "only 100-continue is known"),
    ],
)
async def test_what_aiohttp_refuses_by_itself_is_told_in_our_form(sent, status, why, caplog):
    async with running_api() as backend, RawClient(URL(backend.url)) as client:
        client.send(sent)
        answer = await client.answer()
    error = answer.json["error"]
    assert (answer.status, answer.headers["content-type"], error["type"]) == (
        status,
        "application/json",
        "invalid_request_error",
    )
    assert why in error["message"]
    assert len(error["message"]) <= 200
    assert [record.levelname for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("path", ["/v2", "/v2/models/tiny", "/models/tiny/1/v2/nowhere"])
async def test_below_v2_it_is_told_in_that_protocols_form(path):
    async with running_api() as backend, RawClient(URL(backend.url)) as client:
        answer = await client.ask(None, "expect: tea", path=path)
    assert (answer.status, answer.json) == (
        417,
        {"error": "of what a client may expect, only 100-continue is known here"},
    )


async def test_who_expects_100_continue_is_told_so():
    async with running_api() as backend, RawClient(URL(backend.url)) as client:
        head, _, body = chat_request({}, "expect: 100-continue").partition(b"{")
        client.send(head)
        assert (await client.answer("HEAD")).status == 100
        client.send(b"{" + body)
        assert (await client.answer()).json["error"]["param"] == "model"
