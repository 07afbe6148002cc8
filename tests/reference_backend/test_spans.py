"""One span per generation, below the caller's, whatever became of the request."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.spans import span_middleware  # noqa: E402
from tests.support.tiny_model import running_api  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEPT, NOT_KEPT = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
QUESTION = {"model": "tiny", "max_tokens": 3, "ignore_eos": True, "messages": [{"role": "user", "content": "Hi"}]}


class Spans:
    """Stands where the exporter would."""

    def __init__(self):
        self.found = []

    def emit(self, name, **fields):
        self.found.append((name, fields))


async def spans_of(path="/v1/chat/completions", body=QUESTION, **headers):
    spans = Spans()
    ticks = iter(range(1000, 2000))
    trace = span_middleware(spans, lambda: float(next(ticks)))
    async with running_api(trace) as backend, aiohttp.ClientSession() as session:
        await session.post(backend.url + path, json=body, headers=headers)
    return spans.found


async def test_a_span_continues_the_callers_trace():
    [(name, fields)] = await spans_of(traceparent=KEPT)
    assert name == "chat tiny"
    assert (fields["trace_id"], fields["parent_id"]) == (TRACE, PARENT)
    assert fields["span_id"] not in ("", PARENT)
    assert (fields["start"], fields["end"]) == (1000.0, 1001.0)
    tokens = fields["attributes"].pop("gen_ai.usage.input_tokens")
    assert tokens > 0
    assert fields["attributes"] == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "weir",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "http.response.status_code": 200,
        "gen_ai.usage.output_tokens": 3,
    }


@pytest.mark.parametrize(
    ("path", "headers", "count"),
    [
        ("/v1/chat/completions", {"traceparent": NOT_KEPT}, 0),
        ("/v1/chat/completions", {"traceparent": "nonsense"}, 1),
        ("/v1/chat/completions", {}, 1),
        ("/v1/nowhere", {"traceparent": KEPT}, 0),
    ],
)
async def test_who_gets_a_span(path, headers, count):
    found = await spans_of(path, **headers)
    assert len(found) == count
    assert all(fields["parent_id"] == "" and fields["trace_id"] for _, fields in found)


async def test_a_refusal_has_a_span_without_tokens():
    [(name, fields)] = await spans_of("/v1/completions", {"model": "gpt-7", "prompt": "a"}, traceparent=KEPT)
    assert (name, fields["attributes"]["http.response.status_code"]) == ("text_completion", 404)
    assert "gen_ai.usage.output_tokens" not in fields["attributes"]


async def test_embeddings_have_one_too():
    [(name, fields)] = await spans_of("/v1/embeddings", {"model": "tiny", "input": "a"})
    assert (name, fields["attributes"]["http.response.status_code"]) == (
        "embeddings tiny",
        400,
    )  # it writes, and embeds nothing


async def test_a_client_that_leaves_has_a_span_too():
    spans = Spans()
    trace = span_middleware(spans, lambda: 0.0)
    async with running_api(trace) as backend, aiohttp.ClientSession() as session:
        body = QUESTION | {"max_tokens": 400}
        leaving = asyncio.ensure_future(session.post(f"{backend.url}/v1/chat/completions", json=body))
        with backend.slowly():
            await backend.wait_load(lambda load: load.running)
            leaving.cancel()
            async with asyncio.timeout(10):
                while not spans.found:
                    await asyncio.sleep(0.002)
    assert spans.found[0][1]["attributes"]["http.response.status_code"] == 499
