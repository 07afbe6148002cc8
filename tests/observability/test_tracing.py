import threading

import pytest
import structlog

from observability import events
from observability.tracing import FinishedSpan, SpanExporter, spans
from tests.support.ended import ATTEMPT, ENDED, ended, refused

SPAN = FinishedSpan("work", 1, 2, 0, 10.0, 11.0, {})


class Collector:
    """Takes batches when it is let; says what it answers."""

    def __init__(self, answers=True):
        self.answers = answers
        self.batches = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.called = threading.Event()

    def __call__(self, batch):
        self.called.set()
        assert self.is_open.wait(10)
        self.batches.append(batch)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def test_a_request_is_a_tree():
    server, *children = spans(ended(queue=0.003))
    assert (server.name, server.kind, server.error) == ("chat tiny-1", "server", "")
    assert (server.trace_id, server.span_id, server.parent_id) == (ENDED.trace_id, ENDED.span_id, "")
    assert [child.name for child in children] == [
        "weir.authenticate", "weir.limit", "weir.body", "weir.queue", "weir.pick", "weir.attempt",
    ]  # fmt: skip
    assert {child.parent_id for child in children} == {ENDED.span_id}
    assert {child.trace_id for child in children} == {ENDED.trace_id}
    assert len({child.span_id for child in children} | {ENDED.span_id}) == 7


def test_phases_follow_each_other_inside_the_request():
    server, *children = spans(ended())
    phases = [child for child in children if child.name != "weir.attempt"]
    assert phases[0].start == server.start
    assert all(before.end == pytest.approx(after.start) for before, after in zip(phases, phases[1:], strict=False))
    assert all(server.start <= child.start <= child.end <= server.end for child in children)


def test_a_phase_that_took_no_time_is_no_span():
    names = {span.name for span in spans(ended(auth=0.0, queue=0.0))}
    assert not {"weir.authenticate", "weir.queue"} & names


def test_each_attempt_is_a_span_with_the_id_that_went_upstream():
    failed = events.Attempt("b-2", "tiny", 0.004, 0.001, 0.002, "connect_fail", 0, "00000000000000a2")
    first, second = [span for span in spans(ended(attempts=[failed, ATTEMPT])) if span.name == "weir.attempt"]
    assert (first.span_id, first.error, first.kind) == ("00000000000000a2", "connect_fail", "client")
    assert first.attributes["weir.backend"] == "b-2"
    assert "http.response.status_code" not in first.attributes
    assert (second.span_id, second.error, second.attributes["http.response.status_code"]) == (
        "00000000000000a1",
        "",
        200,
    )


@pytest.mark.parametrize(
    ("changes", "name", "operation"),
    [
        ({"path": "/v1/chat/completions"}, "chat tiny-1", "chat"),
        ({"path": "/v1/messages", "protocol": "anthropic"}, "chat tiny-1", "chat"),
        ({"path": "/v1/completions"}, "text_completion tiny-1", "text_completion"),
        ({"path": "/v1/embeddings"}, "embeddings tiny-1", "embeddings"),
        ({"path": "/v2/models/m/infer"}, "POST /v2/models/m/infer", None),
        ({"path": "other", "method": "GET"}, "GET other", None),
    ],
)
def test_the_name_is_the_operation_and_the_model(changes, name, operation):
    server = next(spans(ended(**changes)))
    assert server.name == name
    assert server.attributes.get("gen_ai.operation.name") == operation
    assert server.attributes.get("gen_ai.provider.name") == (changes.get("protocol", "openai") if operation else None)


def test_what_a_span_tells():
    server = next(spans(ended(stream=True, parent_span_id="0000000000000007")))
    assert server.parent_id == "0000000000000007"
    assert dict(server.attributes) == {
        "http.request.method": "POST", "http.response.status_code": 200, "http.request.body.size": 600,
        "http.response.body.size": 812, "url.path": "/v1/chat/completions", "weir.request_id": "req-1",
        "weir.route": "chat", "weir.service": "tiny", "weir.consumer": "alice", "weir.plan": "free",
        "weir.policy": "0123456789ab", "weir.end_reason": "ok", "weir.attempts": 1, "weir.overhead_seconds": 0.0001,
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "tiny-1",
        "gen_ai.request.stream": True, "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 30,
        "gen_ai.response.time_to_first_chunk": 0.095,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (refused(503, "no_backend", "no_backend"), "no_backend"),
        (refused(503, "overloaded", "shed"), "503"),
        (ended(end_reason="stream_truncated"), "stream_truncated"),
        (refused(404, "no_route", "policy", sampled=True), ""),
    ],
)
def test_errors_are_marked(event, error):
    server = next(spans(event))
    assert server.error == error
    assert server.attributes.get("error.type", "") == error


def test_one_span_can_be_emitted_alone():
    collector = Collector()
    exporter = SpanExporter(collector)
    exporter.emit("chat tiny-1", trace_id="1", span_id="2", parent_id="3", start=1.0, end=2.0, attributes={"a": 1})
    exporter.close()
    assert collector.batches == [[FinishedSpan("chat tiny-1", "1", "2", "3", 1.0, 2.0, {"a": 1}, "server")]]


def test_a_collector_that_hangs_costs_what_does_not_fit_and_nobody_waits():
    collector = Collector()
    collector.is_open.clear()
    exporter = SpanExporter(collector)
    exporter.put([SPAN])
    assert collector.called.wait(5)
    for _ in range(3000):
        exporter.put([SPAN])
    assert exporter.failures == 3000 - 2048
    exporter.close(timeout=0.01)  # returns though the export does not
    collector.is_open.set()
    exporter.close()
    assert sum(map(len, collector.batches)) == 2049


@pytest.mark.parametrize("answer", [False, RuntimeError("encode")])
def test_a_collector_that_refuses_is_told_once_and_counted(answer):
    collector = Collector(answer)
    with structlog.testing.capture_logs() as logs:
        exporter = SpanExporter(collector)
        for _ in range(300):
            exporter.put([SPAN])
        exporter.close()
    assert exporter.failures == 300
    assert [line["event"] for line in logs if "collector" in line["event"]] == [
        "traces do not reach the collector: they are dropped until it answers"
    ]


def test_a_trace_that_cannot_be_made_stops_no_other():
    def broken():
        raise ValueError("no")
        yield

    collector = Collector()
    with structlog.testing.capture_logs() as logs:
        exporter = SpanExporter(collector)
        exporter.put(broken())
        for _ in range(1000):
            if exporter.failures:
                break
            collector.called.wait(0.01)
        exporter.put([SPAN])
        exporter.close()
    assert collector.batches == [[SPAN]]
    assert [line["event"] for line in logs] == [
        "spans could not be made",
        "traces do not reach the collector: they are dropped until it answers",
        "traces reach the collector again",
    ]
