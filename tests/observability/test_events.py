import msgspec
import pytest

from observability import events
from tests.support.ended import ENDED

FORBIDDEN = ("token", "authorization", "prompt", "answer", "address", "header", "messages")


@pytest.mark.parametrize("event", [*events.Event.__args__, events.Attempt])
def test_no_field_can_hold_a_secret(event):
    """Counts and durations may be of tokens; no text may be."""
    texts = [field.name for field in msgspec.structs.fields(event) if field.type in {str, "str"}]
    assert not [name for name in texts if any(word in name for word in FORBIDDEN)]


def test_a_record_stays_as_it_was():
    with pytest.raises(AttributeError):
        ENDED.status = 500


def test_the_end_of_a_good_request_is_a_known_one():
    assert ENDED.end_reason in events.END_REASONS
