"""The models that come with the backend, each version in its own process, asked over HTTP by OpenAI's client."""

import asyncio
import base64
import json
import shutil
import time
from random import Random

import openai
import pytest
import pytest_asyncio

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from gateway import config as configuration  # noqa: E402
from gateway.app import Gateway  # noqa: E402
from policies.identity import generate_signing_key, jwks_of, mint  # noqa: E402
from reference_backend.images import png  # noqa: E402
from reference_backend.process import MODELS  # noqa: E402
from reference_backend.training.closed_loop import without_kind  # noqa: E402
from reference_backend.training.corpus import GLOSSARY  # noqa: E402
from reference_backend.training.examine import questions  # noqa: E402
from reference_backend.training.pictures import Painter, Shape, caption  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402
from tests.support.model_store import running_store  # noqa: E402
from tests.support.running_gateway import until  # noqa: E402

SHAPE = Shape("big", "green", "triangle", "at the top left")
PIXELS = bytes(Painter(Random(1), training=False).picture((SHAPE,)).flatten().tolist())
SHOWN = "data:image/png;base64," + png(PIXELS, 32, 256)


def picture(url=SHOWN):
    return {"type": "image_url", "image_url": {"url": url}}


def text(said):
    return {"type": "text", "text": said}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store():
    arguments = ("--serve", "tiny-vlm@all", "--serve", "tiny-t2i", "--context", "512")
    async with running_store(MODELS, {}, *arguments) as store:
        yield store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(store):
    async with openai.AsyncOpenAI(base_url=f"{store.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def said(client, *parts, model="tiny-vlm", before=()):
    messages = [*before, {"role": "user", "content": list(parts)}]
    answer = await client.chat.completions.create(model=model, messages=messages, temperature=0)
    return answer.choices[0].message.content


pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


async def test_a_picture_is_described_whatever_it_is_magnified_to_and_wherever_it_stands(client):
    expected = caption((SHAPE,)).capitalize() + "."
    assert await said(client, picture(), text("What is in the picture?")) == expected
    assert await said(client, text("What is in the picture?"), picture()) == expected
    exact = picture("data:image/png;base64," + png(PIXELS, 32, 32))
    assert await said(client, exact, text("What is in the picture?")) == expected


async def test_a_picture_stays_in_the_conversation(client):
    first = await said(client, picture(), text("What is in the picture?"))
    before = [
        {"role": "user", "content": [picture(), text("What is in the picture?")]},
        {"role": "assistant", "content": first},
    ]
    assert await said(client, text("What colour is the triangle?"), before=before) == "The triangle is green."


async def test_both_versions_answer_and_the_newer_one_goes_by_the_bare_name(client):
    for version in ("1", "2"):
        assert await said(client, text("What is a KV cache?"), model=f"tiny-vlm@{version}") == GLOSSARY["a KV cache"]
    answer = await client.chat.completions.create(
        model="tiny-vlm", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
    )
    assert answer.model == "tiny-vlm@2"


async def test_the_canary_of_the_examples_answers_better_than_what_most_callers_get(store, tmp_path):
    key = generate_signing_key()
    (tmp_path / "jwks.json").write_bytes(jwks_of(key))
    shutil.copy(EXAMPLES.parent / "policies" / "canary.yaml", tmp_path / "policy.yaml")
    versions = [
        {"service": "llm", "url": f"{store.url}/models/tiny-vlm/{v}", "models": ["tiny-vlm"], "version": v}
        for v in "12"
    ]
    token = mint(key, sub="ann", issuer="https://idp.example.com", audience="weir", ttl=300.0, wall=time.time())
    listen = {"listen": "127.0.0.1:0"}
    config = {**listen, "admin": listen, "policy": "policy.yaml", "discovery": {"static": versions}}
    asked = [question for question in questions(20, with_pictures=True) if question.task == "memory"]

    async def right(client, version):
        answers = await asyncio.gather(*(ask(client, question) for question in asked))
        assert {answer.model for answer in answers} == {f"tiny-vlm@{version}"}
        pairs = zip(asked, answers, strict=True)
        return sum(answer.choices[0].message.content == question.expected for question, answer in pairs)

    async def ask(client, question):
        messages = [{"role": message.role, "content": message.content} for message in question.messages]
        return await client.chat.completions.create(model="tiny-vlm", messages=messages, temperature=0)

    async with (
        Gateway(configuration.parse(json.dumps(config).encode(), {}, base=tmp_path)).running() as gateway,
        openai.AsyncOpenAI(base_url=f"http://{gateway.data_address}/v1", api_key=token, max_retries=0) as usual,
    ):
        await until(lambda: all(backend.healthy for backend in gateway.fleet.backends.values()))
        canary = usual.with_options(default_headers={"x-weir-try": "canary"})
        assert await right(usual, "1") < await right(canary, "2")


async def test_what_one_paints_the_other_sees(client):
    painted = await client.images.generate(
        model="tiny-t2i", prompt="a big green circle at the top left", size="256x256", extra_body={"seed": 1}
    )
    shown = picture(f"data:image/png;base64,{painted.data[0].b64_json}")
    seen = await said(client, shown, text("Describe the picture."))
    assert without_kind(seen) == "A big green shape at the top left."


BROKEN = "data:image/png;base64," + base64.b64encode(base64.b64decode(SHOWN.partition(",")[2])[:100]).decode()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([picture("http://127.0.0.1/cat.png"), text("What is this?")], "fetches nothing"),
        ([picture(BROKEN), text("What is this?")], "is broken"),
        ([picture("data:image/png;base64,AAAA"), text("What is this?")], "neither PNG nor JPEG"),
        ([picture(), text("<|image_pad|> What is this?")], "stand for pictures"),
        ([text("<|image_pad|>" * 16)], "stand for pictures"),
        ([picture()] * 17, "at most 16"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "not 'input_audio'"),
    ],
)
async def test_pictures_that_cannot_be_read_are_the_client_s_fault(client, parts, message):
    with pytest.raises(openai.BadRequestError, match=message):
        await said(client, *parts)
