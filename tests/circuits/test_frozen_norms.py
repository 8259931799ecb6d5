"""Norm scales frozen while a circuit is searched for: what they hide, and that the audit sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model

import pdprune
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.claims.planted.handmade import norm_gain

LOUD = 4


def found(search: str, norm_scales: Any, scheme: Any = "adversarial") -> set[int]:
    puzzle = norm_gain(LOUD)
    batches = [puzzle.batch]
    circuit = pdprune.prune(
        puzzle.model, batches, scheme=scheme, target_loss=puzzle.target_loss, search=search, steps=100,
        norm_scales=norm_scales, seed=0,
    )  # fmt: skip
    return set(circuit.kept)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_with_its_gain_frozen_a_norm_reads_nobody(norm: str) -> None:
    """The loud nodes act through the norm's gain alone: held, no choice of theirs makes a difference."""
    puzzle = norm_gain(LOUD, norm)
    keep = torch.zeros(1 + LOUD)
    keep[0] = 1
    batch = as_batch(puzzle.batch)
    live, frozen = (MaskedLoss(puzzle.model, batch, norm_scales=kind) for kind in ("live", "frozen"))
    assert float(live.mean(live.per_example(keep))) > puzzle.target_loss
    held = float(frozen.mean(frozen.per_example(keep)))
    assert held < 1e-6 if norm == "rms" else held < live.mean(live.per_example(keep))


@pytest.mark.parametrize("search", ["exact", "gradient"])
def test_pruning_finds_fewer_nodes_than_the_live_network_needs(search: str) -> None:
    assert found(search, "live") == set(range(1 + LOUD))
    assert found(search, "frozen") == {0}
    assert found(search, "frozen", "complete") == {0}


def test_the_audit_is_live() -> None:
    puzzle = norm_gain(LOUD)
    batches = [puzzle.batch]
    circuit = pdprune.prune(puzzle.model, batches, target_loss=puzzle.target_loss, norm_scales="frozen")
    audit = pdprune.audit(puzzle.model, circuit, batches)
    assert circuit.reached is True
    assert audit.faithful is False and audit.complete_loss > puzzle.target_loss


@pytest.mark.parametrize(
    ("norm_scales", "says"), [("frozn", "expected one of live, frozen"), ("frozen", "the target has no norm")]
)
def test_mistakes_are_told(norm_scales: Any, says: str) -> None:
    with pytest.raises(pdprune.errors.UserError, match=says):
        pdprune.prune(token_model(), [token_batch()], target_loss=0.1, norm_scales=norm_scales)
