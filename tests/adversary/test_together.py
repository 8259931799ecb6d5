"""Several masks run as one batch find what they find one after another."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.small_networks import random_network
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent, attack, exact_attack
from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss, Reference, ReferenceKind
from pdprune.adversary.together import for_each
from pdprune.batches import as_batch
from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator


def token_game(kind: ReferenceKind = "zero", loss: str = "kl") -> Game:
    model, batch = token_model(), as_batch(token_batch(4, 0))
    reference = Reference.measure(kind, model, [batch]).on(model, batch)
    return Game([MaskedLoss(model, batch, loss, reference)], [torch.tensor([1.0, 0, 0, 1, 0, 0.5])])


def at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("pdprune.adversary.objective.how_many_at_once", lambda model, tokens, exhaustive: count)


@pytest.mark.parametrize("kind", get_args(ReferenceKind))
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_losses_and_gradients_are_those_of_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: ReferenceKind, loss: str
) -> None:
    found = []
    for count in (1, 5):
        at_once(monkeypatch, count)
        game = token_game(kind, loss)
        assert game.at_once() == count
        sources = [game.draw(generator(seed), coins=False) for seed in range(5)]
        parts = [sources] if count == 5 else [[source] for source in sources]
        losses = torch.stack([loss for part in parts for loss in game.loss_of_each(part)])
        seen = [both for part in parts for both in game.loss_and_gradient_of_each(part)]
        assert game.losses[0].model.can_batch
        assert torch.allclose(losses, torch.stack([value for value, _ in seen]), rtol=1e-6)
        found.append((losses, torch.stack([gradient for _, gradient in seen])))
    (losses, gradients), (together, gradients_together) = found
    assert losses.shape == (5, 1) and torch.allclose(losses, together, rtol=1e-6, atol=1e-7)
    assert torch.allclose(gradients, gradients_together, rtol=1e-5, atol=1e-7)


def test_attacks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 3):
        at_once(monkeypatch, count)
        network = random_network(2, most_free=7)
        game = Game([MaskedLoss(network.model, as_batch(network.inputs))], [network.keep])
        climb = Ascent(steps=10, step_size=0.2, restarts=4, draws=5, flips=16)
        found.append((attack(game, climb, generator(0)).loss, exact_attack(game).loss))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Deciding(nn.Module):
    """Looks at what it computes before it goes on, which no batched run can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out if float(out.detach().sum()) > 0 else 2 * out


def test_a_target_that_cannot_be_batched_runs_one_mask_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 4)
    target = Deciding()
    model = DecomposedModel.from_components(target, {"layer": (None, target.layer.weight.detach().t())})
    game = Game([MaskedLoss(model, as_batch(torch.randn(5, 3, generator=generator(0))))], [torch.zeros(3)])
    sources = [game.draw(generator(seed), coins=False) for seed in range(4)]
    assert torch.equal(torch.stack([*game.loss_of_each(sources)]), torch.stack([game.loss(s) for s in sources]))
    assert not model.can_batch


def test_running_out_of_memory_is_not_taken_for_that() -> None:
    def hungry(mask: Any) -> Tensor:
        raise torch.OutOfMemoryError("too many at once")

    model = token_model()
    with pytest.raises(torch.OutOfMemoryError):
        for_each(hungry, (torch.zeros(2, 3),), 2, model)
    assert model.can_batch
