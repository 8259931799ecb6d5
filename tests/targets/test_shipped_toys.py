"""The toys that ship: as their cards say, small, and ready to be decomposed."""

import json

import pytest

from pdprune.decomposition.settings import Decomposition
from pdprune.errors import UserError
from pdprune.targets import load_target
from pdprune.targets.representation import representation
from pdprune.targets.store import SHIPPED, WEIGHTS
from pdprune.targets.toy_card import card_text, model_card
from pdprune.tasks import TaskData

SITES = {
    "tms_5-2": ["linear1", "linear2"],
    "tms_40-10": ["linear1", "linear2"],
    "resid_mlp1": ["layers.*"],
    "resid_mlp2": ["layers.*"],
    "resid_mlp3": ["layers.*"],
    "induction": ["blocks.*"],
}
LARGEST = {"tms_5-2": 1_000, "tms_40-10": 50_000, "induction": 50_000}
"""Bytes of the weights; 130,000 for the others."""


@pytest.mark.parametrize("name", SITES)
def test_a_shipped_toy_is_as_its_card_says(name: str) -> None:
    card = json.loads((SHIPPED / name / "card.json").read_text())
    measured = model_card(SHIPPED / name)
    assert measured["held_out_loss"] == pytest.approx(card["held_out_loss"], rel=1e-3)
    assert measured["representation"]["missing"] == card["representation"]["missing"] == []
    for key in ("name", "sizes", "parameters", "command", "seed", "steps", "data", "training"):
        assert measured[key] == card[key]
    assert (SHIPPED / name / "card.md").read_text() == card_text(card)
    assert (SHIPPED / name / WEIGHTS).stat().st_size <= LARGEST.get(name, 130_000)


@pytest.mark.parametrize("name", SITES)
def test_a_shipped_toy_can_be_decomposed_by_name(name: str) -> None:
    model = Decomposition(name, SITES[name], "svd").load()
    assert model.target_name == name
    assert representation(model.target).is_complete


def test_a_toy_reads_no_text() -> None:
    assert load_target("tms_5-2").tokenizer is None
    with pytest.raises(UserError, match="tms_5-2 reads no text"):
        TaskData("quote", "tms_5-2")
