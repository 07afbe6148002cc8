import pytest

from policies.quota import ANSWER_TOKENS, PICTURE_TOKENS, Estimate, cost, estimate, prompt_tokens

PICTURE = b"iVBORw0KGgo" * 20_000


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b"", 0),
        (b"x", 1),
        (b"x" * 8, 2),
        (b"x" * 9, 3),
        (b"a word or " * 1000, 2500),
        (b'{"model":"tiny","u":"data:image/png;base64,' + PICTURE + b'"}', 12 + PICTURE_TOKENS),
        (b"a word or " * 1000 + PICTURE + b'","' + PICTURE, 2501 + 2 * PICTURE_TOKENS),
        (b"x" * 4095 + b" ", 1024),
        (b" " + b"x" * 4096, 1 + PICTURE_TOKENS),
        ((b"x" * 4095 + b" ") * 2048, 1024 * 2048),  # an expression took hours for this
    ],
)
def test_a_prompt_is_reckoned_from_its_bytes_and_a_picture_by_the_piece(body, tokens):
    assert prompt_tokens(body) == tokens


@pytest.mark.parametrize(
    ("longest", "answers", "capacity", "expected"),
    [
        (100, 1, 40_000, (10, 100)),
        (100, 3, 40_000, (10, 300)),
        (0, 1, 40_000, (10, 0)),
        (50_000, 1, 40_000, (10, 50_000)),  # it may come to that, and is refused
        (None, 1, 40_000, (10, ANSWER_TOKENS)),
        (None, 2, 40_000, (10, 2 * ANSWER_TOKENS)),
        (None, 1, 500, (10, 490)),  # nobody asked for more
        (None, 1, 5, (10, 0)),
    ],
)
def test_what_a_request_may_come_to(longest, answers, capacity, expected):
    assert estimate(b"x" * 40, longest, answers, capacity) == expected


@pytest.mark.parametrize(
    ("what", "stated", "events", "is_whole", "tokens"),
    [
        ("a whole answer that states its usage", (7, 30), 0, True, 37),
        ("one that used more than was expected", (700, 3000), 0, True, 3700),
        ("a whole stream that states it", (7, 30), 33, True, 37),
        ("a whole stream that does not", (-1, -1), 33, True, 10 + 33),
        ("a whole answer that does not", (-1, -1), 0, True, 10 + 100),
        ("an embedding", (7, -1), 0, True, 7),
        ("an answer that says half", (-1, 30), 0, True, 10 + 30),
        ("a stream whose client left", (-1, -1), 12, False, 10 + 12),
        ("a stream that broke after it had stated its prompt", (7, 1), 12, False, 7 + 12),
        ("a stream that counts as it goes", (7, 20), 12, False, 7 + 20),
        ("nothing had come when the client left", (-1, -1), 0, False, 10),
    ],
)  # fmt: skip
def test_what_a_request_has_come_to(what, stated, events, is_whole, tokens):
    assert cost(Estimate(10, 100), *stated, events, is_whole=is_whole) == tokens, what
