import json
import logging
import os
from pathlib import Path

import pytest
import structlog

from observability import events
from observability.logs import AccessLog, EventLog, LineWriter, Throttle, configure
from tests.support.ended import ATTEMPT, ended, refused

BLNS = Path(__file__).parents[3] / "shared" / "corpora" / "blns" / "blns.json"


class Output:
    """A pipe whose reader is the test; `lines` closes the writer and reads everything."""

    def __init__(self, queued_lines=10_000, blocking=True):
        self.reader, self.descriptor = os.pipe()
        os.set_blocking(self.descriptor, blocking)
        self.writer = LineWriter(self.descriptor, queued_lines=queued_lines)

    def lines(self):
        """May hold 64 KiB: a pipe's worth."""
        self.writer.close()
        os.close(self.descriptor)
        with open(self.reader, "rb", closefd=False) as file:
            return file.read().splitlines()

    def records(self):
        return [json.loads(line) for line in self.lines()]


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


def test_a_request_is_one_line(output):
    AccessLog(output.writer)(ended(sampled=True))
    assert output.records() == [
        {
            "time": 1_700_000_000.0, "request_id": "req-1", "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "consumer": "alice", "plan": "free", "method": "POST", "path": "/v1/chat/completions", "route": "chat",
            "service": "tiny", "model": "tiny-1", "backend": "b-1", "policy": "0123456789ab", "status": 200,
            "end_reason": "ok", "total_ms": 100.0, "overhead_ms": 0.1, "auth_ms": 1.0, "limit_ms": 0.5, "body_ms": 2.0,
            "pick_ms": 0.5, "attempts": 1, "bytes_in": 600, "bytes_out": 812, "tokens_in": 12, "tokens_out": 30,
            "first_token_ms": 95.0, "upstream_ms": 90.0, "connect_ms": 1.0,
        }
    ]  # fmt: skip


def test_a_refusal_says_why_and_leaves_out_what_never_was(output):
    AccessLog(output.writer)(refused(429, "rate_limited", "rate_limited", rule="plans.free.requests"))
    [record] = output.records()
    assert (record["status"], record["code"], record["rule"]) == (429, "rate_limited", "plans.free.requests")
    assert (record["attempts"], record["backend"]) == (0, "")
    assert not {"tokens_in", "tokens_out", "first_token_ms", "upstream_ms", "stream"} & record.keys()


def test_only_requests_are_access(output):
    AccessLog(output.writer)(events.StoreChanged(up=True, reason=""))
    assert output.lines() == []


@pytest.mark.parametrize(
    "text",
    [
        "a\r\nb", "\x1b[31m", "\x00", "\x7f\x85", "\u2028\u2029\u202e", "${jndi:ldap://x}", "\udc85admin\udca0", '"}\\',
        "\U0001f600", "caf\u00e9", "x" * 1_000_000, "\u20ac" * 200,
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["request_id", "consumer", "path", "model", "rule"])
def test_hostile_text_is_one_plain_short_line(output, field, text):
    AccessLog(output.writer)(ended(**{field: text}))
    [line] = output.lines()
    assert line.isascii()
    assert line.decode().isprintable()
    assert len(json.loads(line)[field]) <= 256 * len(r"\udc85")


@pytest.mark.skipif(not BLNS.exists(), reason=f"corpus of naughty strings is not at {BLNS}")
def test_every_naughty_string_is_one_line_that_parses():
    naughty = json.loads(BLNS.read_text())
    descriptor = os.memfd_create("log")
    writer = LineWriter(descriptor)
    log = AccessLog(writer)
    for text in naughty:
        log(ended(request_id=text, consumer=text, model=text, path=text))
    writer.close()
    lines = os.pread(descriptor, 10_000_000, 0).splitlines()
    os.close(descriptor)
    assert len(lines) == len(naughty)
    assert all(line.decode("ascii").isprintable() and isinstance(json.loads(line), dict) for line in lines)


def test_a_pipe_that_nobody_reads_costs_the_oldest_ordinary_lines():
    output = Output(queued_lines=100)
    log = AccessLog(output.writer)
    for number in range(5000):  # far more than the pipe and the queue hold
        log(ended(request_id=f"good-{number}"))
    for number in range(50):
        log(ended(request_id=f"bad-{number}", status=502))
    output.writer.close(timeout=0.01)  # gives up: the descriptor takes nothing
    assert output.writer.dropped > 4000
    os.set_blocking(output.reader, True)
    text = b""
    while b"good-4999" not in text:  # the thread goes on as soon as somebody reads
        text += os.read(output.reader, 65536)
    ids = [json.loads(line)["request_id"] for line in text.splitlines()]
    assert [id_ for id_ in ids if id_.startswith("bad")] == [f"bad-{number}" for number in range(50)]
    assert len(ids) + output.writer.dropped == 5050
    for descriptor in (output.reader, output.descriptor):
        os.close(descriptor)


def test_a_full_disk_raises_nothing_and_is_counted():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor, queued_lines=10)
    for number in range(100):
        writer.write(b"line %d" % number)
    writer.close()
    os.close(descriptor)
    assert writer.dropped == 100


def test_a_line_cut_short_is_finished_later():
    """A descriptor that takes a part and then refuses: what a disk does that fills up and is cleared."""
    output = Output(blocking=False)
    for number in range(3000):
        output.writer.write(b"%04d " % number + b"x" * 95)
    text = b""
    while text.count(b"\n") < 3000:
        text += os.read(output.reader, 4096)
    assert [int(line[:4]) for line in text.splitlines()] == list(range(3000))
    assert {len(line) for line in text.splitlines()} == {100}
    assert output.lines() == []
    os.close(output.reader)


def test_the_process_log_is_json_with_level_and_time(configured):
    configure(configured.writer, console=False)
    structlog.get_logger().info("started", port=8080)
    structlog.get_logger().debug("not told")
    [record] = configured.records()
    assert (record["event"], record["level"], record["port"]) == ("started", "info", 8080)
    assert record["timestamp"].endswith("Z")


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


def test_warnings_are_written_before_older_good_news(configured):
    configure(configured.writer, console=False)
    for _ in range(3):
        structlog.get_logger().info("fine")
    structlog.get_logger().error("not fine")
    assert sorted(record["event"] for record in configured.records()) == ["fine", "fine", "fine", "not fine"]


@pytest.mark.parametrize(
    ("event", "level", "said"),
    [
        (events.PolicyReloaded("ok", "abc"), "info", {"version": "abc"}),
        (events.PolicyReloaded("invalid", "abc", ("p.yaml:3:5 routes: no",)), "error", {"errors": ("p.yaml:3:5 routes: no",)}),
        (events.DiscoveryRejected("/weir/v1/backends/a/b", "url: no"), "warning", {"reason": "url: no"}),
        (events.DiscoveryResynced("periodic", 7), "info", {"revision": 7}),
        (events.DiscoveryResynced("compacted", 7), "warning", {"reason": "compacted"}),
        (events.DiscoveryState("stale"), "warning", {"state": "stale"}),
        (events.BreakerChanged("tiny", "b-1", "open"), "warning", {"backend": "b-1"}),
        (events.BreakerChanged("tiny", "b-1", "closed"), "info", {"state": "closed"}),
        (events.BackendHealth("tiny", "b-1", False, "refused"), "warning", {"healthy": False}),
        (events.StoreChanged(False, "timeout"), "error", {"reason": "timeout"}),
        (events.StoreChanged(True, ""), "info", {"up": True}),
        (events.KeysRefreshed("https://idp", "failed", "timeout"), "warning", {"issuer": "https://idp"}),
    ],
)  # fmt: skip
def test_what_happens_is_said(event, level, said):
    with structlog.testing.capture_logs() as logs:
        EventLog()(event)
    [line] = logs
    assert line["log_level"] == level
    assert said.items() <= line.items()


def test_every_event_but_the_request_is_said():
    with structlog.testing.capture_logs() as logs:
        EventLog()(ended())
    assert logs == []


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


def test_a_backend_is_told_by_its_id_alone(output):
    AccessLog(output.writer)(ended(attempts=(ATTEMPT, ATTEMPT)))
    [record] = output.records()
    assert (record["backend"], record["attempts"]) == ("b-1", 2)
