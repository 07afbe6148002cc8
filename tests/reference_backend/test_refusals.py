"""What clients are told in the place of an answer."""

import pytest

from reference_backend import refusals
from reference_backend.refusals import ApiError


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
)
def test_errors_have_the_form_of_openai(status, kind):
    error = ApiError(status, "some_code", "What was wrong.", param="model")
    assert error.body() == {
        "error": {"message": "What was wrong.", "type": kind, "code": "some_code", "param": "model"}
    }


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (refusals.queue_full(), 429, "queue_full"),
        (refusals.loading(), 503, "loading"),
        (refusals.draining(), 503, "draining"),
        (refusals.worker_lost(), 503, "engine_restarted"),
    ],
)
def test_what_was_not_begun_may_be_sent_to_another_backend(refusal, status, code):
    assert (refusal.status, refusal.code) == (status, code)
    assert (refusal.headers["retry-after"], refusal.headers["x-backend-not-started"]) == ("1", "true")
    assert ("x-draining" in refusal.headers) is (code == "draining")


def test_what_a_schema_says_is_shown_in_part():
    refusal = refusals.unfit("tools[0].function.parameters", "a" * 1000)
    assert (refusal.status, refusal.code, refusal.param) == (400, "bad_schema", "tools[0].function.parameters")
    assert refusal.message.startswith("tools[0].function.parameters: aaa")
    assert len(refusal.message) == refusals.LONGEST_SHOWN
