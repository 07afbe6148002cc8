import structlog

from observability.events import StoreChanged
from observability.fanout import BATCH_REQUESTS, BATCH_SECONDS, Fanout

FIRST, SECOND = StoreChanged(up=True, reason="first"), StoreChanged(up=True, reason="second")


def broken(_event):
    raise ValueError("no")


def fanout(*observers, now=lambda: 0.0):
    return Fanout(observers, observers, lambda seconds, call: None, now)


def test_everyone_hears_in_order():
    heard, others = [], []
    hear = fanout(heard.append, others.append)
    hear.request_ended(FIRST)
    hear(SECOND)
    assert heard == others == [SECOND]  # events at once, requests soon
    hear.flush()
    assert heard == others == [SECOND, FIRST]
    assert hear.failures == 0


def test_a_failing_observer_is_counted_and_told_and_stops_nobody():
    heard = []

    def fussy(event):
        if event is FIRST:
            raise ValueError("no")
        heard.append(event)

    hear = fanout(fussy, heard.append)
    hear.request_ended(FIRST)
    hear.request_ended(SECOND)
    with structlog.testing.capture_logs() as logs:
        hear.flush()
    assert heard == [SECOND, FIRST, SECOND]
    assert hear.failures == 1
    assert [(line["event"], line["observer"].rpartition(".")[2]) for line in logs] == [("an observer failed", "fussy")]


def test_a_thousand_failures_are_three_lines_and_one_when_the_window_ends():
    now = 0.0
    hear = fanout(broken, now=lambda: now)
    with structlog.testing.capture_logs() as logs:
        for _ in range(1000):
            hear(FIRST)
        now = 11.0
        hear(FIRST)
    assert hear.failures == 1001
    assert [line["held_back"] for line in logs] == [0, 0, 0, 997]


def test_requests_are_handed_on_when_due_when_full_and_when_asked() -> None:
    seen, timers = [], []
    hear = Fanout([seen.append], [], lambda seconds, call: timers.append((seconds, call)))
    for number in range(BATCH_REQUESTS):
        hear.request_ended(number)
    assert len(seen) == BATCH_REQUESTS  # full
    hear.request_ended("next")
    assert len(seen) == BATCH_REQUESTS
    hear.flush()
    assert seen[-1] == "next"
    hear.request_ended("last")
    [(seconds, call)] = timers  # one timer, however many requests
    assert seconds == BATCH_SECONDS
    call()
    assert seen[-1] == "last"
