import pytest

from gateway.upstream.load_report import LoadReport, of_document, of_header


@pytest.mark.parametrize(
    ("report", "requests"),
    [
        (b'JSON {"named_metrics": {"num_requests_running": 5, "num_requests_waiting": 2.5}}', 7.5),
        (b'JSON {"named_metrics": {"num_requests_running": 1, "kv_cache_usage_perc": 0.5}, "eps": 1}', 1.0),
        (b'JSON {"named_metrics": {}}', 0.0),
        (b'JSON {"named_metrics": {"num_requests_running": -9}}', None),
        (b'JSON {"named_metrics": {"num_requests_running": 1e9}}', None),
        (b'JSON {"named_metrics": {"num_requests_running": 1e400}}', None),
        (b'JSON {"named_metrics": {"num_requests_running": "5"}}', None),
        (b'JSON {"named_metrics": []}', None),
        (b"JSON " + b"[" * 5000, None),
        (b"JSON {", None),
        (b"TEXT named_metrics.num_requests_running=5", None),
        (b"", None),
    ],
)
def test_what_a_header_says_and_nonsense_does_not(report, requests) -> None:
    found = of_header(report)
    assert (found and found.requests) == requests


def test_a_header_has_a_number() -> None:
    assert of_header(b'JSON {"named_metrics": {"num_requests_running": 1, "seq": 7}}') == LoadReport(1.0, 7)


@pytest.mark.parametrize(
    ("document", "report"),
    [
        (b'{"running": 2, "waiting": 3, "seq": 9, "kv_blocks": 10, "block_size": 16, "t": 1}', LoadReport(5, 9, 160)),
        (b'{"running": 2, "waiting": 3}', LoadReport(5, 0, 0)),
        (b'{"running": 0, "waiting": 0, "kv_blocks": 1000000000, "block_size": 1000000}', LoadReport(0, 0, 10**8)),
        (b'{"running": 2}', None),
        (b'{"running": -2, "waiting": 3}', None),
        (b'{"running": 1e9, "waiting": 3}', None),
        (b'{"running": 1e999, "waiting": 3}', None),
        (b'{"running": NaN, "waiting": 3}', None),
        (b'{"running": 1, "waiting": 3, "seq": -1}', None),
        (b'{"running": 1, "waiting": 3, "seq": 1e30}', None),
        (b'{"running": 1, "waiting": 3, "kv_blocks": -5}', None),
        (b'{"running": 1, "waiting": "3"}', None),
        (b"[" * 5000, None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_what_a_document_says_within_bounds(document, report) -> None:
    assert of_document(document) == report
