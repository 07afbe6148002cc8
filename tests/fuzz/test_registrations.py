"""What anybody may write into etcd, beside other readers of JSON, URLs and addresses."""

import json
from contextlib import suppress
from ipaddress import ip_address, ip_network

import h11
import yarl
from hypothesis import example, given
from hypothesis import strategies as st

from discovery.endpoint import InvalidRegistration, Registration, decode, encode
from discovery.source import KeyValue, Rejected
from discovery.vetting import Vetting
from discovery.watch import Delta

ALLOWED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
FIELDS = [*Registration.__struct_fields__, "unknown", "URL", ""]
PARTS = [
    "http://", "https://", "HTTP://", "http:/", "//", "10.0.0.1", "127.0.0.1", "169.254.169.254", "[fd00::1]", "[::1]",
    "[::ffff:10.0.0.1]", "[::ffff:169.254.169.254]", "[fe80::1%25eth0]", "[v1.x]", "0x7f.1", "2130706433", "010.0.0.1", "10.0.1",
    "0", "localhost", "name.internal", "xn--bcher-kva.example", "b\xfccher.example", "a..b", "-a", "a_b", ":80", ":", ":0", ":65536",
    ":+80", ":٣", "/base", "/", "/..", "/%2e%2e/", "?q", "#f", "user@", "user:pass@", "@", "\\", "\t", "\n", " ", "\x00", "\ud800",
]  # fmt: skip

urls = st.lists(st.sampled_from(PARTS), max_size=5).map("".join) | st.sampled_from(
    [
        "http://10.0.0.1:80",
        "http://10.0.0.1",
        "https://[fd00::1]:8443/base",
        "http://name.internal:9000/",
        "http://10.0.0.1.",
    ]
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | urls
    | st.sampled_from([10**400, "x" * 300, "serving", "draining", "openai", "oip", "/health", "tiny", "1", "\u202e", "a\nb"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "version", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
right = {
    "protocols": st.lists(st.sampled_from(["openai", "oip"]), min_size=1, max_size=2),
    "models": st.lists(
        st.fixed_dictionaries({"name": st.text(max_size=4)}, optional={"version": st.text(max_size=2)}), max_size=3
    ),
    "weight": st.integers(0, 1001),
    "zone": st.sampled_from(["", "a", "eu-1", "a b"]),
    "state": st.sampled_from(["serving", "draining", "gone"]),
    "max_concurrency": st.none() | st.integers(0, 3),
    "health": st.none() | st.sampled_from(["/health", "/", "health", "/a b", "/x?y=1"]),
}
documents = st.fixed_dictionaries({"url": urls}, optional=right) | st.dictionaries(
    st.sampled_from(FIELDS), values, max_size=5
)
keys = st.sampled_from(["s/a", "s/b", "s/c"]) | st.text(max_size=6) | st.text("s/.-_ \n\x00é", max_size=6)


@st.composite
def texts(draw) -> bytes:
    """A registration in JSON; now and then with a few bytes that are wrong."""
    text = bytearray(json.dumps(draw(documents), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(text)


@given(keys, texts() | st.binary(max_size=20))
@example("s/a", b'{"url":"http://h","weight":1' + b"0" * 5000 + b"}")
@example("s/a", b'{"url":"http://h","weight":1e999}')
@example("s/a", b'{"url":"http://\\ud800"}')
def test_a_registration_is_read_as_others_read_it_or_refused(key, value) -> None:
    try:
        candidate = decode(key, value)
    except InvalidRegistration:
        return
    endpoint, document = candidate.at("10.0.0.1"), json.loads(value)
    assert f"{endpoint.service}/{endpoint.id}" == key
    url = yarl.URL(document["url"])
    assert (endpoint.scheme, endpoint.port, endpoint.base_path) == (url.scheme, url.port, url.path.rstrip("/"))
    assert endpoint.host == str(candidate.literal or url.host)
    assert tuple(document.get("protocols", ["openai"])) == endpoint.protocols
    assert [model["name"] for model in document.get("models", [])] == [model.name for model in endpoint.models]
    assert document.get("weight", 1) == endpoint.weight
    assert (document.get("state") == "draining") is endpoint.draining
    request = h11.Request(method="GET", target=f"{endpoint.base_path}/x", headers=[("host", endpoint.authority)])
    assert request.target.decode() == f"{endpoint.base_path}/x"


@given(st.builds(Registration, url=urls, weight=st.integers(1, 1000), zone=st.sampled_from(["", "eu-1"])))
def test_what_is_written_is_read_again(registration) -> None:
    with suppress(InvalidRegistration, UnicodeEncodeError):
        endpoint = decode("s/a", encode(registration)).at("10.0.0.1")
        assert (endpoint.weight, endpoint.zone, endpoint.draining) == (registration.weight, registration.zone, False)
        assert decode("s/a", encode(registration.drained())).at("10.0.0.1").draining


@given(st.lists(st.tuples(keys, texts() | st.none()), max_size=8))
def test_nothing_outside_the_allowed_networks_is_ever_published(changes) -> None:
    """After any changes: whoever is there has a good registration, a pinned address and no other key suffers for it."""
    there, told = {}, []

    def publish(verdict) -> None:
        for key in (*verdict.deletes, *verdict.rejected):
            there.pop(key, None)
        there.update((endpoint.key, endpoint) for endpoint in verdict.puts)

    vetting = Vetting(publish, lambda key: None, told.append, allow_networks=ALLOWED, resolve=None)
    latest = {}
    for key, value in changes:
        latest[key] = value
        vetting.apply(Delta((), (key,)) if value is None else Delta((KeyValue(key, value, 1),), ()))
    for key, endpoint in there.items():
        assert any(ip_address(endpoint.address) in network for network in ALLOWED)
        assert decode(key, latest[key]).at(endpoint.address) == endpoint
    for event in told:
        assert isinstance(event, Rejected)
        assert (event.key + event.reason).isprintable()
        assert len(event.key) <= 200
        assert len(event.reason) <= 300
