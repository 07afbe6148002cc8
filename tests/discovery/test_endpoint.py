import json
import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.endpoint import (
    MAX_VALUE_BYTES,
    Endpoint,
    InvalidRegistration,
    Model,
    ModelEntry,
    Registration,
    decode,
    encode,
    id_of_place,
    literal_address,
)


def value(**fields):
    return json.dumps({"url": "http://10.0.0.1:9000", **fields}).encode()


def refusal(key, data):
    with pytest.raises(InvalidRegistration) as refused:
        decode(key, data)
    return str(refused.value)


def test_what_a_backend_writes_is_what_the_gateway_reads():
    registration = Registration(
        url="https://gpu-7.example:8443/tenant/a/",
        protocols=("openai", "oip"),
        models=(ModelEntry("tiny", "2"), ModelEntry("meta/Llama-3.1-8B")),
        weight=3,
        zone="eu-1b",
        max_concurrency=8,
        health="/ping?full=1",
        load="/load/stream",
        grpc_port=9001,
        grpc_health="model/tiny@2",
    )
    assert decode("chat/a", encode(registration)).at("10.1.2.3") == Endpoint(
        key="chat/a",
        service="chat",
        id="a",
        scheme="https",
        host="gpu-7.example",
        port=8443,
        address="10.1.2.3",
        base_path="/tenant/a",
        protocols=("openai", "oip"),
        models=(Model("tiny", "2"), Model("meta/Llama-3.1-8B")),
        weight=3,
        zone="eu-1b",
        draining=False,
        max_concurrency=8,
        health_path="/ping?full=1",
        load_path="/load/stream",
        grpc_port=9001,
        grpc_health="model/tiny@2",
    )


def test_a_url_is_enough_and_unknown_fields_do_not_matter():
    endpoint = decode("tiny/1", b'{"url": "http://h", "since": {"v": [1]}, "gpu": null}').at("10.0.0.1")
    assert (endpoint.host, endpoint.port, endpoint.base_path, endpoint.protocols) == ("h", 80, "", ("openai",))
    assert (endpoint.models, endpoint.weight, endpoint.draining, endpoint.health_path) == ((), 1, False, None)


def test_draining_is_told_by_the_state():
    registration = Registration(url="http://10.0.0.1")
    assert not decode("a/b", encode(registration)).at("10.0.0.1").draining
    assert decode("a/b", encode(registration.drained())).at("10.0.0.1").draining


@pytest.mark.parametrize(
    ("url", "host", "port", "authority"),
    [
        ("http://127.0.0.1:9000", "127.0.0.1", 9000, "127.0.0.1:9000"),
        ("http://127.0.0.1:80/", "127.0.0.1", 80, "127.0.0.1"),
        ("https://h", "h", 443, "h"),
        ("HTTPS://Tiny.Default.SVC:443", "tiny.default.svc", 443, "tiny.default.svc"),
        ("http://[::1]:8000", "::1", 8000, "[::1]:8000"),
        ("http://[FE80:0::1]", "fe80::1", 80, "[fe80::1]"),
        ("http://[::ffff:10.0.0.1]:1", "10.0.0.1", 1, "10.0.0.1:1"),
        ("http://docker_name_1:65535", "docker_name_1", 65535, "docker_name_1:65535"),
        ("http://1.2.3.example", "1.2.3.example", 80, "1.2.3.example"),
    ],
)
def test_urls_that_say_where(url, host, port, authority):
    endpoint = decode("s/i", value(url=url)).at("10.0.0.1")
    assert (endpoint.host, endpoint.port, endpoint.authority) == (host, port, authority)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:80",
        "//h",
        "file:///etc/passwd",
        "gopher://h",
        "unix:///run/docker.sock",
        "http:///v1",
        "http://user:pw@h",
        "http://h@169.254.169.254",
        "http://h?x=1",
        "http://h/?",
        "http://h#f",
        "http://h:0",
        "http://h:65536",
        "http://h:-1",
        "http://h:80a",
        "http://h:8 0",
        "http://2130706433",  # 127.0.0.1 as one number
        "http://0x7f.1",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.1",
        "http://1.2.3.4.5",
        "http://h.0x1f",
        "http://[fe80::1%25eth0]",
        "http://[fe80::1%eth0]",
        "http://[::1",
        "http://[v1.x]",
        "http://h..x",
        "http://.h",
        "http://h.",
        "http://-h",
        "http://" + "a" * 64,
        "http://" + "a." * 130 + "b",
        "http://ünïcode.example",
        "http://①②⑦.0.0.1",
        "http://h%00.example",
        "http://h%2eexample",
        "http://h\t.example",
        "http://h\n",
        "http://h\\@evil",
        "http://h/a/../b",
        "http://h/./b",
        "http://h/%2e%2e/b",
        "http://h//b",
        "http://h/a b",
        "http://h/a;b",
        "http://" + "h" * 3000,
        " http://h",
    ],
)
def test_urls_that_do_not(url):
    assert refusal("s/i", value(url=url)).startswith("url: ")


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("tiny", "key"),
        ("", "key"),
        ("/x", "key: service"),
        ("x/", "key: id"),
        ("a/b/c", "key: id"),
        ("../b", "key: service"),
        ("a/..", "key: id"),
        ("a b/c", "key: service"),
        ("a/\\xff", "key: id"),
        ("a/b\n", "key: id"),
        ("a/" + "x" * 129, "key: id"),
    ],
)
def test_names_that_are_not(key, where):
    assert refusal(key, value()).startswith(where)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "value: "),
        (b"null", "Expected `object`"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `url`"),
        (b'{"url": 1}', "$.url"),
        (b'{"url": "http://h"', "value: "),
        (b"\xff\xfe", "value: "),
        (b'{"url": "http://\xff"}', "value: "),
        (b'{"url": "http://h", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested too deeply"),
        (b" " * (MAX_VALUE_BYTES + 1), "longer than 64 KiB"),
        (value(weight=0), "$.weight"),
        (value(weight=1001), "$.weight"),
        (value(weight=1.5), "$.weight"),
        (value(weight=True), "$.weight"),
        (value(weight="1"), "$.weight"),
        (value(weight=10**400), "$.weight"),
        (value(state="gone"), "$.state"),
        (value(max_concurrency=0), "$.max_concurrency"),
        (value(grpc_port=65536), "$.grpc_port"),
        (value(grpc_port="9001"), "$.grpc_port"),
        (value(grpc_health="a\nb"), "grpc_health: expected at most 200 printable characters"),
        (value(protocols=[]), "$.protocols"),
        (value(protocols="openai"), "$.protocols"),
        (value(protocols=["open ai"]), "protocols[0]"),
        (value(protocols=["x"] * 17), "$.protocols"),
        (value(models=[{"name": ""}]), "models[0].name"),
        (value(models=[{"name": "a"}, {"name": "b\n"}]), "models[1].name"),
        (value(models=[{"name": "\u202eevil"}]), "models[0].name"),
        (value(models=[{"name": "x" * 201}]), "models[0].name"),
        (value(models=[{"name": "a", "version": "\x00"}]), "models[0].version"),
        (value(models=[{"name": "a"}] * 257), "$.models"),
        (value(models=["tiny"]), "$.models"),
        (value(zone="a b"), "zone"),
        (value(health="health"), "health"),
        (value(health="/a b"), "health"),
        (value(load="load"), "load"),
        (value(load="//\\evil"), "load"),
        (value(health="/" + "a" * 300), "health"),
    ],
)
def test_values_that_are_refused(data, said):
    assert said in refusal("s/i", data)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)
registrations = st.dictionaries(st.sampled_from(Registration.__struct_fields__), json_values)


@settings(max_examples=30)
@given(st.text(), st.binary() | registrations.map(lambda fields: json.dumps(fields).encode()))
def test_nothing_else_than_a_refusal_comes_of_any_bytes(key, data):
    with suppress(InvalidRegistration):
        decode(key, data)


@given(st.text(max_size=60))
def test_any_text_for_a_url_is_refused_or_names_a_plain_place(text):
    try:
        endpoint = decode("s/i", value(url=f"http://{text}")).at("10.0.0.1")
    except InvalidRegistration:
        return
    assert 1 <= endpoint.port <= 65535
    assert endpoint.host.isascii()
    assert not set(endpoint.host + endpoint.base_path) & set("@\\?# \r\n\t%")


@pytest.mark.parametrize(
    ("text", "address"),
    [("10.0.0.1", "10.0.0.1"), ("::1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1"), ("h", None), ("010.0.0.1", None)],
)
def test_literal_addresses(text, address):
    found = literal_address(text)
    assert (str(found) if found else None) == address


def test_an_id_stands_for_a_place_and_does_not_tell_it():
    urls = ["http://127.0.0.1:9000", "http://127.0.0.1:9001", "http://gpu.example/base", "http://[::1]:9000/v2"]
    ids = [id_of_place(url) for url in urls]
    assert ids == [id_of_place(f"{url}/") for url in urls]
    assert len(set(ids)) == len(urls)
    for url, name in zip(urls, ids, strict=True):
        assert decode(f"s/{name}", value(url=url)).key == f"s/{name}"
        assert re.fullmatch("[0-9a-f]{12}", name)
