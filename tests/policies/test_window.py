from hypothesis import given
from hypothesis import strategies as st

from policies.window import Window


def test_things_are_forgotten_slice_by_slice():
    window = Window(10.0)
    for now in (0.0, 0.5, 3.0, 9.9):
        window.add(now)

    assert [(now, window.count(now)) for now in (9.9, 10.0, 12.9, 13.0, 18.9, 19.0)] == [
        (9.9, 4),
        (10.0, 2),
        (12.9, 2),
        (13.0, 1),
        (18.9, 1),
        (19.0, 0),
    ]


def test_after_a_long_silence_nothing_is_left():
    window = Window(1.0)
    window.add(0.0)

    assert window.count(1e9) == 0


def test_an_old_reading_counts_as_the_newest():
    window = Window(10.0)
    window.add(100.0)
    window.add(1.0)

    assert window.count(1.0) == 2
    assert window.count(109.0) == 2
    assert window.count(110.0) == 0


def test_clear_forgets_everything():
    window = Window(10.0)
    window.add(1.0)
    window.clear()
    assert window.count(1.0) == 0

    window.add(2.0)
    assert window.count(2.0) == 1


def test_repr_shows_the_state():
    window = Window(10.0)
    window.add(1.0)

    assert repr(window) == "<Window 1 in 10 s>"


@given(st.lists(st.floats(0.0, 3.0), max_size=60), st.floats(0.0, 1e5))
def test_what_is_counted_is_what_happened_in_the_newest_ten_slices(pauses, start):
    window, now, happened = Window(10.0), start, []
    for pause in pauses:
        now += pause
        window.add(now)
        happened.append(now)

        assert window.count(now) == sum(int(then) > int(now) - 10 for then in happened)
