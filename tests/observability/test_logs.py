import logging
import os
from typing import get_args

import pytest
import structlog

from observability import events, line_writer
from observability.logs import _SAID, EventLog, Throttle, configure
from tests.support.log_output import Output


@pytest.fixture
def output():
    output = Output()
    yield output
    output.writer.close()
    os.close(output.reader)


@pytest.fixture
def configured(output):
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield output
    structlog.reset_defaults()
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_the_process_log_is_json_with_level_and_time(configured):
    configure(configured.writer, console=False)
    structlog.get_logger().info("started", port=8080)
    structlog.get_logger().debug("not told")
    [record] = configured.records()
    assert (record["event"], record["level"], record["port"]) == ("started", "info", 8080)
    assert record["timestamp"].endswith("Z")


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_what_a_gateway_says_of_itself_outlives_a_flood_of_requests(configured, monkeypatch, level):
    monkeypatch.setattr(line_writer, "_PERIOD_SECONDS", 3600.0)  # nothing is written before the end
    output = Output(queued_lines=10)
    configure(output.writer, console=False)
    getattr(structlog.get_logger(), level)("policy in force")
    for _ in range(20):
        output.writer.write(b"{}", keep=False)
    assert [record.get("event") for record in output.records()] == ["policy in force"] + 10 * [None]
    os.close(output.reader)


def test_other_libraries_speak_through_the_same_door_when_it_matters(configured):
    configure(configured.writer, console=False)
    logging.getLogger("aiohttp.server").warning("odd: %s", "\x1b[2J")
    logging.getLogger("aiohttp.server").info("not told")
    logging.getLogger("broken").warning("%d", "not a number")
    odd, unreadable = configured.records()
    assert (odd["event"], odd["logger"], odd["level"]) == (r"odd: \x1b[2J", "aiohttp.server", "warning")
    assert (unreadable["logger"], unreadable["event"]) == ("broken", "a record that cannot be formatted: TypeError")


@pytest.mark.parametrize("console", [True, False])
def test_a_traceback_tells_no_local_variable_and_obeys_no_client(configured, console):
    configure(configured.writer, console=console)
    secret = "s3cret"
    try:
        raise ValueError("\x1b[2J\udc85")
    except ValueError:
        structlog.get_logger().exception("it broke", detail="a\nb", kept=[secret[:1]])
    lines = configured.lines()
    text = b"\n".join(lines)
    assert b"ValueError" in text
    assert b"s3cret" not in text
    assert b"\x1b[2J" not in text
    assert len(lines) == 1 or console


@pytest.mark.parametrize(
    ("event", "level", "said"),
    [
        (events.PolicyReloaded("ok", "abc"), "info", {"version": "abc"}),
        (events.PolicyReloaded("invalid", "abc", ("p.yaml:3:5 routes: no",)), "error", {"errors": ("p.yaml:3:5 routes: no",)}),
        (events.DiscoveryRejected("/weir/v1/backends/a/b", "url: no"), "warning", {"reason": "url: no"}),
        (events.DiscoveryResynced("periodic", 7, "backends"), "debug", {"revision": 7}),
        (events.DiscoveryResynced("start", 7, "gateways"), "info", {"of": "gateways"}),
        (events.DiscoveryResynced("compacted", 7, "backends"), "warning", {"reason": "compacted"}),
        (events.DiscoveryState("cold", "no answer", "backends"), "warning", {"state": "cold", "reason": "no answer"}),
        (events.DiscoveryState("stale", "no answer", "backends"), "warning", {"state": "stale", "reason": "no answer"}),
        (events.BreakerChanged("tiny", "b-1", "open"), "warning", {"backend": "b-1"}),
        (events.BreakerChanged("tiny", "b-1", "closed"), "info", {"state": "closed"}),
        (events.BackendHealth("tiny", "b-1", False, "refused"), "warning", {"healthy": False}),
        (events.StoreChanged(False, "timeout"), "error", {"reason": "timeout"}),
        (events.StoreChanged(True, ""), "info", {"up": True}),
        (events.KeysRefreshed("https://idp", "failed", "timeout"), "warning", {"issuer": "https://idp"}),
        (events.OverloadChanged("shedding", "memory"), "warning", {"state": "shedding", "reason": "memory"}),
        (events.OverloadChanged("normal", ""), "info", {"state": "normal"}),
        (events.CertificatesRead("listener", "ok", "", "2027-01-01T00:00:00Z"), "info", {"expires": "2027-01-01T00:00:00Z"}),
        (events.CertificatesRead("listener", "ok", "c.pem has expired"), "error", {"reason": "c.pem has expired"}),
        (events.CertificatesRead("etcd", "refused", "k.pem is not the key of c.pem"), "error", {"use": "etcd"}),
        (events.HandshakeFailed("not_tls", "http request"), "info", {"reason": "not_tls"}),
    ],
)  # fmt: skip
def test_what_happens_is_said(event, level, said):
    with structlog.testing.capture_logs() as logs:
        EventLog()(event)
    [line] = logs
    assert line["log_level"] == level
    assert said.items() <= line.items()


def test_every_event_is_said():
    assert set(_SAID) == set(get_args(events.Event))


def test_ten_thousand_bad_registrations_are_twenty_lines_and_a_number():
    now = 0.0
    log = EventLog(lambda: now)
    with structlog.testing.capture_logs() as logs:
        for _ in range(10_000):
            log(events.DiscoveryRejected("/k", "url: no"))
        log(events.StoreChanged(True, ""))  # another kind is heard all the same
        now = 10.0
        log(events.DiscoveryRejected("/k", "url: no"))
    assert len(logs) == 22
    assert logs[-1]["held_back"] == 9980


def test_a_throttle_opens_again_each_window():
    throttle = Throttle(most=2, window=10.0)
    told = [throttle.admit("kind", now) for now in (0.0, 1.0, 2.0, 3.0, 10.0, 10.5, 11.0, 25.0, 40.0)]
    assert told == [0, 0, None, None, 2, 0, None, 1, 0]
