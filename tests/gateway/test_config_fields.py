from ipaddress import ip_network

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway import config_fields as fields
from gateway.config_fields import Address

TOKEN = "0123456789abcdef"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "admin.token").write_text(f"{TOKEN}\n")
    (tmp_path / "short.token").write_text("short\n")
    (tmp_path / "two.token").write_text(f"{TOKEN} {TOKEN}")
    (tmp_path / "cert.pem").write_text("-")
    return tmp_path


def read(kind, value, base=None):
    return TypeAdapter(kind).validate_python(value, context={"base": base})


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (fields.ListenAddress, "127.0.0.1:8080", Address("127.0.0.1", 8080)),
        (fields.ListenAddress, "[::1]:0", Address("::1", 0)),
        (fields.ListenAddress, "gateway-1.local:65535", Address("gateway-1.local", 65535)),
        (fields.AllowedNetwork, "10.0.0.0/8", ip_network("10.0.0.0/8")),
        (fields.AllowedNetwork, "::1", ip_network("::1/128")),
        (fields.HttpUrl, "http://127.0.0.1:2379", "http://127.0.0.1:2379"),
        (fields.HttpUrls, "http://a", ("http://a",)),
        (fields.HttpUrls, ["http://a", "https://b:1"], ("http://a", "https://b:1")),
        (fields.KeyPrefix, "/weir/v1", "/weir/v1"),
        (fields.RedisUrl, "redis://:pw@h:6379/0", "redis://:pw@h:6379/0"),
        (fields.RedisUrl, "redis+sentinel://a:1,b:2/main", "redis+sentinel://a:1,b:2/main"),
        (fields.OptionalText, "", ""),
    ],
)
def test_read(kind, text, value):
    assert read(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (fields.ListenAddress, "8080", "`8080` is not an address: expected HOST:PORT, such as `127.0.0.1:8080`"),
        (fields.ListenAddress, ":8080", "is not an address"),
        (fields.ListenAddress, "127.0.0.1:65536", "is not an address"),
        (fields.ListenAddress, "::1:80", "is not an address"),
        (fields.AllowedNetwork, "10.0.0.1/8", "`10.0.0.1/8` is not a network: expected one such as `10.0.0.0/8`"),
        (fields.HttpUrl, "127.0.0.1:2379", "`127.0.0.1:2379` is not an http(s) URL"),
        (fields.HttpUrl, "http://[::1", "is not an http(s) URL"),
        (fields.HttpUrl, "http://h:0", "is not an http(s) URL"),
        (fields.HttpUrl, "http://root:secret@h:2379", "a URL must not carry a user or password"),
        (fields.HttpUrl, "root:secret@h", "a URL must not carry a user or password"),
        (fields.HttpUrl, "ftp://root:secret@[h", "a URL must not carry a user or password"),
        (fields.HttpUrls, ["x"], "`x` is not an http(s) URL"),
        (fields.HttpUrl, ["http://h"], "expected an http(s) URL, found a list"),
        (fields.HttpUrls, [], "must not be empty"),
        (fields.KeyPrefix, "weir", "`weir` is not a prefix: expected one such as `/weir/v1`"),
        (fields.KeyPrefix, "/weir/", "is not a prefix"),
        (fields.RedisUrl, "mysql://root:secret@h", "this is no Redis URL"),
    ],
)
def test_refused(kind, text, message):
    with pytest.raises(ValidationError) as caught:
        read(kind, text)
    assert message in caught.value.errors()[0]["msg"]
    assert "secret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_loopback_is_what_certainly_is(host, is_loopback):
    assert Address(host, 1).is_loopback is is_loopback


@pytest.mark.parametrize("text", ["127.0.0.1:1", "[::1]:2", "h:3"])
def test_an_address_reads_as_it_was_written(text):
    assert str(fields.parse_address(text)) == text


def test_files_are_relative_to_the_base(base):
    assert read(fields.File, "cert.pem", base) == base / "cert.pem"
    assert read(fields.File, str(base / "cert.pem"), base / "elsewhere") == base / "cert.pem"
    assert read(fields.FileOrNone, "cert.pem", base) == base / "cert.pem"
    assert read(fields.FileOrNone, "", base) is None
    assert read(fields.PathFromHere, "not-there.yaml", base) == base / "not-there.yaml"


def test_a_token_is_what_the_file_holds_without_line_ends(base):
    assert read(fields.TokenFromFile, "admin.token", base) == TOKEN


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (fields.File, "not-there.pem", "not-there.pem: No such file or directory"),
        (fields.File, ".", "Is a directory"),
        (fields.File, "", "must have 1 to 1000 characters"),
        (fields.File, ["x"], "expected a file, found a list"),
        (fields.TokenFromFile, "not-there.token", "No such file or directory"),
        (
            fields.TokenFromFile,
            "short.token",
            "must hold one token of at least 16 printable characters, without spaces",
        ),
        (fields.TokenFromFile, "two.token", "must hold one token"),
    ],
)
def test_files_that_cannot_be_used(kind, value, message, base):
    with pytest.raises(ValidationError) as caught:
        read(kind, value, base)
    assert message in caught.value.errors()[0]["msg"]
    assert TOKEN not in caught.value.errors()[0]["msg"]
