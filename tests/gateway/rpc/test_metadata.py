import pytest

from gateway.rpc.metadata import address_in, forwarded, lines_of, pairs, passing, value_in

CLIENTS = (
    ("user-agent", "grpc-python"),
    ("authorization", "Bearer x"),
    ("x-team", "blue"),
    ("x-weir-consumer", "root"),
    ("x_weir_consumer", "root"),
    ("x-forwarded-for", "1.1.1.1"),
    ("grpc-trace-bin", b"\x00"),
    ("grpc-internal-encoding-request", "gzip"),
    ("traceparent", "00-x"),
    ("tracestate", "a=b"),
    ("x-data-bin", b"\xff\x00"),
    ("x-weir-data-bin", b"\xff"),
    ("x-strange", "\xff"),
    ("te", "trailers"),
)


def test_what_goes_on_to_the_backend() -> None:
    assert forwarded(CLIENTS) == (("x-team", "blue"), ("tracestate", "a=b"), ("x-data-bin", b"\xff\x00"))
    assert forwarded((("tracestate", "a" * 513),)) == ()


def test_what_the_rules_for_lines_see() -> None:
    assert lines_of((("x-a", "é"), ("x-b-bin", b"\xff"))) == [(b"x-a", "é".encode())]


def test_what_comes_back_to_the_client() -> None:
    told = (("x-weir-policy", "mine"), ("grpc-status-details-bin", b"\x01"), ("x-weir-backend", "other"))
    assert passing(told) == (("grpc-status-details-bin", b"\x01"),)


def test_header_lines_of_ours() -> None:
    assert pairs(b"a: 1\r\nb-c: x: y\r\n") == (("a", "1"), ("b-c", "x: y"))
    assert pairs(b"") == ()


def test_a_value_is_the_first_text_of_its_name() -> None:
    told = (("a", b"\x00"), ("a", "1"), ("a", "2"))
    assert (value_in(told, "a"), value_in(told, "b")) == (b"1", b"")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.9:5000", "10.0.0.9"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("unix:/tmp/x", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_address_of_a_peer(peer, address) -> None:
    assert address_in(peer) == address
