"""Requests that become one run, and what of them is refused: with a function in the place of a model."""

import asyncio
import threading

import numpy as np
import pytest

from reference_backend.engine.config import ModelError
from reference_backend.executors.stacked import (
    Program,
    Settings,
    Stacked,
    checked_specs,
    file_of,
    first_line,
    read_settings,
    spec_of,
)
from reference_backend.repository import Card
from reference_backend.tensors import BadTensor, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, -1)), TensorSpec("y", "FP32", (-1,))
SUM = TensorSpec("sum", "FP32", (-1,))


class Adder:
    """Sums rows of x and y, whole batches at a time, and remembers their sizes. Waits for `go` where told to."""

    def __init__(self, wait=False):
        self.ran = []
        self.started, self.go = threading.Event(), threading.Event()
        self.wait = wait

    def __call__(self, tensors):
        self.ran.append(len(tensors["x"]))
        if len(self.ran) > 2 and self.wait:  # the first two are to warm up
            self.started.set()
            assert self.go.wait(20)
        if (tensors["x"] == 666).any():
            raise RuntimeError("no such number")
        with np.errstate(all="ignore"):
            return {"sum": (tensors["x"].sum(-1) + tensors["y"]).astype(np.float32)}


def card(**fields):
    return Card(kind="tensor", executor="torch_export", **{"max_batch": 8, **fields})


def stacked(compute, settings=None, inputs=(X, Y), outputs=(SUM,), **fields):
    """`compute` takes and gives tensors by name."""

    def in_order(arrays):
        return compute(dict(zip("xy", arrays, strict=True))).values()

    return Stacked(Program(inputs, outputs, in_order), card(**fields), settings or Settings())


def request(rows, width=2, value=1.0):
    return {"x": np.full((rows, width), value, np.float32), "y": np.arange(rows, dtype=np.float32)}


async def test_requests_that_wait_run_as_one_and_each_gets_its_rows():
    adder = Adder(wait=True)
    async with stacked(adder).running() as model, asyncio.TaskGroup() as group:
        tasks = [group.create_task(model.infer(request(1, value=9.0)))]
        assert await asyncio.to_thread(adder.started.wait, 20)
        tasks += [group.create_task(model.infer(request(rows, value=float(rows)))) for rows in (2, 3, 1)]
        await asyncio.sleep(0)
        other_shape = group.create_task(model.infer(request(2, width=5)))
        await asyncio.sleep(0)
        adder.go.set()
    assert adder.ran == [1, 8, 1, 6, 2]
    assert [task.result()["sum"].tolist() for task in tasks] == [[18.0], [4.0, 5.0], [6.0, 7.0, 8.0], [2.0]]
    assert other_shape.result()["sum"].tolist() == [5.0, 6.0]


async def test_one_thread_computes_from_the_first_run_on():
    adder, threads = Adder(), []
    async with stacked(lambda tensors: threads.append(threading.get_ident()) or adder(tensors)).running() as model:
        await model.infer(request(2))
    assert adder.ran == [1, 8, 2]
    assert len({*threads, threading.get_ident()}) == 2, "this thread and one other"


async def test_a_full_batch_is_stacked_while_the_one_before_it_runs(monkeypatch):
    made = []

    def concatenate(arrays):
        made.append(len(arrays))
        return np.hstack(arrays) if arrays[0].ndim == 1 else np.vstack(arrays)

    monkeypatch.setattr("reference_backend.executors.stacked.np.concatenate", concatenate)
    adder = Adder(wait=True)
    async with stacked(adder).running() as model, asyncio.TaskGroup() as group:
        group.create_task(model.infer(request(1)))
        assert await asyncio.to_thread(adder.started.wait, 20)
        for rows in (4, 3, 1, 2):
            group.create_task(model.infer(request(rows)))
        async with asyncio.timeout(20):
            while len(made) < 2:  # x and y of eight rows, and not the two that are left
                await asyncio.sleep(0)
        assert (made, adder.ran) == ([3, 3], [1, 8, 1])
        adder.go.set()
    assert adder.ran == [1, 8, 1, 8, 2]


async def test_one_that_the_model_fails_on_fails_alone():
    adder = Adder(wait=True)
    async with stacked(adder).running() as model, asyncio.TaskGroup() as group:
        group.create_task(model.infer(request(1)))
        assert await asyncio.to_thread(adder.started.wait, 20)
        good = group.create_task(model.infer(request(1)))
        bad = asyncio.create_task(model.infer(request(1, value=666.0)))
        await asyncio.sleep(0)
        adder.go.set()
        with pytest.raises(RuntimeError, match="no such number"):
            await bad
        assert (await good)["sum"].tolist() == [2.0]


async def test_without_batches_each_runs_by_itself_whatever_its_first_dimension():
    adder = Adder()
    async with stacked(adder, max_batch=1).running() as model:
        assert len((await model.infer(request(30)))["sum"]) == 30
    assert adder.ran == [1, 30]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"x": np.zeros((2, 2), np.float32), "y": np.zeros(3, np.float32)},
            "differ in their first dimension.*x 2, y 3",
        ),
        (request(9), "x has 9 rows; a request may have 1 to 8"),
        (request(0), "x has 0 rows"),
        (request(1, value=np.nan), "x has values that are no numbers"),
        (request(1, value=-np.inf), "x has values that are no numbers"),
    ],
)
async def test_what_is_refused(inputs, message):
    adder = Adder()
    async with stacked(adder).running() as model:
        with pytest.raises(BadTensor, match=message):
            await model.infer(inputs)
    assert adder.ran == [1, 8]


async def test_an_answer_that_is_no_number_is_the_model_s_fault_unless_it_may_be():
    huge = request(1, value=3e38)
    async with stacked(Adder()).running() as model:
        with pytest.raises(ArithmeticError, match="answer has values that are no numbers"):
            await model.infer(huge)
    async with stacked(Adder(), Settings(finite=False)).running() as model:
        assert np.isinf((await model.infer(huge))["sum"]).all()
        assert np.isnan((await model.infer(request(1, value=np.nan)))["sum"]).all()


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda _: 1 / 0, r"first run of 1 row.* fails: division by zero"),
        (lambda _: {"sum": np.zeros(1, np.int64)}, r"output sum is int64 \[1\], said to be FP32 \[-1\]"),
        (lambda _: {"sum": np.zeros((1, 1), np.float32)}, r"float32 \[1, 1\]"),
        (lambda _: {"sum": np.zeros(1, np.float32)}, r"first run of 8 row.*for 8 rows"),
    ],
)
async def test_a_model_that_does_not_do_what_it_says_is_refused(compute, message):
    with pytest.raises(ModelError, match=message):
        async with stacked(compute).running():
            raise AssertionError("it does not work")


def test_batches_need_a_first_dimension_of_any_size():
    with pytest.raises(ModelError, match="max_batch = 8 needs a first dimension of -1, which x, sum has not"):
        stacked(print, inputs=(TensorSpec("x", "FP32", (4, 2)), Y), outputs=(TensorSpec("sum", "FP32", ()),))


def test_settings_and_files_are_judged(tmp_path):
    assert read_settings(tmp_path, card(settings={"threads": 2}), Settings) == Settings(threads=2)
    for settings, message in (({"thread": 1}, "unknown field `thread`"), ({"threads": 0}, r"\$.threads")):
        with pytest.raises(ModelError, match=f"model.toml: settings: .*{message}"):
            read_settings(tmp_path, card(settings=settings), Settings)
    with pytest.raises(ModelError, match="`file` is missing"):
        file_of(tmp_path, card())
    with pytest.raises(ModelError, match="no such file, but model.toml names it"):
        file_of(tmp_path, card(file="model.pt2"))


def test_what_model_toml_says_of_tensors_is_held_against_the_file(tmp_path):
    found = [spec_of("arg0", "FP32", ("rows", 3), tmp_path)]
    assert found == [TensorSpec("arg0", "FP32", (-1, 3))]
    assert checked_specs((), found, "inputs", tmp_path) == found
    for shape in ((-1, 3), (-1, -1), (4, 3)):
        said = [TensorSpec("x", "FP32", shape)]
        assert checked_specs(said, found, "inputs", tmp_path) == said
    for said in ([TensorSpec("x", "FP32", (-1, 4))], [TensorSpec("x", "INT64", (-1, 3))], [X, X], [Y]):
        with pytest.raises(ModelError, match=r"other inputs than the file has: arg0 FP32 \[-1, 3\]"):
            checked_specs(said, found, "inputs", tmp_path)
    with pytest.raises(ModelError, match="tensor z is of a type"):
        spec_of("z", None, (1,), tmp_path)


def test_a_library_s_trouble_is_told_in_a_line():
    assert first_line(ValueError("what\nwhere\nwhy")) == "what"
    assert first_line(KeyError()) == "KeyError"
