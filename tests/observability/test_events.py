import pytest

from observability import events
from observability.request import RequestEnded
from tests.support.ended import ENDED

FORBIDDEN = ("token", "authorization", "prompt", "answer", "address", "header", "messages")


@pytest.mark.parametrize("event", [*events.Event.__args__, events.Attempt, RequestEnded])
def test_no_field_can_hold_a_secret(event):
    """Counts and durations may be of tokens; no text may be."""
    texts = [name for name, kind in event.__annotations__.items() if kind in {str, "str"}]
    assert texts or event is events.StoreChanged
    assert not [name for name in texts if any(word in name for word in FORBIDDEN)]


def test_the_end_of_a_good_request_is_a_known_one():
    assert ENDED.end_reason in events.END_REASONS
