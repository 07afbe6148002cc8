"""Who a request is for and how urgent it is, by every road that leads to a batch."""

import asyncio

import aiohttp
import grpc.aio
import pytest

from open_inference import SERVICE
from open_inference import inference_pb2 as pb
from reference_backend.engine.request import Priority
from reference_backend.incoming import terms
from reference_backend.refusals import ApiError
from reference_backend.tensors import ANYHOW, Terms
from tests.support.model_store import running_store

TURNSTILE = 'kind = "embedding"\nexecutor = "tests.support.turnstile"\nisolation = "thread"\nmax_batch = 4\n'


@pytest.mark.parametrize(
    ("headers", "left", "expected"),
    [
        ({}, None, ANYHOW),
        ({}, 3.0, Terms(103.0)),
        ({"x-weir-deadline-ms": "2500"}, None, Terms(102.5)),
        ({"x-weir-deadline-ms": "2500"}, 3.0, Terms(102.5)),
        ({"x-weir-deadline-ms": "2500"}, 2.0, Terms(102.0)),
        ({"x-weir-consumer": "ci", "x-weir-priority": "high"}, None, Terms(None, "ci", Priority.HIGH)),
        ({"x-weir-priority": "Low"}, None, Terms(priority=Priority.LOW)),
    ],
)
def test_how_a_request_is_wanted(headers, left, expected):
    assert terms(headers, 100.0, left) == expected


@pytest.mark.parametrize(
    "headers",
    [
        {"x-weir-priority": "urgent"},
        {"x-weir-priority": ""},
        *({"x-weir-deadline-ms": text} for text in ("", "-1", "1.5", "soon", "9" * 30, "\u0663")),
    ],
)
def test_what_cannot_be_read_is_refused(headers):
    with pytest.raises(ApiError, match=next(iter(headers))) as refused:
        terms(headers, 100.0)
    assert refused.value.status == 400


FULL = 8  # what a model of TURNSTILE with four that wait takes at a time


async def post(url, body, headers):
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()


async def over_http(store, word, headers):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [word]}
    await post(f"{store.url}/v2/models/one/infer", {"inputs": [tensor]}, headers)


async def over_grpc(store, word, headers):
    asked = pb.ModelInferRequest(model_name="one", raw_input_contents=[len(word).to_bytes(4, "little") + word.encode()])
    asked.inputs.add(name="text", datatype="BYTES", shape=[1])
    async with grpc.aio.insecure_channel(store.grpc) as channel:
        await channel.unary_unary(f"/{SERVICE}/ModelInfer")(asked.SerializeToString(), metadata=tuple(headers.items()))


async def over_embeddings(store, word, headers):
    await post(f"{store.url}/v1/embeddings", {"model": "one", "input": word}, headers)


@pytest.mark.parametrize("ask", [over_http, over_grpc, over_embeddings])
async def test_a_flood_of_one_keeps_nobody_else_out_of_the_next_batch(tmp_path, ask):
    async with running_store(tmp_path, {"one/1": TURNSTILE}) as store, asyncio.timeout(60):
        [served] = store.pool
        model = served.model._model
        async with asyncio.TaskGroup() as group:

            async def send(word, consumer, priority="normal"):
                """Have it waiting, or running, behind what was sent before."""
                headers = {"x-weir-consumer": consumer, "x-weir-priority": priority}
                group.create_task(ask(store, word, headers))
                while not any(word in batch for batch in model.batches) and word not in waiting():
                    await asyncio.sleep(0)

            def waiting():
                return [part.payload for request in model.batcher.batches._queue for part in request.waiting]

            for number in range(9):
                await send(f"flood {number}", "flood")
            assert [len(batch) for batch in model.batches] == [1, 4]  # one runs and one is ready, the others wait
            await send("light", "light")
            await send("urgent", "flood", "high")
            model.open.set()
        assert model.batches[2] == ["urgent", "light", "flood 5", "flood 6"]
        assert model.batches[3] == ["flood 7", "flood 8"]


@pytest.mark.parametrize("ask", [over_http, over_grpc, over_embeddings])
async def test_a_flood_that_fills_the_bound_keeps_nobody_else_out(tmp_path, ask):
    async with running_store(tmp_path, {"one/1": TURNSTILE + "max_waiting = 4\n"}) as store, asyncio.timeout(60):
        [served] = store.pool
        model = served.model
        async with asyncio.TaskGroup() as group:
            for number in range(FULL):
                group.create_task(ask(store, f"flood {number}", {"x-weir-consumer": "flood"}))
            while model.load().running + model.load().waiting < FULL:
                await asyncio.sleep(0)
            with pytest.raises((AssertionError, grpc.aio.AioRpcError), match="no room for another request"):
                await ask(store, "one too many", {"x-weir-consumer": "flood"})
            group.create_task(ask(store, "light", {"x-weir-consumer": "light"}))
            while model.load().running + model.load().waiting == FULL:
                await asyncio.sleep(0)
            model._model.open.set()
        assert "light" in model._model.batches[2]
