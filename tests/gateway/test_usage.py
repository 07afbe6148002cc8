import pytest

from gateway.usage import usage_of


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}', (1, 2)),
        (b'{"usage":{"input_tokens":1,"output_tokens":2}}', (1, 2)),
        (b'{"response":{"usage":{"input_tokens":1,"output_tokens":2}}}', (1, 2)),
        (b'{"type":"message_start","message":{"usage":{"input_tokens":1,"output_tokens":2}}}', (1, 2)),
        (b'{"usage":{"prompt_tokens":"many"}}', (-1, -1)),
        (b"{}", (-1, -1)),
        (b"junk", (-1, -1)),
        (b"[" * 100_000, (-1, -1)),
    ],
)
def test_usage_of_a_document(document, tokens) -> None:
    assert usage_of(document) == tokens
