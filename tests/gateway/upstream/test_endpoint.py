from random import Random

import pytest

from gateway.upstream.endpoint import REPORT_SECONDS, Backend, Lease
from gateway.upstream.load_report import LoadReport
from policies.breaker import Outcome, State
from policies.policy import BreakerRule
from tests.support.upstream import endpoint

RULE = BreakerRule(of_at_least=1, key="a")


def backend(on_breaker=lambda backend, state: None, **fields) -> Backend:
    return Backend(endpoint(**fields), 0.0, Random(1), on_breaker)


@pytest.mark.parametrize(
    ("fields", "host"),
    [
        ({}, b"host: 127.0.0.1:9000\r\n"),
        ({"host": "::1", "address": "::1"}, b"host: [::1]:9000\r\n"),
        ({"host": "api.example", "scheme": "https", "port": 443}, b"host: api.example\r\n"),
    ],
)
def test_it_is_called_by_the_host_it_registered(fields, host) -> None:
    assert backend(**fields).head_lines.startswith(host)
    assert backend(**fields).name_line == b"x-weir-backend: a\r\n"


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"weight": 7}, True),
        ({"draining": True}, True),
        ({"max_concurrency": 3}, True),
        ({"models": ()}, True),
        ({"base_path": "/llm"}, True),
        ({"port": 9001}, False),
        ({"address": "127.0.0.2"}, False),
        ({"host": "other"}, False),
        ({"scheme": "https"}, False),
    ],
)
def test_only_another_place_makes_another_backend(change, is_same) -> None:
    old = backend()
    new = endpoint(**change)
    assert old.adopt(new) is is_same
    assert (old.endpoint is new) is is_same
    assert (old.pool.endpoint is new) is is_same
    if is_same:
        assert (old.weight, old.max_concurrency) == (new.weight, new.max_concurrency)


@pytest.mark.parametrize(
    ("report", "reported"),
    [
        (b'JSON {"named_metrics": {"num_requests_running": 5, "num_requests_waiting": 2.5}}', 5.5),
        (b'JSON {"named_metrics": {"num_requests_running": 1}}', 0.0),
        (b"TEXT named_metrics.num_requests_running=5", 1.0),
        (b"\xff", 1.0),
        (b"", 1.0),
    ],
)
def test_a_load_report_tells_what_others_have_there_and_nonsense_tells_nothing(report, reported) -> None:
    one = backend()
    one.inflight = 2
    one.reported = 1.0
    one.hear_header(report, 0.0)
    assert one.reported == reported


def test_a_report_grows_old() -> None:
    one = backend()
    one.hear_header(b'JSON {"named_metrics": {"num_requests_running": 5}}', 10.0)
    one.tidy(10.0 + REPORT_SECONDS - 0.1)
    assert one.reported == 5
    one.tidy(10.0 + REPORT_SECONDS)
    assert one.reported == 0


def test_old_news_is_dropped_unless_nothing_newer_counts() -> None:
    one = backend()
    assert one.hear_load(LoadReport(5, seq=7), 10.0, 0.2)
    assert not one.hear_load(LoadReport(1, seq=6), 10.1, 0.2)
    assert one.hear_load(LoadReport(5, seq=7), 10.1, 0.2)  # nothing has changed: the same word counts longer
    one.forget_load(10.25)
    assert one.reported == 5
    one.forget_load(10.3)
    assert one.reported == 0
    assert one.hear_load(LoadReport(2, seq=1), 10.4, 0.2)  # it has begun anew
    assert one.hear_load(LoadReport(3), 10.4, 0.2)  # one that does not number its reports
    assert one.reported == 3


def test_at_the_end_of_an_answer_that_request_is_over_there_and_still_counted_here() -> None:
    one = backend()
    one.inflight = 2
    one.hear_ended(b'{"running": 4, "waiting": 0, "seq": 3}', 0.0)
    one.hear_ended(b"junk", 0.0)
    assert one.reported == 3


def test_own_requests_since_the_report_count_at_once() -> None:
    one = backend()
    one.inflight = 2
    one.hear_load(LoadReport(6, seq=1), 0.0, 0.2)
    one.inflight += 3
    assert one.inflight + one.reported == 9
    one.inflight -= 5
    assert one.inflight + one.reported == 4


def test_the_size_of_its_cache_follows_from_its_report() -> None:
    one, chain = backend(), tuple(range(2000))
    one.hear_load(LoadReport(0, seq=1, cache_tokens=16_000), 0.0, 0.2)
    assert one.note_prompt(chain) == 0
    assert len(one.prefixes) == 1000
    one.hear_load(LoadReport(0, seq=2, cache_tokens=8_000), 0.0, 0.2)
    assert len(one.prefixes) == 500
    one.hear_cached(chain, 0.9, 100, 0)
    assert len(one.prefixes) == 438
    for told in ((0, 0), (-1, 50), (100, -1)):  # nothing to divide by, or not told
        one.hear_cached(chain, 0.9, *told)
    one.hear_load(LoadReport(0, seq=3, cache_tokens=8_000), 0.0, 0.2)  # as before: what was learnt stays
    assert len(one.prefixes) == 438


def test_one_that_is_busy_looks_loaded_for_a_while() -> None:
    one = backend()
    one.hear_busy(0.0)
    assert one.reported == 8
    one.tidy(REPORT_SECONDS)
    assert one.reported == 0


def test_equal_rules_share_a_breaker() -> None:
    one = backend()
    assert one.breaker(RULE) is one.breaker(BreakerRule(of_at_least=1, key="a"))
    assert one.breaker(RULE) is not one.breaker(BreakerRule(of_at_least=2, key="b"))


def lease(one: Backend, may_open: bool = True) -> Lease:
    breaker = one.breaker(RULE)
    return Lease(one, breaker, breaker.enter(0.0), lambda: 0.0, lambda failing: may_open)


@pytest.mark.parametrize(
    ("outcome", "may_open", "state"),
    [
        (Outcome.SUCCESS, True, State.CLOSED),
        (Outcome.IGNORED, True, State.CLOSED),
        (Outcome.FAILURE, True, State.OPEN),
        (Outcome.FAILURE, False, State.CLOSED),
    ],
)
def test_a_lease_gives_back_its_place_and_tells_the_breaker(outcome, may_open, state) -> None:
    told = []
    one = backend(lambda backend, state: told.append((backend.key, state)))
    with lease(one, may_open) as held:
        assert one.inflight == 1
        held.outcome = outcome
    assert (one.inflight, one.breaker_state) == (0, state)
    assert one.has_open_breaker is (state is State.OPEN)
    assert told == ([("tiny/a", State.OPEN)] if state is State.OPEN else [])


def test_a_lease_that_ends_in_an_exception_counts_neither_way() -> None:
    one = backend()
    with pytest.raises(KeyError), lease(one):
        raise KeyError
    assert (one.inflight, one.breaker_state) == (0, State.CLOSED)


def test_breakers_of_rules_that_are_gone_are_forgotten() -> None:
    one = backend()
    with lease(one) as held:
        held.outcome = Outcome.FAILURE
    assert one.breaker_state is State.OPEN
    one.keep_breakers({"b"})
    assert (one.has_open_breaker, one.breaker_state) == (False, State.CLOSED)


def test_repr_tells_its_state() -> None:
    one = backend()
    assert repr(one) == "<Backend tiny/a unprobed inflight=0 breaker=closed>"
    one.healthy = False
    assert "unhealthy" in repr(one)
    one.adopt(endpoint(draining=True))
    assert "draining" in repr(one)
