"""Spans on the wire: a receiver that speaks the published protobufs takes them, and their tree is checked."""

import asyncio
import socket
import time

import pytest

from observability import tracing
from observability.events import Attempt
from observability.tail_sampling import TailSampler
from observability.tracing import SpanExporter, otlp_export
from tests.support.ended import ATTEMPT, ENDED, ended, refused
from tests.support.otlp_receiver import OtlpReceiver

pytestmark = pytest.mark.integration

TRACE = ENDED.trace_id


def exporter_to(url, service="weir", timeout=2.0):
    return SpanExporter(otlp_export(url, service, "0.1.0", timeout))


def tracer_of(exporter: SpanExporter) -> TailSampler:
    return TailSampler(exporter.put, tracing.spans, 2.0)


@pytest.fixture
async def receiver():
    async with OtlpReceiver() as receiver:
        yield receiver


async def close(exporter):
    await asyncio.to_thread(exporter.close)


async def test_a_retried_request_arrives_as_a_tree(receiver):
    exporter = exporter_to(receiver.url)
    failed = Attempt("b-2", "tiny", 0.004, 0.001, 0.002, "connect_fail", 0, "00000000000000a2")
    tracer_of(exporter)(ended(sampled=True, parent_span_id="0000000000000077", attempts=[failed, ATTEMPT]))
    spans = {(span.name, span.span_id): span for span in await receiver.wait_spans(7)}
    await close(exporter)

    server = spans["chat tiny-1", ENDED.span_id]
    assert (server.kind, server.parent_id, server.is_error) == ("server", "0000000000000077", False)
    assert server.attributes["gen_ai.usage.output_tokens"] == 30
    assert server.attributes["gen_ai.request.stream"] is False
    assert server.start == pytest.approx(ENDED.started_at)
    assert server.end - server.start == pytest.approx(0.1, abs=1e-6)

    children = [span for span in spans.values() if span is not server]
    assert {span.parent_id for span in children} == {server.span_id}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert {span.service_name for span in spans.values()} == {"weir"}
    assert spans["weir.attempt", "00000000000000a2"].error == "connect_fail"
    assert not spans["weir.attempt", ATTEMPT.span_id].is_error
    assert {"weir.authenticate", "weir.limit", "weir.body", "weir.pick"} < {span.name for span in children}


async def test_a_backends_own_span_hangs_below_the_attempt(receiver):
    gateway, backend = exporter_to(receiver.url), exporter_to(receiver.url, "weir-backend")
    tracer_of(gateway)(ended(sampled=True))
    backend.emit(
        "chat tiny-1",
        trace_id=ENDED.trace_id,
        span_id="000000000000beef",
        parent_id=ATTEMPT.span_id,
        start=ENDED.started_at + 0.01,
        end=ENDED.started_at + 0.09,
        attributes={"gen_ai.operation.name": "chat"},
    )
    spans = await receiver.wait_spans(7)
    await asyncio.gather(close(gateway), close(backend))
    [own] = [span for span in spans if span.service_name == "weir-backend"]
    [attempt] = [span for span in spans if span.name == "weir.attempt"]
    assert (own.trace_id, own.parent_id, own.kind) == (attempt.trace_id, attempt.span_id, "server")
    assert attempt.start <= own.start <= own.end <= attempt.end


async def test_a_bad_attribute_costs_no_other_span(receiver):
    exporter = exporter_to(receiver.url)
    tracer = tracer_of(exporter)
    tracer(ended(sampled=True, request_id="\udc85\x00", model="\udca0" * 1000))
    tracer(refused(503, "no_backend", "no_backend"))
    exporter.emit(
        "own", trace_id="1", span_id="2", parent_id="", start=1.0, end=2.0, attributes={"huge": 2**80, "a": 1}
    )
    spans = await receiver.wait_spans(6 + 5 + 1)
    await close(exporter)
    assert exporter.failures == 0
    by_name = {span.name: span for span in spans}
    assert by_name["own"].attributes == {"a": 1}
    hostile = next(span for span in spans if span.name.startswith(r"chat \udca0"))
    assert hostile.attributes["weir.request_id"] == r"\udc85\x00"


async def test_a_collector_that_comes_back_gets_what_waited(receiver):
    receiver.status = 503
    exporter = exporter_to(receiver.url)
    tracer = tracer_of(exporter)
    tracer(refused(503, "no_backend", "no_backend"))
    async with asyncio.timeout(5):
        while not receiver.requests:
            await asyncio.sleep(0.01)
    receiver.status = 200
    await receiver.wait_spans(5)
    await close(exporter)
    assert exporter.failures == 0


def seconds_to_close(exporter):
    begun = time.perf_counter()
    exporter.close()
    return time.perf_counter() - begun


@pytest.mark.parametrize("kind", ["dead", "silent", "slow"])
async def test_a_collector_that_is_away_costs_a_request_nothing(kind):
    async with OtlpReceiver(delay=30.0) as slow:
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as dead:  # accepts, and never answers
            dead.bind(("127.0.0.1", 0))  # holds a port that nobody listens on
            urls = {"dead": dead, "silent": silent}
            url = slow.url if kind == "slow" else f"http://127.0.0.1:{urls[kind].getsockname()[1]}"
            exporter = exporter_to(url, timeout=0.3)
            tracer = tracer_of(exporter)
            event = ended(sampled=True)
            begun = time.perf_counter()
            for _ in range(5000):
                tracer(event)
            took = time.perf_counter() - begun
            async with asyncio.timeout(60):
                while exporter.failures < 5000 - 2048 + 1:  # what did not fit, and at least one batch that failed
                    await asyncio.sleep(0.01)
            closing = await asyncio.to_thread(seconds_to_close, exporter)
            await asyncio.to_thread(exporter._thread.join, 60)  # on a busy machine it is not waited for to the end
    assert took < 0.5
    assert closing < 5.5
    assert exporter.failures == 5000


async def test_the_full_path_of_a_collector_is_taken_as_it_is(receiver):
    exporter = exporter_to(f"{receiver.url}/v1/traces")
    exporter.emit("own", trace_id="1", span_id="2", parent_id="", start=1.0, end=2.0, attributes={})
    [span] = await receiver.wait_spans(1)
    await close(exporter)
    assert (span.name, span.kind, span.parent_id) == ("own", "server", "")
