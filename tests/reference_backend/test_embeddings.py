"""/v1/embeddings over a real socket, with a real encoder; OpenAI's own client is one of the callers."""

import base64
import io
import json
from pathlib import Path

import aiohttp
import numpy as np
import openai
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

import reference_backend  # noqa: E402
from tests.support.model_store import running_store  # noqa: E402

NAME = "tiny-embedding"
CARD = (Path(reference_backend.__file__).parent / "models" / NAME / "model.toml").read_text()


def running(root, isolation="thread"):
    """A backend over a repository with one version of it."""
    return running_store(root, {f"{NAME}/1": f'isolation = "{isolation}"\n{CARD}'})


async def post(url, **headers_and_body):
    headers = headers_and_body.pop("headers", {})
    body = io.BytesIO(json.dumps({"model": NAME} | headers_and_body).encode())
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/embeddings", data=body, headers=headers) as response,
    ):
        return response.status, await response.json()


def vectors(answer):
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]])


@pytest.mark.integration
async def test_the_openai_client_gets_vectors_from_a_process_of_its_own(tmp_path):
    async with running(tmp_path, "process") as store:
        client = openai.AsyncOpenAI(base_url=f"{store.url}/v1", api_key="none", max_retries=0)
        async with client:
            texts = ["a lease", "a watch", "12 + 30"]
            short = await client.embeddings.create(model=NAME, input=texts)  # it asks for base64
            long = await client.embeddings.create(model=NAME, input=texts, encoding_format="float")
            with pytest.raises(openai.BadRequestError, match="text 1 has .* tokens"):
                await client.embeddings.create(model=NAME, input=["fine", "a " * 3000])
    assert short.model == f"{NAME}@1"
    assert short.usage.prompt_tokens == short.usage.total_tokens > 5
    np.testing.assert_allclose(
        [each.embedding for each in short.data], [each.embedding for each in long.data], atol=1e-6
    )


async def test_a_text_is_the_same_in_all_forms_of_input_and_answer(tmp_path):
    async with running(tmp_path) as store:
        status, one = await post(store.url, input="a lease")
        _, listed = await post(store.url, input=["a lease", "a lease"], dimensions=len(one["data"][0]["embedding"]))
        _, text = await post(store.url, input="a lease", encoding_format="base64", user="someone")
        count = one["usage"]["prompt_tokens"]
        _, tokens = await post(store.url, input=[5] * count)
        _, lists = await post(store.url, input=[[5] * count, [7]])
    assert status == 200
    assert one["object"] == "list"
    np.testing.assert_allclose(vectors(listed), np.repeat(vectors(one), 2, axis=0), atol=1e-6)
    [encoded] = text["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded["embedding"]), "<f4"), vectors(one)[0], atol=1e-6)
    np.testing.assert_allclose(vectors(lists)[:1], vectors(tokens), atol=1e-6)
    assert lists["usage"] == {"prompt_tokens": count + 1, "total_tokens": count + 1}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "missing required field `input`"),
        ({"input": []}, "input", "length >= 1"),
        ({"input": ""}, "input", "input has an empty text"),
        ({"input": ["a", ""]}, "input", "input has an empty text"),
        ({"input": [[1], []]}, "input", "input has an empty text"),
        ({"input": ["a", 1]}, "input", "input mixes texts and tokens"),
        ({"input": [[1], 1]}, "input", "input mixes texts and tokens"),
        ({"input": None}, "input", "Expected"),
        ({"input": {"text": "a"}}, "input", "Expected"),
        ({"input": [1.5]}, "input[0]", "Expected"),
        ({"input": [[["a"]]]}, "input[0][0]", "Expected"),
        ({"input": [10**30]}, "input", ""),
        ({"input": [2**63]}, "input", "a token that no model has"),
        ({"input": [-1]}, "input", "tokens that are none"),
        ({"input": [10**6]}, "input", "tokens that are none"),
        ({"input": ["a"] * 2049}, "input", "2049 texts; at most 2048"),
        ({"input": "a " * 5000}, "input", "text 0 has"),
        ({"input": "a" * 1_000_000}, "input", "text 0 has 1000000 characters"),
        ({"input": "a", "dimensions": 7}, "dimensions", "is not trained to be cut short"),
        ({"input": "a", "dimensions": 0}, "dimensions", ">= 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
    ],
)
async def test_what_is_refused(tmp_path, body, param, message):
    async with running(tmp_path) as store:
        status, answer = await post(store.url, **body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


async def test_other_names_and_late_requests_are_told_and_those_behind_them_served(tmp_path):
    async with running(tmp_path) as store:
        assert (await post(store.url, input="a", headers={"x-weir-deadline-ms": "0"}))[0] == 504
        assert (await post(store.url, model="gone", input="a"))[0] == 404
        assert (await post(store.url, input="a"))[0] == 200
