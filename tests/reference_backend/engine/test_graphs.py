"""Which sizes are prepared, and how a batch is filled up. What a step computes: test_runner.py and test_engine.py."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.graphs import Prepared, recording, sizes_up_to  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (16, [1, 2, 4, 8, 16]),
        (40, [1, 2, 4, 8, 16, 32, 40]),
    ],
)
def test_sizes(slots, sizes):
    assert sizes_up_to(slots) == sizes


def test_a_batch_is_filled_up_with_nobody():
    prepared, taken = [], []

    def step(slots):
        return slots[:, None].float(), slots

    def prepare(step):
        prepared.append(len(step()[1]))

        def repeat():
            taken.append(len(step()[1]))
            return step()

        return repeat

    subject = Prepared(step, slots=5, device=CPU, prepare=prepare)
    assert prepared == [5, 4, 2, 1]
    many, few = torch.tensor([4, 0, 2]), torch.tensor([3])
    for slots, size in [(many, 4), (few, 1), (many, 4), (many, 4)]:
        scores, tokens = subject.take(slots)
        assert (scores[:, 0].tolist(), tokens.tolist()) == (slots.tolist(), slots.tolist())
        assert taken.pop() == size
    assert subject._slots.tolist() == [4, 0, 2, subject.nobody, subject.nobody]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU: torch sees none")
def test_a_recorded_step_reads_what_is_there_when_it_is_replayed():
    number = torch.zeros(1, device="cuda")
    replay = recording()(lambda: (number + 1, number + 2))
    number.fill_(5)
    assert [each.tolist() for each in replay()] == [[6], [7]]
