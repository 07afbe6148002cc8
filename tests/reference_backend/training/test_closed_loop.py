"""The committed model that paints is examined by the one that sees; its card tells the truth about it."""

import hashlib
import re

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.process import MODELS  # noqa: E402
from reference_backend.training.closed_loop import EXAMINED, loop, without_kind  # noqa: E402

PAINTER, SEER = MODELS / "tiny-t2i" / "1", MODELS / "tiny-vlm" / "2"
CARD = (MODELS / "tiny-t2i" / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_size_colour_and_place_are_seen_as_they_were_asked_for():
    pairs = loop(PAINTER, SEER, 20)
    missed = [(asked, seen) for asked, seen in pairs if without_kind(asked) != without_kind(seen)]
    assert len(missed) <= 2, missed  # nine in ten, as the card claims of all
    assert len({asked for asked, _ in pairs}) > 10


def test_the_card_names_the_weights_and_claims_what_was_aimed_at():
    assert hashlib.sha256((PAINTER / "model.safetensors").read_bytes()).hexdigest() in CARD
    [(right, asked, share)] = re.findall(
        r"^\| size, colour and place \| (\d+) \| (\d+) \| ([\d.]+)% \|$", CARD, re.MULTILINE
    )
    assert float(share) >= 90
    assert int(asked) == EXAMINED
    assert share == f"{100 * int(right) / EXAMINED:.1f}"


def test_kinds_can_be_left_out():
    assert without_kind("A big red circle in the centre.") == without_kind("A big red cross in the centre.")
    assert without_kind("A big red circle in the centre.") != without_kind("A big red circle at the top left.")
