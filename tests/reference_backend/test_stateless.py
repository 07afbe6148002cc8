"""Models of tensors, with an executor of the tests' own: in real processes that are killed, and beside the server."""

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import pytest

from reference_backend import link
from reference_backend import stateless as subject
from reference_backend.engine.config import ModelError
from reference_backend.refusals import ApiError
from reference_backend.repository import Card, Entry
from reference_backend.stateless import Embedding, Stateless
from reference_backend.tensors import ANYHOW, Terms

LEFT = np.array([[1, 2, 3]], dtype=np.float32)
GOOD = {"left": LEFT, "right": LEFT * 10, "words": np.array([b"ab", b""], dtype=np.object_)}


@contextlib.asynccontextmanager
async def running(tmp_path, *, isolation="thread", kind=Stateless, clock=time.monotonic, **card):
    card = {"kind": card.pop("named", "tensor"), "executor": "tests.support.adder"} | card
    settings = Card(isolation=isolation, **card)
    model = kind(Entry("adder", "1", tmp_path), settings, clock, lambda: 0.0)
    async with asyncio.timeout(60), model.running():
        yield model


async def refusal(model, inputs, terms=ANYHOW):
    with pytest.raises(ApiError) as refused:
        await model.infer(inputs, terms)
    return refused.value.status, refused.value.code, refused.value.message


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_it_runs_and_refuses_the_same_wherever_it_is(tmp_path, isolation):
    async with running(tmp_path, isolation=isolation) as model:
        assert [spec.name for spec in model.inputs] == ["left", "right", "words"]
        outputs = await model.infer(GOOD)
        assert outputs["sum"].tolist() == [[11, 22, 33]]
        assert outputs["words"].tolist() == [b"ba", b""]
        outputs["sum"] += 1  # it is the caller's
        both = await asyncio.gather(*(model.infer(GOOD, Terms(time.monotonic() + 60)) for _ in range(20)))
        assert all(each["sum"].tolist() == [[11, 22, 33]] for each in both)
        assert await refusal(model, GOOD | {"right": np.zeros((2, 3), dtype=np.float32)}) == (
            400, "bad_request", "left and right differ in rows",
        )  # fmt: skip
        assert (model.load().running, model.load().waiting, model.changes) == (0, 0, 2 * 22)
        assert repr(model) == "<Stateless adder@1 ready, 0 of 257 in flight>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": None}, "input 'left' is missing"),
        ({"more": LEFT}, "input 'more' is none of this model's: left, right, words"),
        ({"left": LEFT.astype(np.float64)}, "input 'left' must be of FP32"),
        ({"left": LEFT[0]}, "input 'left' has the shape [3], which is not [-1, 3] (-1: any)"),
        ({"left": np.zeros((1, 4), dtype=np.float32)}, "input 'left' has the shape [1, 4]"),
    ],
)
async def test_what_does_not_fit_is_refused_before_the_model_sees_it(tmp_path, change, message):
    inputs = {name: array for name, array in (GOOD | change).items() if array is not None}
    async with running(tmp_path) as model:
        status, code, told = await refusal(model, inputs)
        assert (status, code, told[: len(message)]) == (400, "bad_request", message)


async def test_one_too_many_is_refused_and_counted(tmp_path):
    async with running(tmp_path, max_waiting=2, settings={"slow": 30}) as model:
        waiting = [asyncio.ensure_future(model.infer(GOOD)) for _ in range(3)]
        await asyncio.sleep(0)
        assert (model.load().running, model.load().waiting) == (1, 2)
        assert (await refusal(model, GOOD))[:2] == (429, "queue_full")
        assert (model.reporter.report().rejects, model.reporter.report().free_slots) == (1, 0)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        assert model.load().running == 0


async def test_who_fills_the_bound_keeps_no_light_consumer_out(tmp_path):
    async with running(tmp_path, max_batch=2, max_waiting=6, settings={"slow": 30}) as model:
        flood = [asyncio.ensure_future(model.infer(GOOD, Terms(tenant="flood"))) for _ in range(model.bound)]
        await asyncio.sleep(0)
        assert (await refusal(model, GOOD, Terms(tenant="flood")))[:2] == (429, "queue_full")
        light = [asyncio.ensure_future(model.infer(GOOD, Terms(tenant="light"))) for _ in range(2)]
        await asyncio.sleep(0)
        assert (model.load().running, model.load().waiting) == (2, 8)
        assert (await refusal(model, GOOD, Terms(tenant="third")))[:2] == (429, "queue_full")  # the reserve has an end
        for each in (*flood, *light):
            each.cancel()
        await asyncio.wait((*flood, *light))
        assert model.load().running == 0


@pytest.mark.parametrize("words", [[b"one"], [b"one", b"two", b"three"]])
@pytest.mark.parametrize(("batch", "waiting"), [(1, 1), (1, 8), (4, 8), (8, 4), (64, 1)])
async def test_as_many_as_are_told_are_taken_whatever_each_holds(tmp_path, batch, waiting, words):
    asked = {"text": np.array(words, dtype=np.object_)}
    async with running(
        tmp_path, kind=Embedding, named="embedding", executor="tests.support.turnstile", max_batch=batch,
        max_waiting=waiting,
    ) as model:  # fmt: skip
        taken = [asyncio.ensure_future(model.infer(asked)) for _ in range(model.bound)]
        while model.load().running + model.load().waiting < model.bound:
            await asyncio.sleep(0)
        assert (await refusal(model, asked))[:2] == (429, "queue_full")
        model._model.open.set()
        assert [len(each["tokens"]) for each in await asyncio.gather(*taken)] == [len(words)] * model.bound
        assert model.rejects == 1


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_a_deadline_ends_the_waiting(tmp_path, isolation):
    async with running(tmp_path, isolation=isolation, settings={"slow": 30}) as model:
        assert (await refusal(model, GOOD, Terms(time.monotonic() + 0.05)))[:2] == (504, "deadline")
        assert (await refusal(model, GOOD, Terms(time.monotonic() - 1)))[:2] == (504, "deadline")


async def test_a_model_s_own_timeout_is_its_fault_and_no_deadline(tmp_path):
    async def run(_inputs):
        raise TimeoutError("mine")

    async with running(tmp_path) as model:
        model._model.run = run
        for terms in (ANYHOW, Terms(time.monotonic() + 60)):
            with pytest.raises(TimeoutError, match="mine"):
                await model.infer(GOOD, terms)


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_what_is_late_or_left_by_its_client_is_ended_in_the_model_too(tmp_path, isolation):
    async with running(tmp_path, isolation=isolation, settings={"counts": True}) as model, asyncio.timeout(20):

        async def under_way():
            await asyncio.sleep(0.001)
            return int((await model.infer(GOOD))["words"][0]) - 1

        leaving = asyncio.ensure_future(model.infer(GOOD | {"left": LEFT * 0}))
        while await under_way() != 1:
            pass
        assert (await refusal(model, GOOD | {"left": LEFT * 0}, Terms(time.monotonic() + 0.05)))[:2] == (
            504,
            "deadline",
        )
        while await under_way() != 1:
            pass
        leaving.cancel()
        while await under_way():
            pass


@pytest.mark.integration
async def test_a_failure_of_the_model_costs_that_run_and_a_crash_those_in_flight(tmp_path):
    async with running(tmp_path, isolation="process", settings={"broken": True}) as model:
        assert (await refusal(model, GOOD))[:2] == (500, "engine_failed")
        assert (await refusal(model, GOOD))[:2] == (500, "engine_failed")
    async with running(tmp_path, isolation="process", settings={"slow": 30}) as model:
        waiting = [asyncio.ensure_future(refusal(model, GOOD)) for _ in range(3)]
        await asyncio.sleep(0)
        [child] = children()
        os.kill(child, signal.SIGTERM)  # not its to obey: the server decides
        os.kill(child, signal.SIGKILL)
        assert {(await each)[:2] for each in waiting} == {(503, "engine_restarted")}
        await model.wait_lost()
    assert children() == []
    assert (await refusal(model, GOOD))[:2] == (503, "loading")
    async with asyncio.timeout(60), model.running():
        assert model.load().running == 0


def hurried(monkeypatch):
    for module in (subject, link):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(link, "END_WITHIN", 0.1)


@pytest.mark.integration
@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_process_that_gives_no_sign_is_not_alive_and_then_cut(tmp_path, monkeypatch, is_asked):
    hurried(monkeypatch)
    monkeypatch.setattr(link, "SILENT_SECONDS", 1.0)  # a hundred beats
    async with running(tmp_path, isolation="process", settings={"slow": 30}) as model:
        waiting = [asyncio.ensure_future(refusal(model, GOOD)) for _ in range(is_asked)]
        await asyncio.sleep(0)
        [child] = children()
        os.kill(child, signal.SIGSTOP)
        while model.is_alive:
            await asyncio.sleep(0.001)
        await model.wait_lost()
        assert [(await each)[:2] for each in waiting] == [(503, "engine_restarted")] * is_asked
    assert model.is_alive  # there is none that owes a sign
    assert children() == []


@pytest.mark.integration
async def test_one_that_answers_nothing_is_cut_whatever_signs_it_gives(tmp_path, monkeypatch):
    hurried(monkeypatch)
    monkeypatch.setattr(subject, "WEDGED_AFTER", 0.05)
    async with running(tmp_path, isolation="process", settings={"slow": 30}) as model:
        assert (await refusal(model, GOOD))[:2] == (503, "engine_restarted")


@pytest.mark.integration
async def test_one_that_cannot_be_opened_says_why(tmp_path):
    for isolation in ("thread", "process"):
        with pytest.raises(ModelError, match="no such weights"):
            async with running(tmp_path, isolation=isolation, settings={"refuse": "no such weights"}):
                raise AssertionError("it was refused")
    with pytest.raises(
        ModelError, match="'embedding' has 'text' of BYTES in 1 dimensions, but its executor gives none"
    ):
        async with running(tmp_path, kind=Embedding, named="embedding"):
            raise AssertionError("it is no embedding")
