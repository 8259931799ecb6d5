"""Scorers: the loss of binary circuits under each scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.small_networks import random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent, exact_attack
from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss, Reference, masked_losses
from pdprune.batches import as_batch
from pdprune.circuits.schemes import AdversarialScorer, CompleteScorer, Draws, SchemeName, StochasticScorer, scorer
from pdprune.claims.planted.handmade import by_neuron, cancelling_sets
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.seeding import generator

SEEDS = st.integers(0, 10**6)
SCHEMES: list[SchemeName] = ["complete", "stochastic", "adversarial"]
few = settings(max_examples=6, deadline=None)


def losses_of(seed: int, parts: int = 2) -> tuple[list[MaskedLoss], Tensor]:
    network = random_network(seed, most_free=6)
    splits = network.inputs.tensor_split([3]) if parts == 2 else (network.inputs,)
    return [MaskedLoss(network.model, as_batch(part)) for part in splits], network.keep


def make(scheme: SchemeName, losses: list[MaskedLoss], **options: Any) -> Any:
    settings = {"scope": "batch", "draws": Draws(count=4), "ascent": Ascent(4, 0.5, 2), "max_ablated": None, "seed": 0}
    return scorer(scheme, losses, **(settings | options))


@given(seed=SEEDS)
@few
def test_complete_is_the_loss_with_everything_else_ablated(seed: int) -> None:
    losses, keep = losses_of(seed)
    deltas = torch.zeros(losses[0].model.n_sites)
    with torch.no_grad():
        every_example = torch.cat([loss.per_example(keep, deltas) for loss in losses])
    assert make("complete", losses).score(keep) == pytest.approx(float(every_example.mean()), rel=1e-5)


@given(seed=SEEDS, p=st.sampled_from([0.0, 1.0]))
@few
def test_sure_coins_are_complete_ablation_or_the_model(seed: int, p: float) -> None:
    losses, keep = losses_of(seed)
    found = make("stochastic", losses, draws=Draws("bernoulli", p=p, count=2)).score(keep)
    expected = make("complete", losses).score(keep) if p == 0 else 0.0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_stochastic_is_the_mean_over_its_draws() -> None:
    losses, keep = losses_of(1, parts=1)
    game = Game(losses, [keep])
    draws = Draws("bernoulli", p=0.5, count=4000)
    found = StochasticScorer(losses, draws=draws).score(keep)
    free = int(game.free.sum())
    with torch.no_grad():
        corners = []
        for number in range(2**free):
            entries = torch.ones(game.free.shape)
            entries[game.free] = torch.tensor([float(number >> bit & 1) for bit in range(free)])
            corners.append(float(game.loss(entries)))
    assert found == pytest.approx(sum(corners) / len(corners), rel=0.08)


def test_uniform_draws_are_uniform_and_coins_are_coins() -> None:
    losses, _ = losses_of(0, parts=1)
    game = Game(losses, [torch.zeros(losses[0].model.n_nodes)])
    uniform = torch.stack([Draws().entries(game, generator(i)) for i in range(500)])[:, game.free]
    coins = torch.stack([Draws("bernoulli", p=0.2).entries(game, generator(i)) for i in range(500)])[:, game.free]
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.01)
    assert set(coins.unique().tolist()) == {0.0, 1.0} and float(coins.mean()) == pytest.approx(0.2, abs=0.03)


@given(seed=SEEDS)
@few
def test_adversarial_is_near_the_exact_worst_case(seed: int) -> None:
    losses, keep = losses_of(seed)
    exact = sum(loss.size * exact_attack(Game([loss], [keep])).loss for loss in losses) / sum(x.size for x in losses)
    found = AdversarialScorer(losses, ascent=Ascent()).score(keep)
    assert found >= 0.9 * exact - 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scope", ["batch", "universal", "example"])
def test_scores_are_the_same_again(scheme: SchemeName, scope: str) -> None:
    losses, keep = losses_of(2)
    scores = [make(scheme, losses, scope=scope).score(keep) for _ in range(2)]
    assert scores[0] == scores[1]


def test_one_source_for_all_batches_hurts_no_more_than_one_each() -> None:
    losses, keep = losses_of(4)
    one_each = make("adversarial", losses, ascent=Ascent()).score(keep)
    one_for_all = make("adversarial", losses, scope="universal", ascent=Ascent()).score(keep)
    assert one_for_all <= one_each + 1e-5


@given(seed=SEEDS, share=st.floats(0, 1.5))
@few
def test_stopping_early_changes_no_verdict(seed: int, share: float) -> None:
    losses, keep = losses_of(seed)
    score = make("adversarial", losses).score(keep)
    stopped = make("adversarial", losses).score(keep, stop_above=share * score)
    assert stopped <= score and (stopped > share * score) == (score > share * score)


def test_the_second_batch_is_not_attacked_where_the_first_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, keep = losses_of(1)
    attacked: list[MaskedLoss] = []
    original = Game.loss_and_gradient

    def counting(game: Game, entries: Tensor) -> tuple[Tensor, Tensor]:
        attacked.extend(game.losses)
        return original(game, entries)

    monkeypatch.setattr(Game, "loss_and_gradient", counting)
    make("adversarial", losses).score(keep, stop_above=1e-6)
    assert losses[1] not in attacked


def test_what_hurt_before_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool shows a circuit that lacks one node more to be bad without any climb."""
    puzzle = cancelling_sets(3)
    scores = AdversarialScorer([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], ascent=Ascent())
    keep = torch.ones(7)
    keep[[1, 3]] = 0
    assert scores.score(keep) > 0.02
    keep[5] = 0
    climbs: list[int] = []
    gradient = Game.loss_and_gradient

    def counting(self: Game, entries: Tensor) -> tuple[Tensor, Tensor]:
        climbs.append(1)
        return gradient(self, entries)

    monkeypatch.setattr(Game, "loss_and_gradient", counting)
    assert scores.score(keep, stop_above=0.02) > 0.02
    assert not climbs


@given(seed=SEEDS)
@few
def test_later_scores_never_fall_for_what_was_seen(seed: int) -> None:
    """What the pool remembers can only make an attack stronger."""
    losses, keep = losses_of(seed, parts=1)
    scores = AdversarialScorer(losses, ascent=Ascent(2, 0.5, 1, draws=0, flips=0))
    first = scores.score(keep)
    scores.score(torch.zeros_like(keep))
    assert scores.score(keep) >= first - 1e-6


@pytest.mark.parametrize("scheme", ["complete", "stochastic"])
def test_what_is_promised_is_the_slope_of_the_score(scheme: SchemeName) -> None:
    losses, keep = losses_of(6)
    scores = make(scheme, losses)
    promise = scores.promise(keep)
    for node in range(len(keep)):
        step = torch.zeros_like(keep)
        if keep[node] == 1:
            continue
        step[node] = 1e-2
        slope = (scores.score(keep + step) - scores.score(keep)) / 1e-2
        assert float(promise[node]) == pytest.approx(-slope, abs=0.05 * abs(slope) + 2e-3)


@pytest.mark.parametrize("kind", ["zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_goes_with_every_reference(scheme: SchemeName, kind: Any) -> None:
    model = token_model()
    batches = [as_batch(token_batch(6, seed)) for seed in range(2)]
    losses = masked_losses(model, batches, "kl", Reference.measure(kind, model, batches))
    scores = make(scheme, losses)
    nothing, everything = torch.zeros(model.n_nodes), torch.ones(model.n_nodes)
    assert scores.score(nothing) > scores.score(everything) >= 0


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.read.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] / self.read(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loss_that_is_not_finite_is_refused(scheme: SchemeName) -> None:
    losses = [MaskedLoss(by_neuron(Divides(), ["read"]), as_batch(torch.ones(4, 3)), "mse")]
    draws = Draws("bernoulli", p=0.0)
    with pytest.raises(NonFiniteLossError, match="NaN or infinite with nodes ablated"):
        make(scheme, losses, draws=draws).score(torch.zeros(3))


def test_unknown_schemes_and_draws_are_refused() -> None:
    losses, _ = losses_of(0)
    with pytest.raises(UserError, match="expected one of complete, stochastic, adversarial"):
        make("total", losses)  # type: ignore[arg-type]
    for options in ({"distribution": "normal"}, {"p": 1.5}, {"p": -0.1}, {"count": 0}):
        with pytest.raises(UserError):
            Draws(**options)
    assert isinstance(make("complete", losses), CompleteScorer)
