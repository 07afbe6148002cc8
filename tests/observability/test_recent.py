import json

from observability.recent import KEPT, Recent
from tests.support.ended import ended, refused


def test_newest_first_and_never_more_than_it_keeps():
    recent = Recent()
    for number in range(KEPT + 50):
        recent(ended(request_id=str(number)))
    shown = recent.requests()
    assert len(shown) == KEPT
    assert [shown[0]["request_id"], shown[-1]["request_id"]] == [str(KEPT + 49), "50"]


def test_times_are_milliseconds_and_what_is_unknown_is_null():
    recent = Recent()
    recent(refused(429, "rate_limited", "rate_limited", rule="plans.free.requests"))
    recent(ended())
    served, limited = recent.requests()
    assert served["total_ms"] == 100.0
    assert served["phases_ms"]["upstream"] == 90.0
    assert served["attempts"] == [
        {"backend": "b-1", "service": "tiny", "status": 200, "outcome": "ok", "started_ms": 4.0, "duration_ms": 95.5}
    ]
    assert (limited["tokens_in"], limited["first_token_ms"], limited["attempts"]) == (None, None, [])


def test_hostile_names_are_plain_json():
    recent = Recent()
    recent(ended(request_id="\udc85\x1b[2J", consumer="x" * 1_000_000))
    [shown] = json.loads(json.dumps(recent.requests()).encode())
    assert shown["request_id"] == r"\udc85\x1b[2J"
    assert len(shown["consumer"]) == 256
