"""Pictures, step by step: what is painted, who waits, and that neighbours change nothing."""

import asyncio

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
import numpy as np  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.flow import guided, load_flow  # noqa: E402
from reference_backend.engine.request import Priority  # noqa: E402
from reference_backend.executors.rectified_flow import GUIDANCE, STEPS, opened  # noqa: E402
from reference_backend.repository import Card  # noqa: E402
from reference_backend.tensors import BadTensor, Terms  # noqa: E402
from tests.support.random_flow import random_flow  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def directory(tmp_path):
    random_flow(tmp_path)
    return tmp_path


def studio(directory, *, at_once=4):
    return opened(directory, Card(kind="image", executor="rectified_flow", max_batch=at_once))


def asked(*rows):
    prompts, seeds = zip(*rows, strict=True) if rows else ((), ())
    return {"prompt": np.array([each.encode() for each in prompts], object), "seed": np.array(seeds, np.int64)}


@torch.inference_mode()
def reference(directory, prompt, seed):
    """One picture from beginning to end, by itself."""
    network = load_flow(directory, torch.device("cpu"))
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    numbers = network.config.numbers(network.config.understand(prompt))
    words = torch.tensor([numbers + [0] * (6 - len(numbers))])
    for step in range(STEPS):
        picture -= guided(network, picture, torch.tensor([1 - step / STEPS]), words, GUIDANCE) / STEPS
    return ((picture[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()


def assert_alike(picture, expected):
    """But for rounding, which depends on how many rows a matrix product has."""
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(float) - expected).max() <= 1


async def test_a_picture_is_that_of_euler_s_method(directory):
    async with studio(directory) as model:
        images = (await model.infer(asked(("a big red circle", 1), ("Red!", 2))))["image"]
    assert images.dtype == np.uint8
    assert len(np.unique(images[0])) > 10
    assert_alike(images[0], reference(directory, "a big red circle", 1))
    assert_alike(images[1], reference(directory, "red", 2))


async def test_neighbours_that_come_and_go_change_nothing(directory):
    rows = [(" ".join(["big", "red", "circle", "centre"][: 1 + n % 4]), n) for n in range(7)]
    async with studio(directory, at_once=3) as model:
        requests = []
        for row in rows:
            requests.append(asyncio.ensure_future(model.infer(asked(row))))
            while not requests[-1].done() and (not model.painted or model.painted[-1].steps < 3):
                await asyncio.sleep(0)
        images = [(await request)["image"][0] for request in requests]
    for row, image in zip(rows, images, strict=True):
        assert_alike(image, reference(directory, *row))


async def test_the_seed_decides(directory):
    async with studio(directory) as model:
        images = (await model.infer(asked(("red", 5), ("red", 5), ("red", 6))))["image"]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


async def test_no_more_are_painted_than_fit(directory):
    async with studio(directory, at_once=1) as model:
        requests = [asyncio.ensure_future(model.infer(asked(("red", 0))))]
        while not model.painted:
            await asyncio.sleep(0)
        requests += [asyncio.ensure_future(model.infer(asked(("red", n)))) for n in (1, 2)]
        await asyncio.sleep(0)
        assert repr(model) == "<Studio 1 of 1 being painted, 2 waiting>"
        requests.pop().cancel()
        await asyncio.sleep(0)
        assert repr(model) == "<Studio 1 of 1 being painted, 1 waiting>"
        await asyncio.gather(*requests)
        assert repr(model) == "<Studio 0 of 1 being painted, 0 waiting>"


async def test_who_leaves_takes_no_more_turns(directory):
    async with studio(directory, at_once=1) as model:
        gone, waits, stays = (asyncio.ensure_future(model.infer(asked(("red", n)))) for n in range(3))
        while not model.painted:
            await asyncio.sleep(0)
        left = model.painted[0]
        gone.cancel()
        waits.cancel()
        await stays
        assert left.steps < STEPS


async def test_painters_of_one_consumer_keep_nobody_else_waiting(directory):
    async with studio(directory, at_once=1) as model:
        painted = []

        async def paint(name, *terms):
            await model.infer(asked(("red", 0)), Terms(None, *terms))
            painted.append(name)

        async with asyncio.TaskGroup() as group:
            for name in ("flood 1", "flood 2", "flood 3"):
                group.create_task(paint(name, "flood"))
            group.create_task(paint("light", "light"))
            group.create_task(paint("urgent", "flood", Priority.HIGH))
    assert painted == ["urgent", "light", "flood 1", "flood 2", "flood 3"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"an elephant", "no word that this model knows; it knows big, red"),
        (b"", "no word"),
        (b"\xff", "not UTF-8"),
        (b"red " * 1000, "more than 1000 bytes"),
    ],
)
async def test_what_cannot_be_painted_is_refused(directory, prompt, message):
    async with studio(directory) as model:
        with pytest.raises(BadTensor, match=message):
            await model.infer({"prompt": np.array([prompt], object), "seed": np.array([1])})


async def test_prompts_and_seeds_come_in_pairs(directory):
    async with studio(directory) as model:
        with pytest.raises(BadTensor, match="each needs its own"):
            await model.infer({"prompt": np.array([b"red"], object), "seed": np.array([1, 2])})
        assert (await model.infer(asked()))["image"].shape == (0, 8, 8, 3)


async def test_weights_that_are_no_numbers_are_refused_before_anyone_asks(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["place"][0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ModelError, match="not finite"):
        async with studio(directory):
            pass
