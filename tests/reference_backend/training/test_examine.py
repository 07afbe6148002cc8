"""The committed weights sit the examination, and the card tells the truth about them."""

import hashlib
import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.model import load_model, parameters  # noqa: E402
from reference_backend.tokenizer import Tokenizer  # noqa: E402
from reference_backend.training.examine import (  # noqa: E402
    PICTURE_TASKS,
    TASKS,
    Question,
    Score,
    answers,
    examine,
    questions,
    table,
)
from tests.support.tiny_model import DIRECTORY, tiny  # noqa: E402

CARD = (DIRECTORY / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_the_committed_weights_answer_nine_in_ten_of_each_task():
    scores = examine(*tiny(), per_task=20)
    assert {score.task for score in scores} == set(TASKS)
    low = [score for score in scores if score.right < 0.9 * score.asked]
    assert not low, low


def test_the_card_names_the_weights_beside_it():
    digest = hashlib.sha256((DIRECTORY / "model.safetensors").read_bytes()).hexdigest()
    assert digest in CARD
    assert f"{parameters(tiny()[0].config):,} parameters" in CARD


def test_the_card_claims_nine_in_ten_for_each_task():
    rows = dict(re.findall(r"^\| ([a-z ]+?) \| .* \| ([\d.]+)% \|$", CARD, re.MULTILINE))
    assert set(rows) == {*TASKS, "all"}
    assert all(float(share) >= 90 for share in rows.values()), rows


SEEING = DIRECTORY.parent / "tiny-vlm"
SEEING_CARD = (SEEING / "MODEL_CARD.md").read_text()
CLAIM = re.compile(r"^\| ([a-z ]+?) \| ([\d.]+)% \| ([\d.]+)% \| (\d+) of (\d+) \|$", re.MULTILINE)
AIMED_AT = {  # per cent, of version 2
    "glossary": 95, "sum": 98, "memory": 95, "unknown": 90, "small talk": 100, "caption": 97, "question": 97,
    "no picture": 90, "all": 95,
}  # fmt: skip
SAMPLE = 20  # of the questions of each task that the card is about


@pytest.mark.slow
def test_of_the_models_that_see_the_newer_one_is_as_good_as_its_card_says_and_the_older_one_is_not():
    scores = {}
    for version in ("1", "2"):
        directory = SEEING / version
        scores[version] = examine(load_model(directory, torch.device("cpu")), Tokenizer(directory), SAMPLE)
    assert {score.task for score in scores["2"]} == {*TASKS, *PICTURE_TASKS}
    low = [score for score in scores["2"] if score.asked - score.right > 2]
    assert not low, low
    older, newer = (sum(score.right for score in scores[version]) for version in ("1", "2"))
    assert older < newer


def test_the_card_of_the_models_that_see_claims_what_was_aimed_at():
    claims = {task: (older, newer) for task, older, newer, _, _ in CLAIM.findall(SEEING_CARD)}
    missed = {task: claims[task] for task, share in AIMED_AT.items() if float(claims[task][1]) < share}
    assert set(claims) == set(AIMED_AT)
    assert not missed, missed
    assert float(claims["all"][0]) < float(claims["all"][1])


def test_the_card_of_the_models_that_see_adds_up_and_names_their_weights():
    rows = {task: (newer, int(right), int(asked)) for task, _, newer, right, asked in CLAIM.findall(SEEING_CARD)}
    assert all(share == f"{100 * right / asked:.1f}" for share, right, asked in rows.values())
    for column in (1, 2):
        assert rows["all"][column] == sum(row[column] for task, row in rows.items() if task != "all")
    for version in ("1", "2"):
        for name in ("model", "vision"):
            path = SEEING / version / f"{name}.safetensors"
            assert f"`{version}/{path.name}` `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in SEEING_CARD


def test_questions_about_pictures_have_one_but_for_those_without():
    asked = questions(5, with_pictures=True)
    assert asked == questions(5, with_pictures=True)
    for question in asked:
        assert len(question.pictures) == (question.task in ("caption", "question"))
        assert all(len(pixels) == 32 * 32 * 3 for pixels in question.pictures)
        assert question.messages[-1].content.count("<|image_pad|>") == 16 * len(question.pictures)


def test_the_model_is_as_small_as_it_should_be():
    assert parameters(tiny()[0].config) <= 2_000_000
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 5_000_000


def test_the_examination_is_always_the_same_and_never_asks_twice():
    asked = questions(30)
    assert asked == questions(30)
    assert asked != questions(30, seed=1)
    for task in TASKS:
        mine = [(q.messages[-1].content, q.expected) for q in asked if q.task == task]
        assert len(mine) == len(set(mine)) <= 30


def test_a_memory_question_comes_with_its_history():
    question = next(q for q in questions(1) if q.task == "memory")
    turns = [m.role for m in question.messages if m.role != "system"]
    assert turns == ["user", "assistant", "user", "assistant", "user"]


def test_answers_come_in_the_order_of_the_questions():
    asked = [q for q in questions(2) if q.task in ("sum", "repeat")]
    assert answers(*tiny(), asked) == [answers(*tiny(), [Question(q.task, q.messages, q.expected)])[0] for q in asked]


def test_the_table_adds_up():
    rows = table([Score("sum", 9, 10, "a miss"), Score("count", 10, 10, None)])
    assert rows == "| sum | 9 | 10 | 90.0% |\n| count | 10 | 10 | 100.0% |\n| all | 19 | 20 | 95.0% |"
