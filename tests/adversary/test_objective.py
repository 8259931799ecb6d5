"""The loss of a batch under masks: what it runs the target for, and what it can do without."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from circuits.networks import token_batch, token_model

from pdprune.adversary.game import Game, Scope
from pdprune.adversary.objective import MaskedLoss, Reference, ReferenceKind
from pdprune.batches import as_batch
from pdprune.losses import NAMED


@pytest.mark.parametrize("kind", get_args(ReferenceKind))
@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("loss", NAMED)
def test_nothing_ablated_is_the_target_to_the_last_bit(loss: str, scope: Scope, kind: ReferenceKind) -> None:
    model, batch = token_model(), as_batch(token_batch(4, 0))
    masked = MaskedLoss(model, batch, loss, Reference.measure(kind, model, [batch]).on(model, batch))
    game = Game([masked], [torch.tensor([1.0, 0, 0.3, 1, 0, 0.7])], scope)
    assert torch.equal(game.unablated_loss(), game.loss(game.corner(1.0)))


def test_cross_entropy_does_not_run_the_target() -> None:
    model = token_model()
    runs = []
    model.target.register_forward_hook(lambda *_: runs.append(1))
    masked = MaskedLoss(model, as_batch(token_batch(4, 0)), "ce")
    masked.per_example(torch.ones(model.n_nodes))
    assert len(runs) == 1
    masked.unablated()
    masked.unablated()
    assert len(runs) == 2
