import pytest

from benchmarks.figures import Spread, admitted_share, micros_each, percentile, spreads


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.99, 0.0),
        ([7.0], 0.5, 7.0),
        ([7.0], 0.99, 7.0),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0),
        ([4.0, 3.0, 2.0, 1.0], 1.0, 4.0),
        (list(range(1, 101)), 0.99, 99),
        (list(range(1, 101)), 0.991, 100),
        (list(range(1, 101)), 0.0, 1),
    ],
)
def test_a_percentile_is_the_smallest_value_that_this_share_does_not_exceed(values, share, expected):
    assert percentile(values, share) == expected


@pytest.mark.parametrize(
    ("cpu_seconds", "count", "expected"), [(1.0, 10_000, 100.0), (0.5, 1, 500_000.0), (0.0, 5, 0.0), (3.0, 0, 0.0)]
)
def test_cpu_for_each_is_told_in_microseconds(cpu_seconds, count, expected):
    assert micros_each(cpu_seconds, count) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("admitted", "seconds", "expected"),
    [(10_100, 10.0, 1.0), (5_050, 10.0, 0.5), (20_200, 10.0, 2.0), (100, 0.0, 1.0)],
)
def test_what_a_full_bucket_allows_is_its_burst_and_what_flows_in(admitted, seconds, expected):
    assert admitted_share(admitted, rate=1000, burst=100, seconds=seconds) == pytest.approx(expected)


def test_a_spread_keeps_every_round_and_tells_the_middle_and_the_ends():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
    assert Spread.of([4.0, 2.0]).median == 3.0


def test_a_figure_that_a_round_lacks_is_taken_from_the_others():
    found = spreads([{"cpu_us": 10.0}, {"cpu_us": 30.0, "lag": 5.0}])
    assert list(found) == ["cpu_us", "lag"]
    assert found["cpu_us"].values == (10.0, 30.0)
    assert found["lag"].values == (5.0,)


def test_no_rounds_have_no_figures():
    assert spreads([]) == {}
