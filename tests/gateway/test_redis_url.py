from __future__ import annotations

import pytest

from gateway.redis_url import RedisUrlError, read_address


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:6379/0", {"kind": "", "nodes": (("127.0.0.1", 6379),), "database": 0, "tls": False}),
        ("redis://cache", {"nodes": (("cache", 6379),), "database": 0, "username": None, "password": None}),
        ("redis://cache/3", {"database": 3}),
        ("redis://[::1]:7000/", {"nodes": (("::1", 7000),)}),
        ("rediss://cache", {"tls": True, "tls_files": ()}),
        ("rediss://cache?ssl_ca_certs=/etc/ca.pem", {"tls_files": (("ssl_ca_certs", "/etc/ca.pem"),)}),
        ("redis://me:p%40ss%3Aword@cache", {"username": "me", "password": "p@ss:word"}),
        ("redis://:secret@cache", {"username": None, "password": "secret"}),
        ("redis://:a@b@cache", {"password": "a@b", "nodes": (("cache", 6379),)}),
        (
            "redis+sentinel://a,b:1,[::1]/main/2",
            {"kind": "sentinel", "nodes": (("a", 26379), ("b", 1), ("::1", 26379)), "service": "main", "database": 2},
        ),
        ("rediss+cluster://a:1,b:2", {"kind": "cluster", "nodes": (("a", 1), ("b", 2)), "tls": True}),
    ],
)
def test_forms(url, expected):
    address = read_address(url)
    assert {name: getattr(address, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no Redis URL"),
        ("http://secret@cache", "no Redis URL"),
        ("redis:secret@cache", "no Redis URL"),
        ("redis://", "no Redis URL"),
        ("redis://:secret@a,b", "redis+sentinel:// or redis+cluster://"),
        ("redis://:secret@a:99999", "host:port"),
        ("redis://:secret@a:b", "host:port"),
        ("redis://:secret@a_/x", "number of a database"),
        ("redis://:secret@a/1/2", "number of a database"),
        ("redis+sentinel://:secret@a", "name of the service"),
        ("redis+cluster://:secret@a/1", "no numbered databases"),
        ("rediss://:secret@a?socket_timeout=5", "ssl_ca_certs"),
        ("redis://:secret@a?ssl_ca_certs=x", "rediss://"),
    ],
)
def test_errors_say_what_to_write_and_never_show_the_login(url, message):
    with pytest.raises(RedisUrlError) as error:
        read_address(url)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_repr_hides_the_login():
    assert "secret" not in repr(read_address("redis://secretuser:secret@cache"))
