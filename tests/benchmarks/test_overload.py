"""The arithmetic of an overload, and who looks after the gateway's health meanwhile."""

import http.server
import threading

import pytest

from benchmarks.overload import Health, told
from benchmarks.wrk import Load


def load(requests: int, refused: int, broken: int = 0) -> Load:
    return Load(requests, seconds=2.0, refused=refused, broken=broken, p50_ms=1.0, p99_ms=1.0)


def test_a_refusal_costs_what_is_left_when_those_served_are_paid() -> None:
    figures = told(load(1000, 0), 0.1, load(3000, 2000), 0.2)
    assert figures == {
        "goodput": 500.0,
        "goodput_over": 500.0,
        "offered": 3.0,
        "refusal_us": pytest.approx(50.0),
        "failed": 0,
    }


def test_what_was_refused_at_capacity_is_no_goodput() -> None:
    figures = told(load(1000, 200), 0.1, load(3000, 2400, broken=3), 0.2)
    assert (figures["goodput"], figures["goodput_over"], figures["failed"]) == (400.0, 300.0, 3)


def test_a_gateway_that_serves_nobody_is_told_and_not_divided_by() -> None:
    figures = told(load(100, 100), 0.1, load(300, 300), 0.3)
    assert (figures["goodput"], figures["offered"], figures["refusal_us"]) == (0.0, 0.0, pytest.approx(1000.0))


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_health_is_timed_and_counted_when_it_is_bad_or_not_told() -> None:
    health = Health()
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        health.look(server.server_port, "/healthz")
        assert health.failed == 0
        health.look(server.server_port, "/readyz")
        assert health.failed == 1
        server.shutdown()
        thread.join()
    health.look(server.server_port, "/healthz")
    assert health.failed == 2
    assert len(health.seconds) == 3
