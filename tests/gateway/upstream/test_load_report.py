import pytest

from gateway.upstream.load_report import requests_in


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
def test_what_a_report_says_and_nonsense_does_not(report, requests) -> None:
    assert requests_in(report) == requests
