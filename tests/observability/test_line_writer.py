import json
import os

import pytest

from observability import line_writer as module
from observability.line_writer import LineWriter
from tests.support.log_output import Output


def test_a_pipe_that_nobody_reads_costs_the_oldest_ordinary_lines():
    output = Output(queued_lines=100)
    for number in range(5000):  # far more than the pipe and the queue hold
        output.writer.write(b"good-%d " % number + b"x" * 500, keep=False)
    for number in range(50):
        output.writer.write(b"bad-%d " % number)
    output.writer.close(timeout=0.01)  # gives up: the descriptor takes nothing
    assert output.writer.dropped > 4000
    os.set_blocking(output.reader, True)
    text = b""
    while b"good-4999" not in text:  # the thread goes on as soon as somebody reads
        text += os.read(output.reader, 65536)
    names = [line.split()[0] for line in text.splitlines()]
    assert [name for name in names if name.startswith(b"bad")] == [b"bad-%d" % number for number in range(50)]
    assert len(names) + output.writer.dropped == 5050
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


def test_what_must_be_kept_is_written_before_older_good_news(monkeypatch):
    monkeypatch.setattr(module, "_PERIOD_SECONDS", 3600.0)  # nothing is written before the end
    output = Output()
    for number in range(3):
        output.writer.write(b"fine %d" % number, keep=False)
    output.writer.write(b"not fine")
    assert output.lines() == [b"not fine", b"fine 0", b"fine 1", b"fine 2"]
    os.close(output.reader)


@pytest.mark.parametrize("text", ["caf\u00e9", "\u20ac", "\U0001f600", "a\x7fb"])
def test_a_line_is_ascii_and_says_the_same_as_json(text):
    output = Output()
    output.writer.write(b'"%b"' % text.encode())
    [line] = output.lines()
    assert line.isascii()
    assert json.loads(line) == text
    os.close(output.reader)
