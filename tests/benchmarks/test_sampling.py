import signal
import time
from pathlib import Path

import pytest

from benchmarks.sampling import Place, Samples, part_of


def work(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_what_works_is_seen_by_file_and_function():
    samples = Samples()
    while sum(samples.seen.values()) < 10:
        with samples.taken():
            work(0.05)
    (dearest, share), *_ = samples.by_function()
    assert dearest == Place("tests/benchmarks/test_sampling.py", "work")
    assert share > 0.5
    assert samples.by_part()[0][0] == "tests/benchmarks/test_sampling.py"


def test_afterwards_nothing_looks_any_more():
    before = signal.getsignal(signal.SIGPROF)
    with Samples().taken():
        pass
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == before


def test_shares_are_of_all_samples_and_the_largest_comes_first():
    samples = Samples()
    samples.seen.update({Place("a.py", "f"): 1, Place("a.py", "g"): 2, Place("b.py", "h"): 1})
    assert samples.by_part() == [("a.py", 0.75), ("b.py", 0.25)]
    assert samples.by_function()[0] == (Place("a.py", "g"), 0.5)


def test_without_samples_there_are_no_shares():
    assert Samples().by_part() == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (str(Path(__file__).parent.parent.parent / "gateway" / "relay.py"), "gateway/relay.py"),
        ("/v/lib/python3.11/site-packages/aiohttp/web_protocol.py", "aiohttp/web_protocol.py"),
        ("/usr/lib/python3.11/asyncio/queues.py", "asyncio/queues.py"),
        ("<string>", "<string>"),
    ],
)
def test_a_part_is_told_the_way_that_readers_know_it(path, expected):
    assert part_of(path) == expected
