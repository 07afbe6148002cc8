"""The painter: the same for everyone, right in what it says, and with its two sides apart."""

import random
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.training.corpus import is_held_out  # noqa: E402
from reference_backend.training.pictures import (  # noqa: E402
    COLOURS,
    KINDS,
    PLACES,
    SIZES,
    TOLD_APART,
    Painter,
    Shape,
    caption,
)

RED_CIRCLE = Shape("big", "red", "circle", "at the top left")
BLUE_CROSS = Shape("small", "blue", "cross", "in the centre")


def painter(*, training=True):
    return Painter(random.Random(3), training=training)


def drawn(*, training):
    mine = painter(training=training)
    scenes = [mine.scene(shapes) for shapes in (1, 2) * 100]
    return scenes, [mine.exchange(scene) for scene in scenes for _ in range(5)]


def test_the_same_seed_gives_the_same_scenes_questions_and_pixels():
    def once():
        mine = painter()
        scene = mine.scene(2)
        return scene, mine.exchange(scene), mine.picture(scene).tolist()

    assert once() == once()


def test_what_is_held_out_is_in_every_picture_of_the_examination_and_in_none_of_the_training():
    learnt, asked = (drawn(training=training)[0] for training in (True, False))
    assert not any(is_held_out(str(shape)) for scene in learnt for shape in scene)
    assert all(any(is_held_out(str(shape)) for shape in scene) for scene in asked)
    everything = [str(Shape(*each)) for each in product(SIZES, COLOURS, KINDS, PLACES)]
    assert 0.05 < sum(map(is_held_out, everything)) / len(everything) < 0.2


def test_no_phrasing_of_the_examination_is_met_in_training():
    learnt, asked = ({e.question for e in drawn(training=training)[1]} for training in (True, False))
    assert learnt
    assert asked
    assert not learnt & asked


def test_two_shapes_are_told_in_the_order_of_their_places_and_differ():
    for scene in drawn(training=True)[0]:
        places = [list(PLACES).index(shape.place) for shape in scene]
        assert places == sorted(set(places))
        assert len({shape.kind for shape in scene}) == len({shape.colour for shape in scene}) == len(scene)
    assert caption((RED_CIRCLE, BLUE_CROSS)) == "a big red circle at the top left and a small blue cross in the centre"


def test_every_answer_is_true():
    mine, scene = painter(), (RED_CIRCLE, BLUE_CROSS)
    for _ in range(300):
        exchange = mine.exchange(scene)
        if exchange.task == "caption":
            assert exchange.answer == "A big red circle at the top left and a small blue cross in the centre."
        else:
            assert exchange.answer in {
                "The circle is red.", "The cross is blue.", "The circle is big.", "The cross is small.",
                "There are two shapes.",
            }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_where_it_is_said_to_be_in_its_colour(kind):
    mine = painter()
    picture = mine.picture((Shape("big", "white", kind, "at the bottom right"),)).float()
    assert picture.shape == (32, 32, 3)
    bright = picture.amin(dim=-1) > 150
    assert bright[16:, 16:].sum() == bright.sum()
    assert 30 < bright.sum() < 150
    assert bright[24, 24]  # none is hollow


def test_small_is_smaller_than_big():
    mine = painter()

    def pixels(size):
        return sum(
            int((mine.picture((Shape(size, "white", "square", "in the centre"),)) > 150).sum()) for _ in range(9)
        )

    assert pixels("small") < pixels("big") / 2


def test_kinds_can_be_left_out():
    mine = Painter(random.Random(3), training=True, kinds=TOLD_APART)
    assert {shape.kind for _ in range(50) for shape in mine.scene(2)} == set(TOLD_APART) < set(KINDS)
    assert not any("circle" in mine.blind().question for _ in range(50))


def test_without_a_picture_the_answer_is_that_there_is_none():
    assert painter().blind().answer == "I see no picture."
