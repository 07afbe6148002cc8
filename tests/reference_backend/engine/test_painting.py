"""Pictures, step by step: who is painted, who waits, and that neighbours change nothing."""

from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.flow import guided  # noqa: E402
from reference_backend.engine.painting import GUIDANCE, STEPS, Studio  # noqa: E402
from reference_backend.engine.request import Delta, Priority, Sampling, Sequence  # noqa: E402
from tests.support.random_flow import random_flow  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return random_flow(tmp_path_factory.mktemp("flow"))


def words(*numbers, seed=1, deadline=None, priority=Priority.NORMAL, tenant=""):
    return Sequence(list(numbers), Sampling(max_tokens=1, seed=seed), deadline, priority, tenant)


def run(studio, *sequences):
    for each in sequences:
        studio.submit(each)
    published = []
    while studio.is_busy:
        published += studio.turn(0.0)
    return dict(published)


@torch.inference_mode()
def reference(network, sequence):
    """One picture from beginning to end, by itself."""
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(sequence.sampling.seed))
    said = torch.tensor([sequence.prompt + [0] * (6 - len(sequence.prompt))])
    for step in range(STEPS):
        picture -= guided(network, picture, torch.tensor([1 - step / STEPS]), said, GUIDANCE) / STEPS
    pixels = ((picture[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    return bytes(pixels.to(torch.uint8).flatten().tolist())


def assert_alike(pixels, expected):
    """But for rounding, which depends on how many rows a matrix product has."""
    assert len(pixels) == len(expected) == 8 * 8 * 3
    assert max(abs(a - b) for a, b in zip(pixels, expected, strict=True)) <= 1


def test_a_picture_is_that_of_euler_s_method(network):
    asked = words(1, 2, 3)
    delta = run(Studio(network, slots=2, rng=Random(1)), asked)[asked]
    assert (delta.token, delta.finish) == (None, "stop")
    assert_alike(delta.pixels, reference(network, words(1, 2, 3)))
    assert len(set(delta.pixels)) > 10


def test_neighbours_that_come_and_go_change_nothing(network):
    studio = Studio(network, slots=3, rng=Random(1))
    asked = [words(*range(1, 2 + n % 4), seed=n) for n in range(7)]
    published = []
    for each in asked:  # one comes after every third step
        studio.submit(each)
        for _ in range(3):
            published += studio.turn(0.0)
    published = dict(published) | run(studio)
    for each in asked:
        assert_alike(published[each].pixels, reference(network, each))


def test_the_seed_decides_and_without_one_chance_does(network):
    one, same, other, *drawn = (words(1, seed=seed) for seed in (5, 5, 6, None, None))
    published = run(Studio(network, slots=5, rng=Random(1)), one, same, other, *drawn)
    assert published[one] == published[same]
    assert len({published[each].pixels for each in (one, other, *drawn)}) == 4


def test_no_more_than_the_slots_are_painted_and_the_rest_waits_in_order(network):
    studio = Studio(network, slots=2, rng=Random(1))
    low, first, second, high = (words(1, priority=p) for p in (Priority.LOW, 1, 1, Priority.HIGH))
    for each in (low, first, second, high):
        studio.submit(each)
    assert studio.load().waiting == 4
    order = []
    while studio.is_busy:
        order += [sequence for sequence, _ in studio.turn(0.0)]
        assert studio.load().running <= 2
    assert order == [high, first, second, low]
    assert repr(studio) == "<Studio 0 of 2 being painted, 0 waiting>"


def test_tenants_take_turns(network):
    studio = Studio(network, slots=1, rng=Random(1))
    busy, other = [words(1, tenant="busy") for _ in range(3)], words(1, tenant="other")
    assert list(run(studio, *busy, other)) == [busy[0], other, *busy[1:]]


def test_who_is_aborted_hears_nothing_and_who_is_late_is_told(network):
    studio = Studio(network, slots=2, rng=Random(1))
    given_up, late, waiting, waiting_late, stays = asked = [
        words(1), words(1, deadline=1.0), words(1), words(1, deadline=0.5), words(1),
    ]  # fmt: skip
    for each in asked:
        studio.submit(each)
    assert studio.turn(0.0) == []
    studio.abort(given_up)
    studio.abort(waiting)
    published = studio.turn(2.0)
    while studio.is_busy:
        published += studio.turn(2.0)
    assert [(sequence, delta.finish) for sequence, delta in published] == [
        (waiting_late, "deadline"), (late, "deadline"), (stays, "stop"),
    ]  # fmt: skip


def test_what_is_no_number_is_no_picture(network, tmp_path):
    broken = random_flow(tmp_path)
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    asked = words(1)
    assert run(Studio(broken, slots=1, rng=Random(1)), asked) == {asked: Delta(None, "failed")}
