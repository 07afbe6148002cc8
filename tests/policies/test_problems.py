import pytest

from policies.problems import MAX_PROBLEMS, InvalidDocument, Problem, did_you_mean, dotted, kind_of, shown


def test_problem_reads_as_place_path_and_sentence():
    assert Problem(3, 7, "plans.free.burst", "is odd").text("p.yaml") == "p.yaml:3:7 plans.free.burst: is odd"
    assert Problem(1, 1, "", "is empty").text("p.yaml") == "p.yaml:1:1 is empty"


def test_problems_come_in_the_order_of_the_file_and_once():
    first, second = Problem(2, 9, "b", "x"), Problem(10, 1, "a", "x")
    assert InvalidDocument([second, first, second]).problems == (first, second)


def test_a_document_has_only_so_many_problems():
    assert len(InvalidDocument(Problem(line, 1, "", "x") for line in range(10_000)).problems) == MAX_PROBLEMS


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("routes", 0, "match", "path"), "routes[0].match.path"),
        (("plans", "a b", "burst"), "plans[`a b`].burst"),
        (("plans", "a\n\x1b[2J"), "plans[`a\\u000a\\u001b[2J`]"),
    ],
)
def test_dotted(path, text):
    assert dotted(path) == text


def test_what_a_file_says_stays_on_one_short_line():
    assert shown("a\r\n\u2028\x1b[31m") == "`a\\u000d\\u000a\\u2028\\u001b[31m`"
    assert len(shown("x" * 10_000)) == 62


@pytest.mark.parametrize(
    ("word", "hint"),
    [("burts", ": did you mean `burst`?"), ("request", ": did you mean `requests`?"), ("zzz", ""), ("", "")],
)
def test_did_you_mean(word, hint):
    assert did_you_mean(word, ["requests", "burst", "concurrency"]) == hint


def test_kind_of():
    assert [kind_of(value) for value in ([], {}, "x")] == ["a list", "a mapping", "`x`"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("redis://:hunter2@h:6379/0", "`redis://...@h:6379/0`"),
        ("https://root:hunter2@h/a@b", "`https://...@h/a@b`"),
        ("https://root:" + "hunter2" * 20 + "@h", "`https://...@h`"),  # before it is cut, not after
        ("https://h/a@b", "`https://h/a@b`"),
        ("a@b", "`a@b`"),
    ],
)
def test_the_login_of_a_url_is_not_shown(text, told):
    assert shown(text) == told
