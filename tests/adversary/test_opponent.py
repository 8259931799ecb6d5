"""The adversary in training: fresh, persistent and free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits.small_networks import random_network
from torch import Tensor

from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import Opponent, TrainingAdversary
from pdprune.batches import as_batch
from pdprune.claims.planted.handmade import by_neuron, cancelling_sets
from pdprune.errors import UserError
from pdprune.seeding import generator


def loss_of(seed: int = 0) -> MaskedLoss:
    network = random_network(seed)
    return MaskedLoss(network.model, as_batch(network.inputs))


def some_gates(n: int) -> Tensor:
    gates = torch.rand(n, generator=generator(0, "gates"))
    gates[0] = 1.0
    return gates


def opponent_for(game: Game, **settings: Any) -> Opponent:
    return Opponent(TrainingAdversary(**settings), game.lead, game.free.shape[-1], seed=0)


def game_with(gates: Tensor | None = None, seed: int = 0, **options: Any) -> Game:
    loss = loss_of(seed)
    return Game([loss], [some_gates(loss.model.n_nodes) if gates is None else gates], **options)


MODES = ["fresh", "persistent", "free"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scope", ["batch", "universal"])
def test_every_mode_plays_an_allowed_source(mode: str, scope: Any) -> None:
    game = game_with(scope=scope, max_ablated=2)
    opponent = opponent_for(game, mode=mode, particles=2)
    for step in range(4):
        entries = opponent.choose(game, step)
        assert entries.shape == game.free.shape
        assert bool((entries[~game.free] == 1).all())
        assert bool((entries >= 0).all()) and bool((entries <= 1).all())
        assert float((1 - game.source(entries)).sum()) <= 2 + 1e-4
        opponent.learn(game, step, torch.randn(game.free.shape, generator=generator(step)))


@pytest.mark.parametrize("mode", ["fresh", "persistent"])
def test_what_is_played_is_no_better_than_either_corner(mode: str) -> None:
    for seed in range(4):
        game = game_with(seed=seed)
        chosen = opponent_for(game, mode=mode).choose(game, 0)
        played = float(game.loss(chosen))
        assert played >= max(float(game.loss(game.corner(value))) for value in (0.0, 1.0)) - 1e-7


def test_fresh_carries_nothing_and_depends_on_the_step_alone() -> None:
    game = game_with()
    opponent = opponent_for(game, mode="fresh", particles=2)
    assert opponent.sources.shape[0] == 0
    first = opponent.choose(game, 5)
    opponent.choose(game, 6)
    assert torch.equal(opponent.choose(game, 5), first)


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
def test_persistent_sources_go_on_climbing(optimizer: Any) -> None:
    puzzle = cancelling_sets(4)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.tensor([1.0] + [0.0] * 8)])
    opponent = opponent_for(game, mode="persistent", steps=1, step_size=0.05, optimizer=optimizer)
    losses = []
    for step in range(40):
        opponent.choose(game, step)
        losses.append(float(game.loss(opponent.sources[0])))
    assert losses[-1] > 2 * losses[0] and losses[-1] >= max(losses) - 0.2 * losses[-1]


@pytest.mark.parametrize("mode", ["persistent", "free"])
def test_what_is_carried_is_in_the_state(mode: str) -> None:
    """A resumed opponent goes on as an uninterrupted one."""
    game = game_with()
    whole = opponent_for(game, mode=mode, particles=2, optimizer="adam", step_size=0.1)

    def turns(opponent: Opponent, steps: range) -> list[Tensor]:
        played = []
        for step in steps:
            played.append(opponent.choose(game, step).clone())
            opponent.learn(game, step, game.loss_and_gradient(played[-1])[1])
        return played

    turns(whole, range(5))
    resumed = opponent_for(game, mode=mode, particles=2, optimizer="adam", step_size=0.1)
    assert not torch.equal(resumed.sources, whole.sources)
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for one, other in zip(turns(whole, range(5, 9)), turns(resumed, range(5, 9)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["persistent", "free"])
def test_sources_of_kept_nodes_are_not_forgotten(mode: str) -> None:
    """While a node is wholly kept its source has no effect; when its gate comes down the climb goes on from there."""
    open_gates = torch.ones(loss_of().model.n_nodes)
    game = game_with(open_gates)
    opponent = opponent_for(game, mode=mode)
    before = opponent.sources.clone()
    for step in range(3):
        opponent.choose(game, step)
        opponent.learn(game, step, torch.ones(game.free.shape))
    n = game.n_nodes
    assert torch.equal(opponent.sources[..., :n], before[..., :n])


def test_one_backward_pass_gives_both_players_their_gradients() -> None:
    """∂ℓ/∂g = ∂ℓ/∂m·(1 − s) and ∂ℓ/∂s = ∂ℓ/∂m·(1 − g), from one pass as from separate ones."""
    network = random_network(1)
    loss = MaskedLoss(network.model, as_batch(network.inputs))
    n = network.model.n_nodes
    gates = some_gates(n).requires_grad_()
    entries = torch.rand(n + network.model.n_sites, generator=generator(1)).requires_grad_()
    Game([loss], [gates], "batch").loss(entries).mean().backward()
    assert gates.grad is not None and entries.grad is not None

    g, s = gates.detach(), entries.detach()[:n]
    mask = (g + (1 - g) * s).requires_grad_()
    (by_mask,) = torch.autograd.grad(loss.per_example(mask, entries.detach()[n:]).mean(), mask)
    assert torch.allclose(gates.grad, by_mask * (1 - s), atol=1e-6)
    assert torch.allclose(entries.grad[:n], by_mask * (1 - g), atol=1e-6)

    _, ascent_alone = Game([loss], [g], "batch").loss_and_gradient(entries.detach())
    gates_alone = g.clone().requires_grad_()
    Game([loss], [gates_alone], "batch").loss(entries.detach()).mean().backward()
    assert gates_alone.grad is not None
    assert torch.allclose(entries.grad[:n], ascent_alone[:n], atol=1e-6)
    assert torch.allclose(gates.grad, gates_alone.grad, atol=1e-6)


def test_free_climbs_along_the_gradient_it_is_given_in_turn_with_ablation() -> None:
    game = game_with()
    opponent = opponent_for(game, mode="free", particles=2, step_size=0.125)
    gradient = torch.ones(game.free.shape)
    gradient[1] = -1
    for step in range(6):
        before = opponent.sources.clone()
        chosen = opponent.choose(game, step)
        opponent.learn(game, step, gradient)
        changed = [particle for particle in range(2) if not torch.equal(before[particle], opponent.sources[particle])]
        turn = step % 3
        assert changed == ([turn] if turn < 2 else [])
        if turn == 2:
            assert torch.equal(chosen, game.corner(0.0))
            continue
        assert torch.equal(chosen, game.project(before[turn]))
        stepped = (before[turn] + 0.125 * gradient).clamp(0, 1)
        assert torch.allclose(opponent.sources[turn][game.free], stepped[game.free])


@pytest.mark.parametrize("particles", [1, 3])
def test_persistent_plays_the_worst_of_its_particles(particles: int) -> None:
    game = game_with(seed=2)
    opponent = opponent_for(game, mode="persistent", particles=particles)
    chosen = opponent.choose(game, 0)
    candidates = [game.corner(0.0), game.corner(1.0), *(game.project(source) for source in opponent.sources)]
    assert float(game.loss(chosen)) == pytest.approx(max(float(game.loss(entries)) for entries in candidates))


def test_sources_by_position_have_a_row_each() -> None:
    target = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model = by_neuron(target, ["2"])
    loss = MaskedLoss(model, as_batch(torch.randn(6, 5, 3, generator=generator(0))))
    game = Game([loss], [torch.zeros(4)], "position")
    opponent = opponent_for(game, mode="persistent", particles=2)
    assert opponent.sources.shape == (2, 5, 5) and opponent.choose(game, 0).shape == (5, 5)


@pytest.mark.parametrize(
    "settings",
    [{"mode": "lazy"}, {"steps": 0}, {"particles": 0}, {"max_ablated": -1}, {"step_size": 0.0}, {"optimizer": "sgd"}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        TrainingAdversary(**settings)
    assert "\n" not in str(error.value)
