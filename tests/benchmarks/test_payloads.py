import json

import pytest

from benchmarks.payloads import ANSWER, EVENT_BYTES, chat_request, event


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_chat_with_the_model_asked_for(stream):
    request = json.loads(chat_request(model="tiny-2", stream=stream))
    assert request["model"] == "tiny-2"
    assert request.get("stream", False) is stream


def test_sizes_are_those_that_the_figures_are_told_for():
    assert 170 <= len(chat_request()) <= 200
    assert 320 <= len(ANSWER) <= 340
    assert len(event()) == EVENT_BYTES
    assert json.loads(ANSWER)["usage"]["total_tokens"] == 34


def test_the_last_event_has_the_usage_and_ends_the_stream():
    events = event(last=True).decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["usage"]["completion_tokens"] == 99
    assert events[1:] == ["data: [DONE]", ""]
    assert json.loads(event().decode().removeprefix("data: "))["choices"][0]["delta"]["content"]
