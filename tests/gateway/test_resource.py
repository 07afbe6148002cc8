import pytest

from gateway import resource as module
from gateway.resource import resource_of
from policies import errors


@pytest.mark.parametrize(
    ("target", "protocol", "model", "version"),
    [
        (b"/v1/chat/completions", "openai", None, None),
        (b"/v1/messages", "anthropic", None, None),
        (b"/v2/models/resnet/infer", "oip", "resnet", None),
        (b"/v2/models/resnet/versions/3/infer", "oip", "resnet", "3"),
        (b"/v2/models/resnet/ready", "oip", "resnet", None),
        (b"/v2/models/resnet/versions/3/generate", "oip", "resnet", "3"),
        (b"/v2/models/resnet/infer/", "oip", "resnet", None),
        (b"/v2/models/gr%C3%B6%20b/versions/a%2Bb/infer", "oip", "grö b", "a+b"),
        (b"/v2/models", "oip", None, None),
        (b"/hooks/a", "http", None, None),
    ],
)
def test_protocol_and_model_come_from_the_path(target, protocol, model, version) -> None:
    resource = resource_of(target)
    resource.check()
    assert (resource.protocol, resource.model, resource.version) == (protocol, model, version)


def test_a_query_is_no_part_of_the_path() -> None:
    resource = resource_of(b"/v1/chat/completions?x=%20")
    assert (resource.path, resource.encoded, resource.needs_model) == (
        "/v1/chat/completions",
        b"/v1/chat/completions?x=%20",
        True,
    )


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        (b"http://evil/x", errors.BadRequest),
        (b"*", errors.BadRequest),
        (b"evil:443", errors.BadRequest),
        (b"", errors.BadRequest),
        (b"/\xff", errors.BadRequest),
        (b"/v1/%00", errors.BadRequest),
        (b"/v1/a%0d%0ab", errors.BadRequest),
        (b"/v1/a?b=%0A", errors.BadRequest),
        (b"/v1/models#/admin", errors.BadRequest),
        (b"/v1/models?a#b", errors.BadRequest),
        (b"//v1/models", errors.NoRoute),
        (b"/v1/%2e%2e/admin", errors.NoRoute),
        (b"/v1/../admin", errors.NoRoute),
        (b"/v1/a;b", errors.NoRoute),
        (b"/v1/a%5cb", errors.NoRoute),
        (b"/v1/chat/completion%73", errors.NoRoute),
        (b"/v2/models/%73ecret/infer", errors.NoRoute),
        (b"/v2/models/a%5Fb/infer", errors.NoRoute),
    ],
)
def test_a_target_that_two_readers_could_understand_differently_is_refused(target, refusal) -> None:
    with pytest.raises(refusal):
        resource_of(target).check()


def test_what_is_known_is_bounded_and_holds_nothing_refused_or_long() -> None:
    resource_of(b"//refused")
    resource_of(b"/long" + b"x" * 500)
    for number in range(3000):
        resource_of(b"/made-up/%d" % number)
    assert len(module._known) <= 1024
    assert not {b"//refused", b"/long" + b"x" * 500} & module._known.keys()
    # and however many were made up before, what is asked for again is known
    assert resource_of(b"/made-up/1") is resource_of(b"/made-up/1")
