"""Requests that schemathesis makes after OpenAI's own description of its API, right ones and wrong ones, to a real gateway.

A right request reaches the backend byte for byte, and its answer the client; a wrong one is passed on the same way or
refused as OpenAI's API refuses. `make fuzz` tries many more than the few of each operation here.
"""

import asyncio

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, note, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import content_type_conformance, not_a_server_error, response_schema_conformance

from tests.support.corpora import corpus
from tests.support.running_gateway import running_gateway
from tests.support.scripted_backend import BackendConnection, ScriptedBackend

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LOOP = "uvloop"
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
ANSWERS = {
    "POST /v1/chat/completions": {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
            }
        ],
        "usage": USAGE,
    },
    "POST /v1/completions": {
        "id": "1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "text": "hello"}],
        "usage": USAGE,
    },
    "POST /v1/embeddings": {
        "object": "list",
        "model": "tiny",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    "GET /v1/chat/completions": {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False},
}
DESCRIPTION = schemathesis.openapi.from_path(corpus("openai-openapi-subset", "openapi.json"))
OPERATIONS = {operation.label: operation for operation in (each.ok() for each in DESCRIPTION.get_all_operations())}
SHARES = {"POST /chat/completions": 12}  # of the examples that a test has elsewhere: making one takes half a second


async def answer(connection: BackendConnection) -> None:
    await connection.json(ANSWERS[f"{connection.head.split(b' ')[0].decode()} {connection.path.partition('?')[0]}"])


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
async def test_requests_after_the_description(tmp_path, label, mode) -> None:
    async with ScriptedBackend(answer) as backend, running_gateway(tmp_path, backend.url, models="[]") as gateway:
        await asyncio.to_thread(try_many, label, mode, backend, f"http://{gateway.data_address}/v1")


def try_many(label: str, mode: GenerationMode, backend: ScriptedBackend, url: str) -> None:
    must_pass = mode is GenerationMode.POSITIVE and label.startswith("POST")

    with requests.Session() as session:

        @settings(
            max_examples=settings().max_examples // SHARES.get(label, 4),
            phases=[Phase.generate],  # to shrink them takes minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(case=OPERATIONS[label].as_strategy(mode))
        def try_one(case: Case) -> None:
            backend.bodies.clear()
            response = case.call(base_url=url, session=session)
            note(f"{response.request.body!r} -> {response.status_code} {response.text}")
            case.validate_response(response, checks=CHECKS)
            check(response, backend.bodies, must_pass=must_pass and 0 < len(case.body["model"]) <= 256)

        try_one()


def check(response: schemathesis.Response, seen: list[bytes], *, must_pass: bool) -> None:
    assert "x-request-id" in response.headers
    if "x-weir-backend" in response.headers:
        assert (response.status_code, seen) == (200, [response.request.body or b""])
    else:
        assert (seen, must_pass) == ([], False)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert {"message", "type", "code", "param"} <= error.keys()
        assert error["type"] == "invalid_request_error"
