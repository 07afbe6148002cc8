"""The models of examples/models, each in its process, asked by Triton's client as anyone would."""

import asyncio

import numpy as np
import pytest
import tritonclient.http

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.training.shapes import pictures  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402
from tests.support.model_store import running_store  # noqa: E402

pytestmark = pytest.mark.integration


async def test_both_tell_the_shapes_of_pictures():
    pixels, kinds = pictures(60, training=False)
    async with running_store(EXAMPLES, {}) as store:
        for name, least in (("shapes-mlp", 0.7), ("shapes-cnn", 0.9)):
            scores = await asyncio.to_thread(scores_of, store.url, name, pixels.numpy())
            assert (scores.argmax(-1) == kinds.numpy()).mean() > least


def scores_of(url, name, pixels):
    with tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client:
        given = tritonclient.http.InferInput("pixels", list(pixels.shape), "UINT8")
        given.set_data_from_numpy(pixels)
        scores = client.infer(name, [given]).as_numpy("scores")
        wrong = tritonclient.http.InferInput("pixels", [1, 3], "UINT8")
        wrong.set_data_from_numpy(np.zeros((1, 3), np.uint8))
        with pytest.raises(tritonclient.utils.InferenceServerException, match=r"'pixels' has the shape \[1, 3\]"):
            client.infer(name, [wrong])
        many = tritonclient.http.InferInput("pixels", [65, 32, 32, 3], "UINT8")
        many.set_data_from_numpy(np.zeros((65, 32, 32, 3), np.uint8))
        with pytest.raises(tritonclient.utils.InferenceServerException, match="65 rows; a request may have 1 to 64"):
            client.infer(name, [many])
        return scores
