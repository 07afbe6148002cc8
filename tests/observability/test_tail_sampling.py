import pytest

from observability.tail_sampling import TailSampler, is_kept
from tests.support.ended import ended, refused

SLOW = 2.0


@pytest.mark.parametrize(
    ("event", "kept"),
    [
        (ended(), False),
        (ended(sampled=True), True),
        (ended(total=1.999), False),
        (ended(total=2.0), True),
        (refused(500, "internal_error", "internal"), True),
        (refused(503, "no_backend", "no_backend"), True),
        (ended(status=502, code="upstream_failed", end_reason="connect_fail"), True),
        (ended(end_reason="stream_truncated"), True),  # its 200 had gone out
        (refused(401, "unauthenticated", "auth"), False),
        (refused(429, "rate_limited", "rate_limited"), False),
        (ended(status=499, end_reason="client_abort"), False),
    ],
)
def test_kept(event, kept):
    assert is_kept(event, SLOW) is kept


def test_what_is_kept_is_handed_on_as_spans():
    put = []
    sampler = TailSampler(put.append, lambda request: f"spans of {request.request_id}", SLOW)
    for request in (ended(), ended(request_id="a", sampled=True), ended(request_id="b", status=502)):
        sampler(request)
    assert put == ["spans of a", "spans of b"]
