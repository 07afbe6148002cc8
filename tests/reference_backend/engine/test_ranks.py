"""Two processes with half a model each, beside one with all of it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.ranks import ALONE, Ranks  # noqa: E402
from tests.support.plain_model import greedy_reference, plain_logits  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")
TEXT = list(range(20, 31))

PROGRAM = """
    import json, sys
    from pathlib import Path

    import torch

    from reference_backend.engine.model import load_model
    from reference_backend.engine.ranks import joined
    from tests.support.plain_model import greedy_reference, plain_logits

    torch.set_num_threads(1)
    rank, meeting, golden, text = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    cpu = torch.device("cpu")
    ranks = joined(rank, 2, meeting, cpu)
    found = {}
    for name in ("llama", "qwen2", "qwen3"):
        model = load_model(golden / name, cpu, ranks=ranks)
        found[name] = [greedy_reference(model, text, 12), plain_logits(model, text)[-1].tolist()]
    print(json.dumps([found, ranks.least(7 + rank, cpu)]))
"""


@pytest.mark.slow
def test_two_ranks_say_what_one_says(tmp_path):
    """All three architectures, token for token, and every rank has the same scores to the last bit."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    arguments = [sys.executable, str(program), "{}", str(tmp_path / "meeting"), str(GOLDEN), json.dumps(TEXT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([each.format(rank) for each in arguments], env=environment, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    (first, least), (second, _) = (json.loads(each.communicate(timeout=100)[0]) for each in started)
    assert first == second
    assert least == 7
    for name, (tokens, scores) in first.items():
        model = load_model(GOLDEN / name, CPU)
        assert tokens == greedy_reference(model, TEXT, 12)
        torch.testing.assert_close(torch.tensor(scores), plain_logits(model, TEXT)[-1], rtol=1e-4, atol=1e-4)


def test_a_dimension_is_shared_without_gaps():
    shares = [Ranks(rank, 3).share(10) for rank in range(3)]
    assert [number for share in shares for number in range(10)[share]] == list(range(10))
    assert range(10)[ALONE.share(10)] == range(10)


def test_one_alone_waits_for_nobody():
    part = torch.arange(3.0)
    ALONE.add_up(part)
    assert part.tolist() == [0, 1, 2]
    assert ALONE.side_by_side(part) is part
    assert ALONE.least(5, CPU) == 5


@pytest.mark.parametrize(("size", "named"), [(3, "heads is 4"), (4, "kv_heads is 2")])
def test_ranks_that_cannot_share_evenly_are_refused(size, named):
    with pytest.raises(ModelError, match=f"{named}, which {size} ranks cannot share evenly; choose another --tensor"):
        load_model(GOLDEN / "llama", CPU, ranks=Ranks(0, size))
