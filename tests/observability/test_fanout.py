import structlog

from observability.events import StoreChanged
from observability.fanout import BATCH_EVENTS, BATCH_SECONDS, Batch, fanout

EVENT = StoreChanged(up=True, reason="")


def broken(_event):
    raise ValueError("no")


def test_everyone_hears_in_order():
    heard = []
    hear = fanout([lambda event: heard.append(("first", event)), lambda event: heard.append(("second", event))])
    hear(EVENT)
    assert heard == [("first", EVENT), ("second", EVENT)]
    assert hear.failures == 0


def test_a_failing_observer_is_counted_and_told_and_stops_nobody():
    heard = []
    hear = fanout([broken, heard.append])
    with structlog.testing.capture_logs() as logs:
        hear(EVENT)
    assert heard == [EVENT]
    assert hear.failures == 1
    assert [(line["event"], line["observer"], line["on"]) for line in logs] == [
        ("an observer failed", "broken", "StoreChanged")
    ]


def test_a_thousand_failures_are_three_lines_and_one_when_the_window_ends():
    now = 0.0
    hear = fanout([broken], now=lambda: now)
    with structlog.testing.capture_logs() as logs:
        for _ in range(1000):
            hear(EVENT)
        now = 11.0
        hear(EVENT)
    assert hear.failures == 1001
    assert [line["held_back"] for line in logs] == [0, 0, 0, 997]


def test_a_batch_hands_events_on_when_due_when_full_and_when_asked() -> None:
    seen, timers = [], []
    batch = Batch(seen.append, lambda seconds, call: timers.append((seconds, call)))
    for number in range(BATCH_EVENTS):
        batch(number)
    assert len(seen) == BATCH_EVENTS  # full
    batch("next")
    assert len(seen) == BATCH_EVENTS
    batch.flush()
    assert seen[-1] == "next"
    batch("last")
    [(seconds, call)] = timers  # one timer, however many events
    assert seconds == BATCH_SECONDS
    call()
    assert seen[-1] == "last"
