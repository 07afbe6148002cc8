"""The API over a real socket, with the default model behind it."""

import asyncio
import io
import json
import threading

import aiohttp
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend import incoming, load_report  # noqa: E402
from reference_backend.answers import DONE  # noqa: E402
from reference_backend.engine.request import Priority  # noqa: E402
from reference_backend.incoming import LARGEST_BODY  # noqa: E402
from reference_backend.served import State  # noqa: E402
from reference_backend.tokenizer import Tokenizer  # noqa: E402
from tests.support.tiny_model import CREATED, running_api  # noqa: E402

QUESTION = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "What is a KV cache?"}]}
ANSWER = "A KV cache keeps the keys and values of earlier tokens, so that each new token costs one step and not a whole pass."
ENDLESS = QUESTION | {"ignore_eos": True, "max_tokens": 400, "stream": True}


async def post(url, body, path="/v1/chat/completions", **headers):
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, data=io.BytesIO(json.dumps(body).encode()), headers=headers) as response,
    ):
        return response.status, response.headers, await response.read()


async def error_of(url, body, path="/v1/chat/completions", **headers):
    status, _, content = await post(url, body, path, **headers)
    return status, json.loads(content)["error"]["code"]


async def collect(lines, content):
    async for line in content:
        lines.append(line)


def events(content):
    """The JSON of each event; the closing one must be there."""
    assert content.endswith(DONE)
    lines = content.removesuffix(DONE).split(b"\n\n")
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line]


async def test_a_chat_is_answered_whole():
    async with running_api() as backend:
        status, headers, content = await post(backend.url, QUESTION)
    answer = json.loads(content)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (answer["created"], answer["model"], answer["object"]) == (CREATED, "tiny", "chat.completion")
    assert answer["usage"]["completion_tokens"] > 20
    assert "endpoint-load-metrics" not in headers


@pytest.mark.parametrize(("words", "is_apart"), [(10, False), (400, True)])
async def test_only_a_long_text_is_made_into_tokens_in_a_thread(words, is_apart, monkeypatch):
    places = []

    def encode(self, text):
        places.append(threading.current_thread())
        return encoded(self, text)

    encoded = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", encode)
    async with running_api() as backend:
        asked = {"model": "tiny", "prompt": "word " * words, "max_tokens": 1}
        status, _, _ = await post(backend.url, asked, "/v1/completions")
    assert (status, [place is not threading.current_thread() for place in places]) == (200, [is_apart])


async def test_a_chat_is_streamed_token_by_token():
    async with running_api() as backend:
        status, headers, content = await post(
            backend.url, QUESTION | {"stream": True, "stream_options": {"include_usage": True}}
        )
    first, *middle, last, usage = events(content)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"]["content"] for each in middle) == ANSWER
    assert len(middle) > 20
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    assert all(each["usage"] is None for each in (first, *middle, last))


async def test_a_completion_continues_the_prompt():
    body = {"model": "tiny", "prompt": "A canary is a new version", "temperature": 0, "max_tokens": 5}
    async with running_api() as backend:
        _, _, content = await post(backend.url, body, "/v1/completions")
        _, _, streamed = await post(backend.url, body | {"stream": True}, "/v1/completions")
    choice = json.loads(content)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert " that gets a small".startswith(choice["text"][:8])
    assert "".join(each["choices"][0]["text"] for each in events(streamed)) == choice["text"]
    assert all("usage" not in each for each in events(streamed))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_ends_the_answer(stream):
    body = QUESTION | {"stop": ["ys and val", "never"], "stream": stream, "max_tokens": 100}
    async with running_api() as backend:
        _, _, content = await post(backend.url, body)
        await backend.wait_idle()
    if stream:
        choices = [each["choices"][0] for each in events(content)]
        assert (
            "".join(each["delta"].get("content", "") for each in choices) == ANSWER.split("ys and val", maxsplit=1)[0]
        )
        assert choices[-1]["finish_reason"] == "stop"
        return
    choice = json.loads(content)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        ANSWER.split("ys and val", maxsplit=1)[0],
        "stop",
    )


async def test_equal_seeds_give_equal_answers():
    body = QUESTION | {"temperature": 2, "max_tokens": 20}
    async with running_api() as backend:
        texts = [
            json.loads((await post(backend.url, body | {"seed": seed}))[2])["choices"][0]["message"]["content"]
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_told_token_by_token(stream):
    """Greedy, so that each token is the likeliest of its alternatives; held-back text takes its tokens along."""
    body = QUESTION | {"logprobs": True, "top_logprobs": 2, "stop": ["and not"], "stream": stream}
    async with running_api() as backend:
        _, _, content = await post(backend.url, body)
    choices = [each["choices"][0] for each in (events(content) if stream else [json.loads(content)])]
    told = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    text = "".join(token["token"] for token in told)
    assert text.startswith(ANSWER.split("and not", maxsplit=1)[0])
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in told)
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in told)
    assert bytes(byte for token in told for byte in token["bytes"]).decode() == text


async def test_a_completion_tells_logprobs_in_its_own_form():
    body = {"model": "tiny", "prompt": "A canary is", "temperature": 0, "max_tokens": 4, "logprobs": 1}
    async with running_api() as backend:
        _, _, content = await post(backend.url, body, "/v1/completions")
    choice = json.loads(content)["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[t] for t in choice["logprobs"]["tokens"]]


async def test_a_prompt_that_is_known_is_told_as_cached_and_a_salt_hides_it():
    async with running_api() as backend:
        cached = [
            json.loads((await post(backend.url, QUESTION | more))[2])["usage"]["prompt_tokens_details"]["cached_tokens"]
            for more in ({}, {}, {"cache_salt": "mine"}, {"cache_salt": "mine"})
        ]
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0


async def test_priority_and_consumer_reach_the_worker(monkeypatch):
    handed = []
    async with running_api(start=False) as backend, aiohttp.ClientSession() as session:
        submit = backend.language.submit
        monkeypatch.setattr(backend.language, "submit", lambda *asked: handed.append(asked) or submit(*asked))
        headers = {"x-weir-priority": "high", "x-weir-consumer": "team-a"}
        asking = asyncio.ensure_future(
            session.post(f"{backend.url}/v1/chat/completions", json=QUESTION, headers=headers)
        )
        async with asyncio.timeout(5):
            while not backend.language.load().waiting:
                await asyncio.sleep(0.002)
        asking.cancel()
    [(_, _, terms, *_)] = handed
    assert (terms.priority, terms.tenant) == (Priority.HIGH, "team-a")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/chat/completions", QUESTION | {"model": "gpt-7"}, (404, "model_not_found")),
        ("/v1/chat/completions", QUESTION | {"n": 128}, (400, "bad_request")),
        ("/v1/chat/completions", [], (400, "bad_request")),
        (
            "/v1/chat/completions",
            QUESTION | {"messages": [{"role": "user", "content": "many words " * 600}]},
            (400, "context_length_exceeded"),
        ),
        (
            "/v1/chat/completions",
            QUESTION
            | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            (400, "unsupported_content"),
        ),
        ("/v1/completions", {"model": "tiny", "prompt": ""}, (400, "bad_request")),
        ("/v1/completions", {"model": "tiny", "prompt": "a" * LARGEST_BODY}, (413, "too_large")),
        ("/v1/completions", {"model": "tiny", "prompt": "1" * 3_900_000}, (400, "context_length_exceeded")),
        (
            "/v1/chat/completions",
            QUESTION | {"messages": [{"role": "user", "content": "1" * 3_900}] * 1000},
            (400, "context_length_exceeded"),
        ),
        ("/v1/audio/speech", {}, (404, "not_found")),
        ("/v1/models", {}, (405, "method_not_allowed")),
    ],
)
async def test_what_cannot_be_done_is_refused_in_json(path, body, expected):
    async with running_api() as backend:
        assert await error_of(backend.url, body, path) == expected
        assert backend.language.load().running == 0


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-encoding": "gzip"}, (415, "unsupported_encoding")),
        ({"x-weir-deadline-ms": "soon"}, (400, "bad_request")),
        ({"x-weir-priority": "urgent"}, (400, "bad_request")),
        ({"x-weir-deadline-ms": "-5"}, (400, "bad_request")),
        ({"x-weir-deadline-ms": "9" * 40}, (400, "bad_request")),
        ({"x-weir-deadline-ms": "0"}, (504, "deadline")),
    ],
)
async def test_headers_are_judged_too(headers, expected):
    async with running_api() as backend:
        assert await error_of(backend.url, QUESTION, **headers) == expected


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zip"])
async def test_a_body_is_not_decompressed_and_costs_neither_connection_nor_log(encoding, caplog):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(
                f"{backend.url}/v1/chat/completions",
                data=b"nothing of the kind",
                headers={"content-encoding": encoding},
            ) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (415, "unsupported_encoding")
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_deadline_cuts_an_answer_that_has_begun():
    now = [0.0]
    async with running_api(clock=lambda: now[0]) as backend, aiohttp.ClientSession() as session:
        headers = {"x-weir-deadline-ms": "1000"}
        with backend.slowly():
            async with session.post(f"{backend.url}/v1/chat/completions", json=ENDLESS, headers=headers) as response:
                first = await response.content.readuntil(b"\n\n")
                now[0] = 1.0
                rest = events(first + await response.read())
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert len(rest) < 400


EXTREMES = [
    {"temperature": 5e-324},
    {"temperature": 2, "top_k": 2**31 - 1, "top_p": 5e-324, "min_p": 1},
    {"top_p": 1 - 1e-16, "min_p": 5e-324, "seed": 2**63 - 1},
    {"seed": -(2**63), "frequency_penalty": 2, "presence_penalty": -2, "repetition_penalty": 10},
    {"seed": 0, "repetition_penalty": 0.1, "logprobs": True, "top_logprobs": 20},
    {"max_tokens": 1_000_000, "max_completion_tokens": 1, "stop": ["\0", "\N{GRINNING FACE}" * 100]},
    {"messages": [{"role": "user", "content": "\0\ud83d\ude00\N{REPLACEMENT CHARACTER}\r\n<|im_end|><|endoftext|>"}]},
    {"messages": [{"role": "user", "content": ""}, {"role": "system", "content": []}]},
    {"messages": [{"role": "assistant", "content": "x"}] * 40},
]


async def test_extremes_are_answered_all_together():
    """Every value that is allowed, at its limits, in one batch; then the integrity check and a sane answer."""
    async with running_api(slots=4, max_waiting=16) as backend:
        base = QUESTION | {"max_tokens": 8, "temperature": 1}
        answers = await asyncio.gather(*(post(backend.url, base | extreme) for extreme in EXTREMES))
        assert [status for status, _, _ in answers] == [200] * len(EXTREMES)
        await backend.wait_idle()
        assert json.loads((await post(backend.url, QUESTION))[2])["choices"][0]["message"]["content"] == ANSWER


async def test_metrics_are_those_of_the_worker():
    async with running_api() as backend, aiohttp.ClientSession() as session:
        await post(backend.url, QUESTION | {"max_tokens": 5})
        await backend.wait_idle()
        async with session.get(f"{backend.url}/metrics") as response:
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            page = await response.text()
    assert 'vllm:generation_tokens_total{model_name="tiny"} 5\n' in page
    assert 'weir_backend_load_max_running{model_name="tiny"} 4.0\n' in page


async def test_load_is_pushed_while_it_changes():
    async with running_api() as backend, aiohttp.ClientSession() as session:
        async with session.get(f"{backend.url}/load/stream") as pushed:
            assert pushed.headers["content-type"] == "text/event-stream"

            async def wait_for(condition):
                async with asyncio.timeout(10):
                    while not condition(report := await next_report(pushed.content)):
                        pass
                return report

            idle = await wait_for(lambda report: True)
            with backend.slowly():
                asking = asyncio.ensure_future(post(backend.url, QUESTION | {"ignore_eos": True, "max_tokens": 300}))
                busy = await wait_for(lambda report: report["running"] and report["kv_used"])
            await asking
            after = await wait_for(lambda report: not report["running"])
    assert (idle["running"], idle["max_running"], idle["free_slots"], idle["draining"]) == (0, 4, 8, False)
    assert (busy["running"], busy["waiting"], busy["free_slots"]) == (1, 0, 7)
    assert idle["seq"] < busy["seq"] < after["seq"]
    assert after["ttft_ms_p50"] > 0
    assert after["tpot_ms_p50"] > 0


async def next_report(content):
    return json.loads((await content.readuntil(b"\n\n")).removeprefix(b"data: "))


async def test_only_so_many_listen_to_the_load(monkeypatch):
    monkeypatch.setattr(load_report, "MOST_LISTENERS", 1)
    async with running_api() as backend, aiohttp.ClientSession() as session:
        url = f"{backend.url}/load/stream"
        async with session.get(url) as first:
            await next_report(first.content)
            async with session.get(url) as second:
                assert (second.status, (await second.json())["error"]["code"]) == (503, "too_many_listeners")
        async with asyncio.timeout(10):
            while backend.language.reporter.listeners:
                await asyncio.sleep(0.002)
        async with session.get(url) as third:
            assert third.status == 200


@pytest.mark.parametrize(("headers", "tells"), [({}, False), ({"endpoint-load-metrics-format": "json"}, True)])
async def test_load_stands_beside_the_usage_of_a_stream_for_who_asks(headers, tells):
    body = QUESTION | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    async with running_api() as backend:
        _, _, content = await post(backend.url, body, **headers)
    *others, last = events(content)
    assert ("load" in last) is tells
    assert not any("load" in each for each in others)
    if tells:
        assert (last["load"]["running"], last["load"]["max_running"]) == (0, 4)  # it has just ended


async def test_models_are_listed():
    card = {"id": "tiny", "object": "model", "created": CREATED, "owned_by": "weir"}
    async with running_api() as backend, aiohttp.ClientSession() as session:
        async with session.get(f"{backend.url}/v1/models") as response:
            assert await response.json() == {"object": "list", "data": [card]}
        async with session.get(f"{backend.url}/v1/models/tiny") as response:
            assert await response.json() == card
        async with session.get(f"{backend.url}/v1/models/%F0%9F%98%80") as response:
            assert response.status == 404


async def test_only_a_closed_backend_refuses_and_says_that_nothing_was_begun():
    async with running_api() as backend:
        backend.served.state = State.DRAINING
        assert (await post(backend.url, QUESTION))[0] == 200
        backend.served.state = State.CLOSED
        status, headers, content = await post(backend.url, QUESTION)
    assert (status, json.loads(content)["error"]["code"]) == (503, "draining")
    assert (headers["x-backend-not-started"], headers["retry-after"]) == ("true", "1")
    assert (headers["x-draining"], headers["connection"]) == ("true", "close")


async def test_a_full_backend_refuses_at_once_and_reports_its_load():
    async with running_api(start=False, slots=1, max_waiting=0) as backend, aiohttp.ClientSession() as session:
        first = asyncio.ensure_future(session.post(f"{backend.url}/v1/chat/completions", json=QUESTION))
        async with asyncio.timeout(5):
            while not backend.language.load().waiting:
                await asyncio.sleep(0.002)
        status, headers, content = await post(backend.url, QUESTION, **{"endpoint-load-metrics-format": "JSON"})
        first.cancel()
    assert (status, json.loads(content)["error"]["code"]) == (429, "queue_full")
    assert (headers["x-backend-not-started"], headers["retry-after"]) == ("true", "1")
    assert backend.language.rejects == 1
    report = json.loads(headers["endpoint-load-metrics"].removeprefix("JSON "))["named_metrics"]
    assert report == {"num_requests_running": 0, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.0, "seq": 1}


async def test_one_that_fills_the_backend_costs_no_other_consumer_a_refusal():
    async with running_api(start=False, slots=1, max_waiting=3) as backend, aiohttp.ClientSession() as session:
        url, asked = f"{backend.url}/v1/chat/completions", []
        for consumer, waiting in (("flood", 4), ("light", 5)):
            while len(asked) < waiting:
                headers = {"x-weir-consumer": consumer}
                asked.append(asyncio.ensure_future(session.post(url, json=QUESTION, headers=headers)))
            await backend.wait_load(lambda load, waiting=waiting: load.waiting == waiting)
            assert (await post(backend.url, QUESTION, **{"x-weir-consumer": "flood"}))[0] == 429
        for each in asked:
            each.cancel()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(stream):
    async with running_api(slots=1) as backend, aiohttp.ClientSession() as session:
        request = session.post(f"{backend.url}/v1/chat/completions", json=ENDLESS | {"stream": stream})
        leaving = asyncio.ensure_future(request)
        with backend.slowly():
            await backend.wait_load(lambda load: load.running)
            if stream:
                response = await leaving
                await response.content.readuntil(b"\n\n")
                response.close()
            leaving.cancel()
            await asyncio.wait({leaving})
        await backend.wait_idle()
        await asyncio.wait_for(backend.api.in_flight.wait_idle(), 5)
        assert (await post(backend.url, QUESTION))[0] == 200


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue():
    async with running_api(slots=1) as backend, aiohttp.ClientSession() as session:
        url = f"{backend.url}/v1/chat/completions"
        with backend.slowly():
            async with session.post(url, json=ENDLESS) as running:
                waiting = asyncio.ensure_future(session.post(url, json=QUESTION))
                await backend.wait_load(lambda load: load.waiting)
                waiting.cancel()
                await backend.wait_load(lambda load: not load.waiting)
                assert backend.language.load().running == 1
                running.close()
        await backend.wait_idle()


async def test_a_worker_that_ends_in_a_stream_never_looks_complete(monkeypatch):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        with backend.slowly():
            async with session.post(f"{backend.url}/v1/chat/completions", json=ENDLESS) as response:
                lines = [await response.content.readline()]
                monkeypatch.setattr(backend.engine.runner, "model", None)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await collect(lines, response.content)
        *_, last, blank = lines
        assert blank == b"\n"
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_restarted"
        assert DONE.strip() not in b"".join(lines)
        assert await error_of(backend.url, QUESTION) == (503, "loading")
        for path, body in (("/health", {"status": "loading"}), ("/v2/health/ready", {"ready": False})):
            async with session.get(backend.url + path) as health:
                assert (health.status, await health.json()) == (503, body)


async def test_scores_that_are_no_numbers_end_a_stream_and_not_the_backend(monkeypatch):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        with backend.slowly():
            async with session.post(f"{backend.url}/v1/chat/completions", json=ENDLESS) as response:
                lines = [await response.content.readline()]
                embedding = backend.engine.runner.model._embedding
                monkeypatch.setattr(backend.engine.runner.model, "_embedding", torch.full_like(embedding, torch.nan))
                with pytest.raises(aiohttp.ClientPayloadError):
                    await collect(lines, response.content)
        assert json.loads(lines[-2].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
        assert await error_of(backend.url, QUESTION) == (500, "engine_failed")
        monkeypatch.undo()
        await backend.wait_idle()
        assert json.loads((await post(backend.url, QUESTION))[2])["choices"][0]["message"]["content"] == ANSWER


async def test_a_bug_of_ours_in_a_stream_cuts_it(monkeypatch):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        with backend.slowly():
            async with session.post(f"{backend.url}/v1/chat/completions", json=ENDLESS) as response:
                lines = [await response.content.readline()]
                monkeypatch.setattr(backend.language.tokenizer, "decode", None)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await collect(lines, response.content)
        monkeypatch.undo()
        assert b"internal error" not in b"".join(lines)
        assert (await post(backend.url, QUESTION))[0] == 200


async def test_a_worker_that_ends_before_the_answer_is_a_503_that_may_go_elsewhere(monkeypatch):
    async with running_api() as backend:
        monkeypatch.setattr(backend.engine.runner, "model", None)
        status, headers, content = await post(backend.url, QUESTION)
    assert (status, json.loads(content)["error"]["code"]) == (503, "engine_restarted")
    assert headers["x-backend-not-started"] == "true"


async def test_a_bug_of_ours_is_told_without_a_traceback(monkeypatch):
    async with running_api() as backend:
        monkeypatch.setattr(backend.language, "tokenizer", None)
        status, _, content = await post(backend.url, QUESTION)
    assert (status, json.loads(content)["error"]["message"]) == (500, "internal error")


async def raw(backend, request):
    """The status line that answers these bytes, and the rest as far as it is there."""
    reader, writer = await asyncio.open_connection(*backend.url.removeprefix("http://").split(":"))
    writer.write(request)
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5), await asyncio.wait_for(reader.read(4096), 5)
    writer.close()
    return answer


async def test_a_consumer_that_is_no_text_is_refused_and_takes_no_place():
    body = json.dumps(QUESTION).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-weir-consumer: \xff\xed\xa0\x80\r\n"
    )
    async with running_api() as backend:
        status, rest = await raw(backend, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        await backend.wait_idle()
    assert status == b"HTTP/1.1 400 Bad Request\r\n"
    assert b"x-weir-consumer is not UTF-8" in rest


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 20_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ],
    ids=["version", "target", "header", "length"],
)
async def test_what_is_no_http_is_a_line_in_the_log_and_no_traceback(request_, caplog):
    caplog.set_level("INFO")
    async with running_api() as backend:
        status, _ = await raw(backend, request_)
    assert status == b"HTTP/1.0 400 Bad Request\r\n"
    [told] = [record for record in caplog.records if "cannot be read" in record.getMessage()]
    assert (told.levelname, told.exc_info, "\n" in told.getMessage()) == ("INFO", None, False)
    assert len(told.getMessage()) < 300
    assert not [record for record in caplog.records if record.levelno > 20]


@pytest.mark.parametrize("rest", [b"", b'"mod\r\nzz\r\n'], ids=["slow", "broken"])
async def test_a_body_that_does_not_come_is_given_up(rest, monkeypatch):
    monkeypatch.setattr(incoming, "BODY_SECONDS", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with running_api() as backend:
        reader, writer = await asyncio.open_connection(*backend.url.removeprefix("http://").split(":"))
        writer.write(head + b"5\r\n{" + rest)
        answer = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
    assert answer in (b"HTTP/1.1 408 Request Timeout\r\n", b"HTTP/1.0 400 Bad Request\r\n")
