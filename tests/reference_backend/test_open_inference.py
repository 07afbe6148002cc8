"""The Open Inference Protocol over HTTP: Triton's own client, then what no client of theirs would send."""

import asyncio
import io
import json
import os

import aiohttp
import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from reference_backend import open_inference
from tests.support.model_store import ADDER, put, running_store

GOOD = {
    "id": "a",
    "inputs": [
        {"name": "left", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]},
        {"name": "right", "datatype": "FP32", "shape": [1, 3], "data": [[10, 20, 30.5]]},
        {"name": "words", "datatype": "BYTES", "shape": [2], "data": ["ab", "\u00e4"]},
    ],
}
SPECS = [
    {"name": "left", "datatype": "FP32", "shape": [-1, 3]},
    {"name": "right", "datatype": "FP32", "shape": [-1, 3]},
    {"name": "words", "datatype": "BYTES", "shape": [-1]},
]


async def ask(url, path, body=None, *, method=None, **headers):
    data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    method = method or ("GET" if body is None else "POST")
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url + path, data=data, headers=headers) as answer,
    ):
        return answer.status, answer.headers, await answer.read()


async def error_of(url, path, body=None, **headers):
    status, _, content = await ask(url, path, body, **headers)
    told = json.loads(content)
    assert list(told) == ["error"], told
    return status, told["error"]


async def test_triton_s_client_is_served(tmp_path):
    async with running_store(tmp_path, {"adder/1": ADDER, "adder/2": ADDER}, "--serve", "adder@all") as store:
        await asyncio.to_thread(use_as_triton_does, store)


def use_as_triton_does(store):
    with tritonclient.http.InferenceServerClient(store.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("adder")
        assert client.is_model_ready("adder", "1")
        assert not client.is_model_ready("gone")
        assert client.get_server_metadata()["extensions"][0] == "binary_tensor_data"
        told = client.get_model_metadata("adder", "2")
        assert (told["versions"], told["inputs"]) == (["1", "2"], SPECS)
        config = client.get_model_config("adder")
        assert config["input"][2] == {"name": "words", "data_type": "TYPE_STRING", "dims": [-1]}

        for binary in (True, False):
            inputs = [
                tritonclient.http.InferInput("left", [2, 3], "FP32"),
                tritonclient.http.InferInput("right", [2, 3], "FP32"),
                tritonclient.http.InferInput("words", [2], "BYTES"),
            ]
            left = np.arange(6, dtype=np.float32).reshape(2, 3)
            inputs[0].set_data_from_numpy(left, binary_data=binary)
            inputs[1].set_data_from_numpy(left * 2, binary_data=not binary)
            inputs[2].set_data_from_numpy(np.array(["ab", "\u00e4\u00f6"], dtype=np.object_), binary_data=binary)
            outputs = [
                tritonclient.http.InferRequestedOutput("sum", binary_data=binary),
                tritonclient.http.InferRequestedOutput("words", binary_data=True),
            ]
            for wanted in (outputs, None):
                result = client.infer("adder", inputs, model_version="1", outputs=wanted, request_id="x")
                assert (result.as_numpy("sum") == left * 3).all()
                assert result.as_numpy("words").tolist() == [b"ba", "\u00e4\u00f6".encode()[::-1]]
                told = result.get_response()
                assert (told["model_name"], told["model_version"], told["id"]) == ("adder", "1", "x")

        with pytest.raises(InferenceServerException, match="input 'right' is missing"):
            client.infer("adder", [inputs[0], inputs[2]])

        put(store.root, "new/3")
        states = {(each["name"], each["version"]): each["state"] for each in client.get_model_repository_index()}
        assert states == {("adder", "1"): "READY", ("adder", "2"): "READY", ("new", "3"): "UNAVAILABLE"}
        client.load_model("new")
        assert client.is_model_ready("new", "3")
        client.unload_model("new")
        with pytest.raises(InferenceServerException, match="there is no model 'gone'"):
            client.load_model("gone")
        with pytest.raises(InferenceServerException, match="model 'gone' is not loaded"):
            client.unload_model("gone")


async def test_plain_json_is_answered_in_json(tmp_path):
    async with running_store(tmp_path) as store:
        body = json.loads(json.dumps(GOOD))
        body["inputs"][2]["data"] = ["ab", "c"]
        status, headers, content = await ask(store.url, "/v2/models/adder/infer", body)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(content) == {
            "model_name": "adder",
            "model_version": "1",
            "id": "a",
            "outputs": [
                {"name": "sum", "datatype": "FP32", "shape": [1, 3], "data": [11.0, 22.0, 33.5]},
                {"name": "words", "datatype": "BYTES", "shape": [2], "data": ["ba", "c"]},
            ],
        }
        body["outputs"] = [{"name": "words"}]
        _, _, content = await ask(store.url, "/models/adder/1/v2/models/adder/infer", body)
        assert [each["name"] for each in json.loads(content)["outputs"]] == ["words"]
        assert json.loads((await ask(store.url, "/v2"))[2])["name"] == "weir-reference-backend"


def changed(place, **fields):
    """The good request with other fields in one of its inputs; None takes one away."""
    body = json.loads(json.dumps(GOOD))
    body["inputs"][place] = {
        name: value for name, value in (body["inputs"][place] | fields).items() if value is not None
    }
    return body


def without_left(body):
    return body | {"inputs": body["inputs"][1:]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": "\xff"}', ""),
        (b"[" * 100_000, ""),
        (without_left(GOOD), "input 'left' is missing"),
        (GOOD | {"inputs": GOOD["inputs"] * 2}, "input 'left' is there twice"),
        (changed(0, name="x" * 10_000), "input 'left' is missing"),
        (changed(0, datatype="FLOAT"), "has the datatype 'FLOAT', which is none of BOOL,"),
        (changed(0, datatype="BF16"), "has the datatype 'BF16'"),
        (changed(0, datatype="FP64"), "input 'left' must be of FP32"),
        (changed(0, shape=[3]), "input 'left' has the shape [3], which is not [-1, 3]"),
        (changed(0, shape=[2, 3]), "input 'left' has 3 elements, which do not fill the shape [2, 3]"),
        (changed(0, shape=[-1, 3]), "do not fill the shape [-1, 3]"),
        (changed(0, shape=[10**18, 10**18]), "do not fill"),
        (changed(0, shape=[1] * 100_000), "do not fill"),
        (changed(0, shape=[2**70, 3]), ""),
        (changed(0, shape="3"), "shape"),
        (changed(0, data=["1", "2", "3"]), "has data that cannot be read: Expected `float`, got `str`"),
        (changed(0, data=[True, 2, 3]), "cannot be read"),
        (changed(0, data=[None, 2, 3]), "cannot be read"),
        (changed(0, data=[[1, [2]], [3]]), "cannot be read: Expected `float`, got `array`"),
        (changed(0, data=[1e300, 2, 3]), "has elements that FP32 cannot hold"),
        (changed(0, data=None), "has neither data nor binary_data_size"),
        (changed(0, data=[1, 2, 3], parameters={"binary_data_size": 12}), "no number up to the 0 bytes left"),
        (changed(0, data=None, parameters={"binary_data_size": -1}), "no number up to"),
        (changed(0, data=None, parameters={"binary_data_size": "x"}), "no number up to"),
        (changed(0, data=None, parameters={"binary_data_size": True}), "no number up to"),
        (changed(0, data=None, parameters={"binary_data_size": 0}), "has 0 elements"),
        (changed(0, parameters={"shared_memory_region": "x"}), "parameter shared_memory_region is not supported"),
        (changed(2, data=[1, 2]), "cannot be read: Expected `str`, got `int`"),
        (GOOD | {"outputs": [{"name": "product"}]}, "output 'product' is none of this model's: sum, words"),
        (GOOD | {"outputs": [{"name": "sum", "parameters": {"classification": 2}}]}, "classification is not supported"),
        (GOOD | {"parameters": {"sequence_id": 7}}, "sequence_id is not supported"),
        (GOOD, "output 'words' is no UTF-8 text; ask for it with binary_data: true"),
        (json.dumps(changed(0)).replace("[1, 2, 3]", "[NaN, 2, 3]").encode(), ""),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_400_and_says_what(tmp_path, body, message):
    async with running_store(tmp_path) as store:
        status, told = await error_of(store.url, "/v2/models/adder/infer", body)
    assert (status, message in told) == (400, True), told
    assert len(told) < 400


NAN = np.array([[np.nan, 1, np.inf]], dtype=np.float32).tobytes()


def binary(*tensors, **fields):
    """JSON and bytes, and the length of the JSON; a tensor is its name, datatype, shape and bytes."""
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, datatype, shape, raw in tensors
    ]
    head = json.dumps({"inputs": inputs} | fields).encode()
    return head + b"".join(raw for *_, raw in tensors), {open_inference.HEADER_LENGTH: str(len(head))}


ROW = np.ones((1, 3), dtype=np.float32).tobytes()
LEFT, RIGHT = ("left", "FP32", [1, 3], ROW), ("right", "FP32", [1, 3], ROW)
WORDS = ("words", "BYTES", [1], b"\x02\0\0\0ab")


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (
            [("left", "FP32", [1, 3], ROW[:-1]), RIGHT, WORDS],
            {},
            "has 11 bytes, which is no number of elements of 4 bytes",
        ),
        ([("left", "FP32", [1, 3], ROW * 2), RIGHT, WORDS], {}, "has 6 elements, which do not fill the shape [1, 3]"),
        ([("left", "BOOL", [3], b"\1\0\2"), RIGHT, WORDS], {}, "neither 0 nor 1"),
        ([LEFT, RIGHT, ("words", "BYTES", [1], b"\x03\0\0\0ab")], {}, "ends within an element"),
        ([LEFT, RIGHT, ("words", "BYTES", [1], b"\x03\0\0")], {}, "ends within an element"),
        ([LEFT, RIGHT, ("words", "BYTES", [2], b"\x02\0\0\0ab")], {}, "has 1 elements"),
        ([("left", "FP32", [1, 3], NAN), RIGHT, WORDS], {}, "output 'sum' has elements that JSON cannot hold"),
    ],
)
async def test_wrong_bytes_are_400_and_say_what(tmp_path, tensors, fields, message):
    body, headers = binary(*tensors, **fields)
    async with running_store(tmp_path) as store:
        status, told = await error_of(store.url, "/v2/models/adder/infer", body, **headers)
        assert (status, message in told) == (400, True), told
        assert (
            await ask(
                store.url, "/v2/models/adder/infer", *binary(LEFT, RIGHT, WORDS)[:1], **binary(LEFT, RIGHT, WORDS)[1]
            )
        )[0] == 200


async def test_numbers_that_are_none_pass_in_binary(tmp_path):
    body, headers = binary(("left", "FP32", [1, 3], NAN), RIGHT, WORDS, parameters={"binary_data_output": True})
    async with running_store(tmp_path) as store:
        status, told, content = await ask(store.url, "/v2/models/adder/infer", body, **headers)
    assert (status, told["content-type"]) == (200, "application/octet-stream")
    length = int(told[open_inference.HEADER_LENGTH])
    sizes = [each["parameters"]["binary_data_size"] for each in json.loads(content[:length])["outputs"]]
    assert sizes == [12, 6]
    assert np.isnan(np.frombuffer(content[length : length + 12], dtype=np.float32)[0])


@pytest.mark.parametrize("length", ["x", "-1", "9" * 30, "100000"])
async def test_a_header_length_that_is_none_is_refused(tmp_path, length):
    async with running_store(tmp_path) as store:
        status, told = await error_of(
            store.url, "/v2/models/adder/infer", GOOD, **{open_inference.HEADER_LENGTH: length}
        )
    assert (status, open_inference.HEADER_LENGTH in told) == (400, True)


async def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    body, headers = binary(LEFT, RIGHT, WORDS)
    async with running_store(tmp_path) as store:
        assert await error_of(store.url, "/v2/models/adder/infer", body + b"x", **headers) == (
            400,
            "1 bytes lie behind the last tensor",
        )


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v2/models/gone", None, (404, "model 'gone' is not served here; 'adder@1' is")),
        ("/v2/models/gone/infer", GOOD, (404, "model 'gone' is not served here")),
        ("/v2/models/adder/versions/7/infer", GOOD, (404, "model 'adder@7' is not served here")),
        ("/v2/models/adder/versions/7/ready", None, (404, "")),
        ("/v2/models/adder/infer", None, (405, "")),
        ("/v2/models/" + "x" * 4000, None, (404, "")),
        ("/v2/repository/index", b"{", (400, "")),
        ("/v2/repository/models/..%2Fadder/load", b"", (404, "")),
        ("/v2/nothing", None, (404, "")),
    ],
)
async def test_what_is_not_there_is_told_in_the_protocols_form(tmp_path, path, body, expected):
    async with running_store(tmp_path) as store:
        status, told = await error_of(store.url, path, body)
    assert (status, told[: len(expected[1])]) == expected


async def test_ten_megabytes_pass_and_too_many_do_not(tmp_path, monkeypatch):
    rows = 900_000  # of 3 times 4 bytes
    raw = np.ones((rows, 3), dtype=np.float32).tobytes()
    body, headers = binary(
        ("left", "FP32", [rows, 3], raw),
        ("right", "FP32", [rows, 3], raw),
        WORDS,
        outputs=[{"name": "sum", "parameters": {"binary_data": True}}],
    )
    async with running_store(tmp_path) as store:
        status, told, content = await ask(store.url, "/v2/models/adder/infer", body, **headers)
        assert (status, len(content) - int(told[open_inference.HEADER_LENGTH])) == (200, len(raw))
        monkeypatch.setattr(open_inference, "LARGEST_BODY", 1_000_000)
        assert await error_of(store.url, "/v2/models/adder/infer", body, **headers) == (
            413,
            "the body is longer than 1000000 bytes",
        )


async def test_a_deadline_is_kept(tmp_path):
    async with running_store(tmp_path, {"adder/1": ADDER + "settings = {slow = 30}\n"}) as store:
        assert (await error_of(store.url, "/v2/models/adder/infer", GOOD, **{"x-weir-deadline-ms": "20"}))[0] == 504


FAILING = [word for name in ("adder", "broken", "odd", "mamba", "bug@all") for word in ("--serve", name)]


async def test_a_model_that_cannot_be_loaded_says_why_and_the_others_are_served(tmp_path):
    broken = ADDER + 'settings = {refuse = "no weights"}\n'
    bug = ADDER + "settings = {raises = true}\n"
    models = {"adder/1": ADDER, "broken/1": broken, "odd/1": "kind = 7", "mamba/1": "", "bug/1": bug}
    models["bug/2"] = bug.replace("thread", "process")
    (tmp_path / "mamba" / "1").mkdir(parents=True)
    (tmp_path / "mamba" / "1" / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    async with running_store(tmp_path, models, *FAILING) as store:
        assert (await ask(store.url, "/v2/models/adder/infer", GOOD | {"outputs": [{"name": "sum"}]}))[0] == 200
        assert (await ask(store.url, "/v2/health/ready"))[0] == 503
        assert (await ask(store.url, "/models/adder/1/v2/health/ready"))[0] == 200
        told = json.loads((await ask(store.url, "/v2/repository/index", b"{}"))[2])
        reasons = {each["name"]: (each["state"], each["reason"]) for each in told}
        assert reasons["adder"] == ("READY", "")
        assert (reasons["broken"][0], "no weights" in reasons["broken"][1]) == ("UNAVAILABLE", True)
        assert "model.toml: Expected `str`, got `int` - at `$.kind`" in reasons["odd"][1]
        bugs = {each["version"]: each["reason"] for each in told if each["name"] == "bug"}
        assert bugs["1"] == """bug@1: internal error: RuntimeError("a bug of the executor's")"""
        assert bugs["2"] == "the process ended while it loaded the model"
        assert "architecture MambaForCausalLM is not supported" in reasons["mamba"][1]
        told = json.loads((await ask(store.url, "/v2/repository/index", {"ready": True}))[2])
        assert [each["name"] for each in told] == ["adder"]
        status, message = await error_of(store.url, "/v2/repository/models/broken/load", b"")
        assert (status, "no weights" in message) == (400, True)
        assert (await error_of(store.url, "/v2/models/broken/infer", GOOD))[0] == 503


@pytest.mark.integration
async def test_one_that_sleeps_has_no_process_and_wakes_when_it_is_asked_for(tmp_path):
    apart = ADDER.replace("thread", "process")
    body = GOOD | {"outputs": [{"name": "sum"}]}
    async with running_store(tmp_path, {"adder/1": apart}, "--sleep-after", "1") as store, asyncio.timeout(60):
        assert (await ask(store.url, "/v2/models/adder/infer", body))[0] == 200
        [process] = children()
        while children():
            await asyncio.sleep(0.01)
        assert (await ask(store.url, "/v2/models/adder/ready"))[0] == 503
        assert (await ask(store.url, "/v2/health/ready"))[0] == 200
        status, headers, _ = await ask(store.url, "/v2/models/adder/infer", body)
        assert (status, headers["retry-after"], headers["x-backend-not-started"]) == (503, "1", "true")
        while (await ask(store.url, "/v2/models/adder/infer", body))[0] != 200:
            await asyncio.sleep(0.01)
        assert children() != [process]


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
