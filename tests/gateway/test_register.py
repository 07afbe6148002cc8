"""What a registration is called; the command itself runs in tests/integration/test_register.py."""

from __future__ import annotations

import pytest

from discovery.endpoint import InvalidRegistration
from gateway.register import place


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:9000", "127.0.0.1-9000"),
        ("https://gpu-1.example.com/base/", "gpu-1.example.com-base"),
        ("http://[::1]:9000", "1-9000"),
    ],
)
def test_place(url, expected):
    assert place(url) == expected


@pytest.mark.parametrize("url", ["", "127.0.0.1:9000", "http://"])
def test_no_place(url):
    with pytest.raises(InvalidRegistration):
        place(url)
