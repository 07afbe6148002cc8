"""Pictures from text over HTTP, by OpenAI's own client where it can ask for it."""

import base64
from io import BytesIO

import aiohttp
import openai
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from PIL import Image  # noqa: E402

from tests.support.model_store import ADDER, running_store  # noqa: E402
from tests.support.random_flow import random_flow  # noqa: E402

TOML = 'kind = "image"\nexecutor = "rectified_flow"\nisolation = "thread"\nmax_batch = 4\nmax_waiting = 4\n'
RED = {"model": "painter", "prompt": "a red circle"}


@pytest.fixture
async def url(tmp_path):
    (tmp_path / "painter" / "1").mkdir(parents=True)
    random_flow(tmp_path / "painter" / "1")
    async with running_store(tmp_path, {"painter/1": TOML, "adder/1": ADDER}) as store:
        yield store.url


async def post(url, body, **headers):
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/images/generations", json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


def opened(content):
    return Image.open(BytesIO(base64.b64decode(content)))


async def test_the_openai_client_gets_as_many_pictures_as_it_asks_for(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = await client.images.generate(**RED, n=3, response_format="b64_json", size="256x256")
    pictures = [opened(each.b64_json) for each in answer.data]
    assert [(each.format, each.size) for each in pictures] == [("PNG", (256, 256))] * 3
    assert len({each.tobytes() for each in pictures}) == 3
    assert answer.created > 0


async def test_a_seed_repeats_a_picture_and_the_next_ones_count_on(url):
    async def contents(**asked):
        return [each["b64_json"] for each in (await post(url, RED | asked))[1]["data"]]

    two = await contents(seed=7, n=2)
    assert await contents(seed=7) == two[:1]
    assert await contents(seed=8) == two[1:]
    assert await contents() != await contents()


@pytest.mark.parametrize(("size", "side"), [(None, 256), ("auto", 256), ("8x8", 8), ("32x32", 32), ("1024x1024", 1024)])
async def test_a_larger_size_shows_each_pixel_as_a_square(url, size, side):
    status, answer = await post(url, RED | {"size": size, "seed": 1})
    picture = opened(answer["data"][0]["b64_json"])
    assert (status, answer["size"], picture.size) == (200, f"{side}x{side}", (side, side))
    small = opened((await post(url, RED | {"size": "8x8", "seed": 1}))[1]["data"][0]["b64_json"])
    assert picture.resize((8, 8), Image.Resampling.NEAREST).tobytes() == small.tobytes()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "painter@2"}, (404, "model_not_found", "model")),
        ({"model": "adder"}, (400, "wrong_kind", "model")),
        ({"prompt": ""}, (400, "bad_request", "prompt")),
        ({"prompt": "an elephant"}, (400, "bad_request", "prompt")),
        ({"prompt": 5}, (400, "bad_request", "prompt")),
        ({"n": 0}, (400, "bad_request", "n")),
        ({"n": 11}, (400, "bad_request", "n")),
        ({"seed": -1}, (400, "bad_request", "seed")),
        ({"size": "9x9"}, (400, "bad_request", "size")),
        ({"size": "2048x2048"}, (400, "bad_request", "size")),
        ({"response_format": "url"}, (400, "unsupported_parameter", "response_format")),
        ({"output_format": "webp"}, (400, "unsupported_parameter", "output_format")),
        ({"background": "transparent"}, (400, "unsupported_parameter", "background")),
        ({"stream": True}, (400, "unsupported_parameter", "stream")),
    ],
)
async def test_what_cannot_be_done_is_refused_by_field(url, change, expected):
    status, answer = await post(url, RED | change)
    error = answer["error"]
    assert (status, error["code"], error["param"]) == expected


async def test_a_deadline_that_is_over_is_504(url):
    assert (await post(url, RED, **{"x-weir-deadline-ms": "0"}))[0] == 504
