"""What is told of a load, and when, with a worker whose load the test says and a clock that jumps."""

import asyncio
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reference_backend.engine.frames import Start
from reference_backend.engine.request import Load
from reference_backend.load_report import (
    APART_SECONDS,
    HEARTBEAT_SECONDS,
    SIGN_SECONDS,
    Reporter,
    metrics_page,
    named_metrics,
    orca,
)
from reference_backend.worker import Worker
from tests.support.virtual_clock import virtual_time

BUSY = Load(3, 1, 0.25, 100, 60, 7, 2, slots=4, kv_used=8, kv_blocks=32, block_size=16, queue_seconds=0.5)


class Played(Worker):
    """A worker that says what the test has it say."""

    def __init__(self, load):
        super().__init__(Start("", [], 4, None, None), 8, lambda: 0.0)
        self.says = load

    def load(self):
        return self.says

    def say(self, load):
        self.says = load
        self.change()


def reporter(load=BUSY, draining=False):
    worker = Played(load)
    made = Reporter(worker, lambda: 1000.0)
    made.draining = draining
    return worker, made


def test_a_report_has_what_the_worker_says_and_what_the_server_has_seen():
    worker, subject = reporter(draining=True)
    worker.rejects = 5
    subject.answered(0.2, 0.5, 4)  # three gaps of 0.1 s
    subject.answered(0.4, 0.4, 1)  # no gap
    report = subject.report()
    assert (report.running, report.waiting, report.free_slots, report.max_running) == (3, 1, 4, 4)
    assert (report.kv_used, report.kv_blocks, report.block_size, report.hit_rate) == (8, 32, 16, 0.6)
    assert (report.ttft_ms_p50, report.tpot_ms_p50, report.queue_ms_ewma) == (300.0, 100.0, 500.0)
    assert (report.rejects, report.preemptions, report.draining, report.t) == (5, 2, True, 1000.0)


def test_one_that_has_done_nothing_yet_divides_by_nothing():
    _, subject = reporter(Load(0, 0, 0.0))
    report = subject.report()
    assert (report.hit_rate, report.ttft_ms_p50, report.tpot_ms_p50, report.is_busy) == (0.0, 0.0, 0.0, False)


@pytest.mark.parametrize(("load", "apart"), [(Load(0, 0, 0.0), HEARTBEAT_SECONDS), (BUSY, SIGN_SECONDS)])
@virtual_time
async def test_without_a_change_it_is_told_now_and_then(load, apart):
    _, subject = reporter(load)
    times = [asyncio.get_running_loop().time() async for _ in first(3, subject.reports())]
    assert [after - before for before, after in pairwise(times)] == pytest.approx([apart, apart])


@virtual_time
async def test_a_change_is_told_soon_and_many_changes_not_too_often():
    worker, subject = reporter(Load(0, 0, 0.0))
    loop = asyncio.get_running_loop()

    async def change():
        await asyncio.sleep(0.5)
        for running in range(100):
            worker.say(Load(running + 1, 0, 0.1))
            await asyncio.sleep(0.001)

    changing = asyncio.create_task(change())
    told = [(loop.time(), report.running, report.seq) async for report in first(7, subject.reports())]
    await changing
    assert [at for at, _, _ in told[:2]] == pytest.approx([0.0, 0.5])
    assert all(after - before >= APART_SECONDS - 1e-9 for (before, *_), (after, *_) in pairwise(told))
    assert told[-1][0] < 0.65
    assert [running for _, running, _ in told[1:]] == sorted(running for _, running, _ in told[1:])
    assert [seq for *_, seq in told] == sorted({seq for *_, seq in told})
    assert told[-1][1:] == (100, 100)


async def first(count, reports):
    async for report in reports:
        yield report
        count -= 1
        if not count:
            await reports.aclose()
            return


def test_metrics_can_be_scraped():
    _, subject = reporter()
    page = metrics_page({'a "b"\\c': subject})
    families = {family.name: family for family in text_string_to_metric_families(page)}
    values = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert {name: value for name, value in values.items() if name.startswith("vllm:")} == {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 1,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 60,
        "vllm:prompt_tokens_total": 100,
        "vllm:generation_tokens_total": 7,
        "vllm:num_preemptions_total": 2,
        "vllm:cache_config_info": 1,
    }
    assert families["vllm:num_preemptions"].type == "counter"
    assert families["vllm:kv_cache_usage_perc"].samples[0].labels == {"model_name": 'a "b"\\c'}
    sizes = families["vllm:cache_config_info"].samples[0].labels
    assert (sizes["block_size"], sizes["num_gpu_blocks"]) == ("16", "32")
    ours = {name.removeprefix("weir_backend_load_") for name in values if name.startswith("weir_backend_load_")}
    assert ours == set(subject.report().__struct_fields__)
    assert (values["weir_backend_load_kv_used"], values["weir_backend_load_draining"]) == (8, 0)


def test_the_header_in_both_forms():
    metrics = named_metrics(Load(running=3, waiting=1, kv_usage=0.123456), 7)
    assert orca(metrics, "json") == (
        'JSON {"named_metrics":{"num_requests_running":3,"num_requests_waiting":1,"kv_cache_usage_perc":0.1235,"seq":7}}'
    )
    assert orca(metrics, "text") == (
        "TEXT named_metrics.num_requests_running=3, named_metrics.num_requests_waiting=1, "
        "named_metrics.kv_cache_usage_perc=0.1235, named_metrics.seq=7"
    )
