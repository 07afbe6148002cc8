"""The Open Inference Protocol over gRPC: Triton's own client, then what no client of theirs would send."""

import asyncio
import json
import struct

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from open_inference import SERVICE
from open_inference import inference_pb2 as pb
from open_inference.orca_load_report_pb2 import OrcaLoadReport
from reference_backend import open_inference_grpc
from reference_backend.changing import InFlight
from reference_backend.served import State
from tests.support.grpc_backend import PREFACE, data, frame, headers
from tests.support.model_store import ADDER, put, running_store

LEFT = np.arange(6, dtype=np.float32).reshape(2, 3)


def inputs():
    made = [
        tritonclient.grpc.InferInput("left", [2, 3], "FP32"),
        tritonclient.grpc.InferInput("right", [2, 3], "FP32"),
        tritonclient.grpc.InferInput("words", [2], "BYTES"),
    ]
    made[0].set_data_from_numpy(LEFT)
    made[1].set_data_from_numpy(LEFT * 2)
    made[2].set_data_from_numpy(np.array(["ab", "\u00e4"], dtype=np.object_))
    return made


async def test_triton_s_client_is_served(tmp_path):
    models = {"adder/1": ADDER, "adder/2": ADDER}
    async with (
        running_store(tmp_path, models, "--serve", "adder@all") as store,
        tritonclient.grpc.aio.InferenceServerClient(store.grpc) as client,
    ):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("adder", "1")
        assert (await client.get_server_metadata()).extensions[0] == "binary_tensor_data"
        told = await client.get_model_metadata("adder")
        assert (list(told.versions), told.inputs[2].datatype, list(told.inputs[0].shape)) == (
            ["1", "2"],
            "BYTES",
            [-1, 3],
        )
        config = (await client.get_model_config("adder", "2")).config
        assert (config.input[2].data_type, list(config.output[0].dims)) == (13, [-1, 3])  # TYPE_STRING

        result = await client.infer("adder", inputs(), model_version="1", request_id="x")
        assert (result.as_numpy("sum") == LEFT * 3).all()
        assert result.as_numpy("words").tolist() == [b"ba", "\u00e4".encode()[::-1]]
        told = result.get_response()
        assert (told.model_name, told.model_version, told.id) == ("adder", "1", "x")
        wanted = [tritonclient.grpc.InferRequestedOutput("sum")]
        result = await client.infer("adder", inputs(), outputs=wanted)
        assert [output.name for output in result.get_response().outputs] == ["sum"]
        assert result.get_response().model_version == "2"

        with pytest.raises(InferenceServerException, match="input 'words' is missing"):
            await client.infer("adder", inputs()[:2])
        with pytest.raises(InferenceServerException, match="model 'gone' is not served here"):
            await client.infer("gone", inputs())

        put(store.root, "new/3")
        states = {(each.name, each.version): each.state for each in (await client.get_model_repository_index()).models}
        assert states == {("adder", "1"): "READY", ("adder", "2"): "READY", ("new", "3"): "UNAVAILABLE"}
        await client.load_model("new")
        assert await client.is_model_ready("new", "3")
        await client.unload_model("new")
        with pytest.raises(InferenceServerException, match="there is no model 'gone'"):
            await client.load_model("gone")


async def test_a_stream_answers_each_message_and_goes_on_after_a_bad_one(tmp_path):
    async def asked():
        yield {"model_name": "adder", "inputs": inputs(), "request_id": "1"}
        yield {"model_name": "gone", "inputs": inputs(), "request_id": "2"}
        yield {"model_name": "adder", "inputs": inputs(), "request_id": "3"}

    async with running_store(tmp_path) as store, tritonclient.grpc.aio.InferenceServerClient(store.grpc) as client:
        answers = [answer async for answer in client.stream_infer(asked())]
    assert [error and str(error)[:26] for _, error in answers] == [None, "model 'gone' is not served", None]
    assert [result.get_response().id for result, error in answers if error is None] == ["1", "3"]


def row(name, **contents):
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype="FP32", shape=[1, 3], contents=pb.InferTensorContents(**contents)
    )


GOOD = pb.ModelInferRequest(
    model_name="adder",
    inputs=[
        row("left", fp32_contents=[1, 2, 3]),
        row("right", fp32_contents=[10, 20, 30]),
        pb.ModelInferRequest.InferInputTensor(
            name="words", datatype="BYTES", shape=[1], contents=pb.InferTensorContents(bytes_contents=[b"ab"])
        ),
    ],
)


async def call(store, message, method="ModelInfer", answer=pb.ModelInferResponse, **how):
    """One call with a message, or with any bytes. Gives the answer and its trailers."""
    async with grpc.aio.insecure_channel(store.grpc) as channel:
        encoded = message if isinstance(message, bytes) else message.SerializeToString()
        calling = channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=answer.FromString)(encoded, **how)
        told = await calling
        return told, dict(await calling.trailing_metadata())


async def refusal(store, message, **how):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(store, message, **how)
    return refused.value.code().name, refused.value.details(), dict(refused.value.trailing_metadata())


def changed(place=None, **fields):
    message = pb.ModelInferRequest()
    message.CopyFrom(GOOD)
    other = (pb.ModelInferRequest if place is None else pb.ModelInferRequest.InferInputTensor)(**fields)
    target = message if place is None else message.inputs[place]
    for name in fields:
        target.ClearField(name)
    target.MergeFrom(other)
    return message


async def test_tensors_in_fields_are_answered_in_fields(tmp_path):
    async with running_store(tmp_path) as store:
        told, trailers = await call(store, GOOD, metadata=(("endpoint-load-metrics-format", "json"),))
    assert [list(output.contents.fp32_contents) for output in told.outputs] == [[11, 22, 33], []]
    assert list(told.outputs[1].contents.bytes_contents) == [b"ba"]
    assert not told.raw_output_contents
    load = json.loads(trailers["endpoint-load-metrics"].removeprefix("JSON "))["named_metrics"]
    assert (load["num_requests_running"], load["seq"]) == (0, 2)


async def test_the_load_stands_behind_every_answer_as_grpc_s_balancers_read_it(tmp_path):
    """By hand, as no client of gRPC shows it. 0xfe03 is the setting by which binary values come as they are."""
    async with running_store(tmp_path) as store, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*store.grpc.split(":"))
        settings = frame(4, 0, 0, struct.pack("!HI", 0xFE03, 1))
        writer.write(PREFACE + settings + headers(1, f"/{SERVICE}/ModelInfer".encode()))
        writer.write(data(1, GOOD.SerializeToString()))
        await reader.readuntil(b"endpoint-load-metrics-bin")
        [length] = await reader.readexactly(1)  # RFC 7541, 5.1: less than 127 is one byte
        value = await reader.readexactly(length)
        writer.close()
    assert value[0] == 0  # it is binary
    metrics = OrcaLoadReport.FromString(value[1:]).named_metrics
    assert dict(metrics) == {
        "num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0, "seq": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"\xff\xff", "the message is no ModelInferRequest"),
        (changed(model_version="7"), "model 'adder@7' is not served here"),
        (changed(0, name="x"), "input 'left' is missing"),
        (changed(0, name="right"), "input 'right' is there twice"),
        (changed(0, datatype="FP99"), "has the datatype 'FP99'"),
        (changed(0, datatype="FP64"), "has 0 elements, which do not fill the shape [1, 3]"),
        (changed(0, datatype="FP16"), "has 0 elements"),
        (changed(0, shape=[3]), "has the shape [3]"),
        (changed(0, shape=[-1, -3]), "do not fill the shape [-1, -3]"),
        (changed(0, shape=[1] * 100_000), "do not fill the shape"),
        (changed(raw_input_contents=[b"x"]), "there are 3 inputs and raw contents of 1"),
        (changed(raw_input_contents=[b"x"] * 3), "has contents, although there are raw contents"),
        (changed(0, parameters={"sequence_id": pb.InferParameter(int64_param=7)}), "sequence_id is not supported"),
        (changed(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="x")]), "output 'x' is none of this model's"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told(tmp_path, message, expected):
    async with running_store(tmp_path) as store:
        code, told, _ = await refusal(store, message)
    assert (code, expected in told) == ("NOT_FOUND" if "served" in expected else "INVALID_ARGUMENT", True), told
    assert len(told) < 400


async def test_a_version_alone_is_meant_by_metadata(tmp_path):
    def at(path):
        return {"metadata": (("x-weir-base-path", path),)}

    models = {"adder/1": ADDER, "adder/2": ADDER}
    async with running_store(tmp_path, models, "--serve", "adder@all") as store:
        assert (await call(store, GOOD))[0].model_version == "2"
        assert (await call(store, GOOD, **at("/models/adder/1")))[0].model_version == "1"
        assert (await refusal(store, GOOD, **at("/models/other/1")))[0] == "NOT_FOUND"
        assert (await refusal(store, changed(model_version="2"), **at("/models/adder/1")))[0] == "NOT_FOUND"


async def test_deadlines_of_both_kinds_and_leaving_end_the_run(tmp_path):
    async with running_store(tmp_path, {"adder/1": ADDER + "settings = {slow = 60}\n"}) as store:
        [served] = store.pool
        assert (await refusal(store, GOOD, timeout=0.1))[0] == "DEADLINE_EXCEEDED"
        metadata = (("x-weir-deadline-ms", "20"),)
        assert (await refusal(store, GOOD, metadata=metadata))[0] == "DEADLINE_EXCEEDED"
        leaving = asyncio.ensure_future(call(store, GOOD))
        async with asyncio.timeout(10):
            while not served.in_flight.count:
                await asyncio.sleep(0.002)
            leaving.cancel()
            await served.in_flight.wait_idle()
        assert served.model.load().running == 0


async def test_what_may_go_elsewhere_says_so(tmp_path):
    async with running_store(tmp_path) as store:
        [served] = store.pool
        served.state = State.LOADING
        code, _, trailers = await refusal(store, GOOD)
        assert (code, trailers["x-backend-not-started"], trailers["retry-after"]) == ("UNAVAILABLE", "true", "1")
        served.state = State.CLOSED
        code, _, trailers = await refusal(store, GOOD)
        assert (code, trailers["x-draining"]) == ("UNAVAILABLE", "true")


async def test_a_bug_is_told_without_a_traceback(tmp_path):
    async with running_store(tmp_path, {"adder/1": ADDER + "settings = {broken = true}\n"}) as store:
        assert (await refusal(store, GOOD))[:2] == ("INTERNAL", "internal error")


async def test_health_is_checked_and_watched(tmp_path):
    serving, not_serving, unknown = 1, 2, 3
    async with (
        running_store(tmp_path) as store,
        grpc.aio.insecure_channel(store.grpc) as channel,
        asyncio.timeout(20),
    ):
        health = health_pb2_grpc.HealthStub(channel)
        [served] = store.pool

        def request(name):
            return health_pb2.HealthCheckRequest(service=name)

        for name in ("", SERVICE, "model/adder@1"):
            assert (await health.Check(request(name))).status == serving
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await health.Check(request("model/gone@1"))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        watching = health.Watch(request("model/adder@1"))
        seen = [(await watching.read()).status]
        served.state = State.LOADING
        seen.append((await watching.read()).status)
        served.state = State.READY
        seen.append((await watching.read()).status)
        store.pool.unload("adder")
        while seen[-1] != unknown:
            seen.append((await watching.read()).status)
        watching.cancel()
    assert seen == [serving, not_serving, serving, not_serving, unknown]


async def test_a_port_that_is_taken_is_told(tmp_path):
    async with running_store(tmp_path) as store:
        with pytest.raises(OSError, match="cannot bind"):
            async with open_inference_grpc.listening(store.pool, InFlight(), store.grpc):
                raise AssertionError("it is taken")
