"""What a sequence knows about itself."""

import pytest

from reference_backend.engine.request import Sampling, Sequence


def sequence(**settings):
    return Sequence([5, 6, 7], Sampling(max_tokens=3, **settings), 10.0)


def test_tokens_are_known_pending_and_computed():
    asked = sequence()
    assert (asked.uncomputed, asked.drawn, asked.generated) == (3, 0, [])
    asked.computed, asked.pending = 3, 1
    assert (asked.uncomputed, asked.drawn, asked.generated) == (1, 1, [])
    asked.pending = 0
    asked.tokens.append(8)
    assert (asked.uncomputed, asked.drawn, asked.generated) == (1, 1, [8])


def test_behind_the_last_token_there_is_nothing_to_compute():
    asked = sequence()
    asked.tokens += [1, 2]
    asked.computed, asked.pending = 5, 1
    assert (asked.uncomputed, asked.drawn) == (0, 3)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, (False, False, False)),
        ({"temperature": 0.0}, (True, False, False)),
        ({"temperature": 1e-6}, (True, False, False)),
        ({"top_k": 1}, (True, True, False)),
        ({"top_k": 2}, (False, True, False)),
        ({"top_p": 0.9}, (False, True, False)),
        ({"min_p": 0.1}, (False, True, False)),
        ({"presence_penalty": -1.0}, (False, False, True)),
        ({"frequency_penalty": 0.1}, (False, False, True)),
        ({"repetition_penalty": 1.1}, (False, False, True)),
    ],
)
def test_settings_say_what_they_need(settings, kinds):
    sampling = Sampling(max_tokens=1, **settings)
    assert (sampling.is_greedy, sampling.is_filtered, sampling.is_penalized) == kinds


@pytest.mark.parametrize(("now", "is_late"), [(9.9, False), (10.0, True)])
def test_a_deadline_is_late_when_it_is_reached(now, is_late):
    assert sequence().is_late(now) is is_late
    assert not Sequence([1], Sampling(max_tokens=1)).is_late(now)
