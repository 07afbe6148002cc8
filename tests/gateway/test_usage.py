import pytest

from gateway.usage import load_in, usage_of


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}', (1, 2, -1)),
        (b'{"usage":{"input_tokens":1,"output_tokens":2}}', (1, 2, -1)),
        (b'{"response":{"usage":{"input_tokens":1,"output_tokens":2}}}', (1, 2, -1)),
        (b'{"type":"message_start","message":{"usage":{"input_tokens":1,"output_tokens":2}}}', (1, 2, -1)),
        (b'{"usage":{"prompt_tokens":"many"}}', (-1, -1, -1)),
        (b'{"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":8}}}', (9, 2, 8)),
        (b'{"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":null}}', (9, 2, -1)),
        (b"{}", (-1, -1, -1)),
        (b"junk", (-1, -1, -1)),
        (b"[" * 100_000, (-1, -1, -1)),
    ],
)
def test_usage_of_a_document(document, tokens) -> None:
    assert usage_of(document) == tokens


@pytest.mark.parametrize(
    ("document", "load"),
    [
        (b'{"usage":{},"load":{"running":1}}', b'{"running":1}'),
        (b'{"load": {"running": 1} , "a": 1}', b'{"running": 1}'),
        (b'{"a":{"load":1}}', b""),
        (b"[" * 100_000, b""),
        (b"junk", b""),
    ],
)
def test_load_in_a_document(document, load) -> None:
    assert load_in(document) == load
