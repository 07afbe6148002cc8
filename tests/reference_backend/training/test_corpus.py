"""The generator of text: the same for everyone, right in itself, and with its two sides apart."""

import re

import pytest

from reference_backend.training import corpus
from reference_backend.training.corpus import GLOSSARY, Generator, bare, worked_sum

ROUNDS = 3000


def drawn(*, training):
    generator = Generator(5, training=training)
    return [exchange for _ in range(ROUNDS // 10) for exchange in generator.conversation(10)]


def test_the_same_seed_gives_the_same_text():
    assert drawn(training=True) == drawn(training=True)


@pytest.mark.parametrize("task", ["glossary", "sum", "unknown", "repeat", "count", "small talk", "memory"])
def test_no_question_of_the_examination_is_met_in_training(task):
    learnt = {exchange.question for exchange in drawn(training=True) if exchange.task == task}
    asked = {exchange.question for exchange in drawn(training=False) if exchange.task == task}
    assert learnt
    assert asked
    assert not learnt & asked


def test_a_model_that_sees_learns_names_that_are_no_words_and_is_examined_on_the_usual_ones():
    def names(*, sees, training):
        generator = Generator(5, training=training, sees=sees)
        return [generator.memory()[0].answer.removeprefix("Nice to meet you, ").rstrip(".") for _ in range(300)]

    def unspeakable(names):
        return sum(bool(re.search("[bcdfghjklmnpqrstvwxyz]{3}", name.lower())) for name in names)

    assert names(sees=True, training=False) == names(sees=False, training=False)
    assert unspeakable(names(sees=False, training=True)) == unspeakable(names(sees=True, training=False)) == 0
    assert unspeakable(names(sees=True, training=True)) > 30


def test_names_come_up_as_often_as_they_are_wanted():
    def share(**how):
        exchanges = Generator(5, training=True).conversation(1000, **how)
        return sum(exchange.task == "memory" for exchange in exchanges) / len(exchanges)

    assert share(told=0.0, asked=1.0) < 0.06 < 0.25 < share() < 0.45 < share(told=0.3, asked=0.5)


def test_numbers_names_and_words_are_held_out_by_content():
    def contents(*, training):
        exchanges = drawn(training=training)
        names = {e.answer for e in exchanges if e.answer.startswith("Your name is")}
        sums = {frozenset(e.answer.split("So ")[-1].split(" = ")[0].split(" + ")) for e in exchanges if e.task == "sum"}
        return names, sums, {e.answer for e in exchanges if e.task == "repeat"}

    for learnt, asked in zip(contents(training=True), contents(training=False), strict=True):
        assert asked
        assert not learnt & asked


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        (3, 9, "3 + 9 = 12."),
        (7, 38, "Ones: 7 + 8 = 15. Tens: 0 + 3 + 1 = 4. So 7 + 38 = 45."),
        (50, 78, "Ones: 0 + 8 = 8. Tens: 5 + 7 = 12. So 50 + 78 = 128."),
        (99, 99, "Ones: 9 + 9 = 18. Tens: 9 + 9 + 1 = 19. So 99 + 99 = 198."),
    ],
)
def test_sums_are_worked_out(a, b, answer):
    assert worked_sum(a, b) == answer


def test_every_sum_is_right():
    for a in range(100):
        for b in range(100):
            assert worked_sum(a, b).endswith(f" = {a + b}.")


@pytest.mark.parametrize(
    ("term", "name"), [("a KV cache", "KV cache"), ("an etcd lease", "etcd lease"), ("etcd", "etcd")]
)
def test_articles_come_off(term, name):
    assert bare(term) == name


def test_a_name_is_asked_for_after_it_was_told():
    told, _, asked = Generator(1, training=False).memory()
    name = told.answer.removeprefix("Nice to meet you, ")
    assert asked.answer == f"Your name is {name}"


def test_the_glossary_is_whole():
    assert set(corpus.ALIASES.values()) <= set(GLOSSARY)
    assert not set(corpus.ALIASES) & set(GLOSSARY)
    assert len(set(GLOSSARY.values())) == len(GLOSSARY)
    assert all(answer.endswith(".") and answer.isascii() for answer in GLOSSARY.values())
