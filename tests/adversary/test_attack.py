"""The adversary: what it may touch, what it finds, and that a budget binds it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.small_networks import random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdprune.adversary.attack import Ascent, Climber, Worst, attack, exact_attack
from pdprune.adversary.game import Game, Scope, per_batch
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.claims.planted.handmade import by_neuron, cancelling_sets
from pdprune.errors import UserError
from pdprune.seeding import generator

SEEDS = st.integers(0, 10**6)
SCOPES: list[Scope] = ["batch", "universal", "position", "example", "example_position"]
LEADS = {"batch": (), "universal": (), "position": (5,), "example": (4, 1), "example_position": (4, 5)}
LIGHT = Ascent(steps=4, step_size=0.5, restarts=2, draws=4, flips=16)

quick = settings(max_examples=10, deadline=None)
small = settings(max_examples=6, deadline=None)


def random_game(seed: int, **options: Any) -> Game:
    network = random_network(seed, most_free=7)
    return Game([MaskedLoss(network.model, as_batch(network.inputs))], [network.keep], **options)


def token_loss(size: int = 4, seed: int = 0) -> MaskedLoss:
    return MaskedLoss(token_model(), as_batch(token_batch(size, seed)))


def token_game(scope: Scope, gates: Tensor | None = None, max_ablated: int | None = None) -> Game:
    gates = torch.tensor([1.0, 0, 0, 1, 0, 0.5]) if gates is None else gates
    return Game([token_loss()], [gates], scope, max_ablated)


def corners(game: Game) -> list[Tensor]:
    """Every allowed source of zeros and ones, of a game with one group."""
    free = game.free.flatten().nonzero().squeeze(-1)
    found = []
    for values in itertools.product((0.0, 1.0), repeat=len(free)):
        entries = torch.ones(game.free.numel())
        entries[free] = torch.tensor(values)
        entries = entries.reshape(game.free.shape)
        if game.max_ablated is None or float((1 - game.source(entries)).sum(-1).max()) <= game.max_ablated:
            found.append(entries)
    return found


# -- what it may touch -----------------------------------------------------------------------------------------------


@given(seed=SEEDS)
@quick
def test_kept_nodes_cannot_be_touched(seed: int) -> None:
    game = random_game(seed)
    rng = generator(seed)
    entries = torch.rand(game.free.shape, generator=rng)
    mask = game.gates[0] + (1 - game.gates[0]) * game.source(entries)
    kept = game.gates[0] == 1
    assert bool((mask[kept] == 1).all())
    _, gradient = game.loss_and_gradient(entries)
    assert bool((gradient[~game.free] == 0).all())
    leaf = entries.clone().requires_grad_()
    (unmasked,) = torch.autograd.grad(game.loss(leaf).sum(), leaf)
    assert bool((game.source(unmasked)[kept] == 0).all()), "zero by the chain rule, not by hiding it"
    moved = torch.where(game.free, entries, torch.rand(game.free.shape, generator=rng))
    assert torch.equal(game.loss(moved), game.loss(entries))
    assert bool((attack(game, LIGHT, rng).entries[~game.free] == 1).all())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_source_has_the_shape_of_its_scope(scope: Scope) -> None:
    game = token_game(scope)
    expected = (*LEADS[scope], game.n_nodes + 1)
    assert game.free.shape == game.corner(0.0).shape == game.draw(generator(0), coins=True).shape == expected
    assert game.loss(game.corner(0.0)).shape == ((4,) if scope.startswith("example") else (1,))
    found = attack(game, LIGHT, generator(0))
    assert found.entries.shape == expected
    assert torch.allclose(game.loss(found.entries), found.losses, atol=1e-6)


@pytest.mark.parametrize("scope", ["example", "example_position"])
def test_examples_that_choose_for_themselves_do_not_touch_one_another(scope: Scope) -> None:
    game = token_game(scope)
    entries = game.draw(generator(0), coins=False)
    losses, gradient = game.loss_and_gradient(entries)
    changed = entries.clone()
    changed[2] = 1 - changed[2]
    others = [0, 1, 3]
    again, gradient_again = game.loss_and_gradient(changed)
    assert torch.allclose(again[others], losses[others], atol=1e-6) and not torch.allclose(again[2], losses[2])
    assert torch.allclose(gradient_again[others], gradient[others], atol=1e-6)


def test_networks_without_positions_have_sources_by_example() -> None:
    network = random_network(3)
    loss = MaskedLoss(network.model, as_batch(network.inputs))
    for scope in ("example", "example_position"):
        assert Game([loss], [network.keep], scope).lead == (len(network.inputs),)


@pytest.mark.parametrize(
    ("shape", "scope", "free"),
    [
        ((6,), "batch", "a node not kept"),
        ((5, 6), "batch", "a node not kept at some position"),
        ((4, 5, 6), "batch", "a node not kept somewhere"),
        ((5, 6), "position", "each position by itself"),
        ((4, 5, 6), "example_position", "each token by itself"),
    ],
)
def test_an_entry_is_free_where_it_has_an_effect(shape: tuple[int, ...], scope: Scope, free: str) -> None:
    gates = (torch.rand(shape, generator=generator(0, str(shape))) > 0.4).float()
    game = token_game(scope, gates)
    dims = tuple(range(gates.ndim - 1 - len(game.lead)))
    expected = (gates < 1).any(dims) if dims else gates < 1
    assert torch.equal(game.source(game.free), expected.expand(*game.lead, -1)), free
    entries = game.draw(generator(1), coins=False)
    moved = torch.where(game.free, entries, 0.3)
    assert torch.allclose(game.loss(moved), game.loss(entries), atol=1e-7)


# -- what it finds ---------------------------------------------------------------------------------------------------


@given(seed=SEEDS, pool_seed=SEEDS)
@quick
def test_no_start_hurts_more_than_what_is_found(seed: int, pool_seed: int) -> None:
    game = random_game(seed)
    pool = [game.draw(generator(pool_seed, index), coins=False) for index in range(3)]
    found = attack(game, Ascent(steps=1, restarts=1, draws=2, flips=0), generator(seed), pool=pool)
    rng = generator(seed)
    draws = [game.draw(rng, coins=index % 2 == 1) for index in range(2)]
    for start in (game.corner(0.0), game.corner(1.0), *pool, *draws):
        assert found.loss >= float(game.loss(start)) - 1e-7
    assert found.loss == pytest.approx(float(game.loss(found.entries)), abs=1e-6)
    assert bool((found.entries >= 0).all()) and bool((found.entries <= 1).all())


@given(seed=SEEDS, max_ablated=st.none() | st.integers(0, 4))
@quick
def test_exact_attack_is_the_maximum_over_all_corners(seed: int, max_ablated: int | None) -> None:
    game = random_game(seed, max_ablated=max_ablated)
    found = exact_attack(game)
    with torch.no_grad():
        losses = torch.cat([game.loss(corner) for corner in corners(game)])
    assert found.loss == pytest.approx(float(losses.max()), rel=1e-5, abs=1e-7)
    assert float(game.loss(found.entries)) == pytest.approx(found.loss, rel=1e-5, abs=1e-7)


def test_exact_attack_by_example_is_the_maximum_of_each() -> None:
    game = token_game("example", torch.tensor([1.0, 0, 0, 1, 0, 0]))
    shared = [corner.expand(4, 1, -1) for corner in corners(token_game("batch", game.gates[0]))]
    with torch.no_grad():
        losses = torch.stack([game.loss(corner) for corner in shared])
    assert torch.allclose(exact_attack(game).losses, losses.amax(0), atol=1e-6)


def test_exact_attack_of_many_is_refused() -> None:
    puzzle = cancelling_sets(9)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.zeros(19)])
    with pytest.raises(UserError, match="19 entries are free; expected at most 16"):
        exact_attack(game)


@given(seed=SEEDS)
@quick
def test_the_worst_case_never_rises_when_a_node_is_added(seed: int) -> None:
    network = random_network(seed, most_free=7)
    loss = MaskedLoss(network.model, as_batch(network.inputs))
    more = network.keep.clone()
    more[network.free[seed % len(network.free)]] = 1
    fewer, added = (exact_attack(Game([loss], [keep])).loss for keep in (network.keep, more))
    assert added <= fewer + 1e-6


@given(seed=SEEDS)
@small
def test_broader_choice_never_hurts_less(seed: int) -> None:
    """Whatever one source does, a source for each example can do too; and so for positions."""
    loss = token_loss(3, seed)
    gates = [torch.tensor([1.0, 0, 0, 1, 0, 0])]
    shared = attack(Game([loss], gates), LIGHT, generator(seed)).entries
    by_example = attack(
        Game([loss], gates, "example"), LIGHT, generator(seed), pool=[shared.expand(3, 1, -1).contiguous()]
    )
    by_token = attack(
        Game([loss], gates, "example_position"), LIGHT, generator(seed), pool=[by_example.entries.repeat(1, 5, 1)]
    )
    values = [float(Game([loss], gates).loss(shared)), by_example.loss, by_token.loss]
    assert values[0] <= values[1] + 1e-6 and values[1] <= values[2] + 1e-6


@pytest.mark.parametrize("optimizer", ["sign", "adam", "momentum"])
def test_every_optimiser_finds_the_half_of_a_cancelling_pair(optimizer: Any) -> None:
    puzzle = cancelling_sets(1)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.tensor([1.0, 0, 0])])
    climb = Ascent(steps=20, restarts=2, optimizer=optimizer, draws=0, flips=0)
    found = attack(game, climb, generator(0))
    assert found.loss > 0.8 * exact_attack(game).loss
    assert found.loss > 0.05 > float(game.loss(game.corner(0.0)))


def test_flips_finish_what_no_climb_began() -> None:
    puzzle = cancelling_sets(3)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.tensor([1.0] + [0] * 6)])
    found = attack(game, Ascent(steps=0, restarts=0, draws=0, flips=64), generator(0))
    assert found.loss == pytest.approx(exact_attack(game).loss, rel=1e-4)


@given(seed=SEEDS)
@small
def test_an_attack_is_the_same_again(seed: int) -> None:
    game = random_game(seed)
    first, again = (attack(game, LIGHT, generator(seed)) for _ in range(2))
    assert torch.equal(first.entries, again.entries) and torch.equal(first.losses, again.losses)


def test_an_attack_may_stop_when_it_has_seen_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    puzzle = cancelling_sets(1)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.zeros(3)])
    calls: list[float] = []
    evaluate = Game.loss

    def counting(self: Game, entries: Tensor) -> Tensor:
        value = evaluate(self, entries)
        calls.append(float(value.mean().detach()))
        return value

    monkeypatch.setattr(Game, "loss", counting)
    found = attack(game, Ascent(), generator(0), stop_above=0.1)
    assert found.loss > 0.1 and len(calls) == 1, "ablating everything shows it at once"
    attack(game, Ascent(), generator(0), stop_above=1e9)
    assert len(calls) > 50


@pytest.mark.parametrize("scope", ["batch", "universal"])
def test_batches_under_one_source_count_by_their_size(scope: Scope) -> None:
    network = random_network(5)
    parts = network.inputs.split([5, len(network.inputs) - 5])
    losses = [MaskedLoss(network.model, as_batch(part)) for part in parts]
    game = Game(losses, [network.keep] * 2, scope)
    entries = game.draw(generator(0), coins=False)
    whole = Game([MaskedLoss(network.model, as_batch(network.inputs))], [network.keep])
    assert torch.allclose(game.loss(entries), whole.loss(entries), atol=1e-6)
    _, gradient = game.loss_and_gradient(entries)
    assert torch.allclose(gradient, whole.loss_and_gradient(entries)[1], atol=1e-6)


def test_the_worst_is_kept_group_by_group() -> None:
    game = token_game("example")
    worst = Worst(game, game.corner(1.0), torch.tensor([0.0, 2.0, 0.0, 2.0]))
    better = worst.meet(game.corner(0.0), torch.ones(4))
    assert better.tolist() == [True, False, True, False]
    assert worst.losses.tolist() == [1, 2, 1, 2] and worst.loss == 1.5
    ablated = game.source(worst.entries)[:, 0, 1]
    assert ablated.tolist() == [0, 1, 0, 1]


# -- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "budget", "expected"),
    [
        ([0.2, 0.9], 2, [0.2, 0.9]),  # within: left alone
        ([0.0, 0.0], 1, [0.5, 0.5]),  # both give as much
        ([0.0, 1.0], 1, [0.0, 1.0]),
        ([0.0, 0.5], 1, [0.25, 0.75]),
        ([-1.0, 0.5], 1, [0.0, 1.0]),  # outside the box: clamping first would give .25, .75
        ([0.0, 0.0, 0.0], 0, [1.0, 1.0, 1.0]),
        ([2.0, -3.0], 1, [1.0, 0.0]),
    ],
)
def test_projection_onto_the_budget(source: list[float], budget: int, expected: list[float]) -> None:
    puzzle = cancelling_sets(1)
    gates = torch.tensor([0.0] * len(source) + [1.0] * (3 - len(source)))
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [gates], max_ablated=budget)
    projected = game.project(torch.tensor([*source, 0.5, 0.5])[: game.free.numel()])
    assert game.source(projected)[: len(source)].tolist() == pytest.approx(expected, abs=1e-5)


@given(seed=SEEDS, budget=st.integers(0, 5))
@quick
def test_projection_is_the_nearest_allowed_source(seed: int, budget: int) -> None:
    game = random_game(seed, max_ablated=budget)
    rng = generator(seed)
    entries = 2 * torch.randn(game.free.shape, generator=rng)
    nearest = game.project(entries)
    free = game.free
    assert bool((nearest[~free] == 1).all()) and float((1 - game.source(nearest)).sum()) <= budget + 1e-4
    assert torch.allclose(game.project(nearest), nearest, atol=1e-5)
    for _ in range(20):
        other = game.project(entries + torch.randn(game.free.shape, generator=rng))
        assert (nearest - entries)[free].norm() <= (other - entries)[free].norm() + 1e-4


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_every_stage_obeys_the_budget(scope: Scope, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    game = token_game(scope, torch.zeros(6), budget)
    evaluate = Game.loss

    def checking(self: Game, entries: Tensor) -> Tensor:
        assert float((1 - self.source(entries.detach())).sum(-1).max()) <= budget + 1e-4
        return evaluate(self, entries)

    monkeypatch.setattr(Game, "loss", checking)
    attack(game, LIGHT, generator(0), pool=[torch.zeros(game.free.shape)])


def test_a_budget_of_nothing_leaves_the_model() -> None:
    game = token_game("batch", torch.zeros(6), 0)
    found = attack(game, LIGHT, generator(0))
    assert bool((game.source(found.entries) == 1).all())


def test_a_budget_finds_the_nodes_that_hurt_most() -> None:
    puzzle = cancelling_sets(4, idle=20)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.zeros(29)], max_ablated=1)
    found = attack(game, Ascent(), generator(0))
    with torch.no_grad():
        alone = [float(game.loss(corner)) for corner in single_ablations(game)]
    assert found.loss >= max(alone) - 1e-6


def single_ablations(game: Game) -> list[Tensor]:
    ones = game.corner(1.0)
    return [ones.clone().index_fill(0, torch.tensor([node]), 0.0) for node in range(game.n_nodes)]


# -- climbing --------------------------------------------------------------------------------------------------------


def test_a_sign_step_moves_every_free_entry_by_the_step_size() -> None:
    game = random_game(1)
    start = game.project(torch.full(game.free.shape, 0.5))
    climber = Climber(game, start, Ascent(steps=1, step_size=0.25))
    climber.step()
    assert torch.equal(climber.best.entries, start) and torch.allclose(climber.best.losses, game.loss(start))
    moved = (climber.entries - start)[game.free].abs()
    assert bool(((moved == 0.25) | (moved == 0)).all()) and bool((moved == 0.25).any())
    assert torch.equal(climber.entries[~game.free], start[~game.free])


def test_momentum_halves_its_steps_when_they_stall() -> None:
    puzzle = cancelling_sets(1)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.tensor([1.0, 0, 0])])
    climber = Climber(game, game.draw(generator(0), coins=False), Ascent(steps=32, step_size=0.4, optimizer="momentum"))
    for _ in range(32):
        climber.step()
    assert climber.size < 0.4


def gradients_of(monkeypatch: pytest.MonkeyPatch, game: Game, ascent: Ascent) -> tuple[int, float]:
    """How many gradients an attack takes, and what it finds."""
    taken: list[int] = []
    evaluate = Game.loss_and_gradient
    with monkeypatch.context() as patched:
        patched.setattr(Game, "loss_and_gradient", lambda self, entries: (taken.append(1), evaluate(self, entries))[1])
        found = attack(game, ascent, generator(0)).loss
    return len(taken), found


def test_a_restart_ends_when_it_goes_round_in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    puzzle = cancelling_sets(2)
    game = Game([MaskedLoss(puzzle.model, as_batch(puzzle.batch))], [torch.tensor([1.0, 0, 0, 0, 0])])
    patient = Ascent(steps=200, restarts=3, draws=0, flips=0, patience=1000)
    taken, found = gradients_of(monkeypatch, game, patient)
    monkeypatch.setattr(Climber, "_is_back", lambda self: False)
    all_taken, all_found = gradients_of(monkeypatch, game, patient)
    assert all_taken == 600 and taken < 120
    assert found == all_found, "what is left out had been seen"


def test_a_restart_ends_when_it_rises_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    game = random_game(3)
    restless = Ascent(steps=200, restarts=2, optimizer="adam", draws=0, flips=0, patience=10**6)
    all_taken, all_found = gradients_of(monkeypatch, game, restless)
    taken, found = gradients_of(monkeypatch, game, replace(restless, patience=20))
    assert all_taken == 400 and taken < 300
    assert found == pytest.approx(all_found, rel=0.01)


def test_a_restart_ends_when_it_cannot_catch_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Ascent(steps=40, step_size=0.03, restarts=8)
    games = [random_game(seed) for seed in range(6)]
    short = [gradients_of(monkeypatch, game, fine) for game in games]
    monkeypatch.setattr(Climber, "_is_left_behind", lambda self, worst: False)
    whole = [gradients_of(monkeypatch, game, fine) for game in games]
    assert sum(taken for taken, _ in short) < 0.9 * sum(taken for taken, _ in whole)
    assert [found for _, found in short] == pytest.approx([found for _, found in whole])


def test_groups_that_climb_apart_are_not_left_behind_together() -> None:
    together = random_game(0)
    climber = Climber(together, together.corner(0.0), Ascent(steps=40))
    climber.bests = [0.0] * 15
    assert climber._is_left_behind(1.0) and not climber._is_left_behind(-1.0)
    apart = Game(together.losses, together.gates, "example")
    climber = Climber(apart, apart.corner(0.0), Ascent(steps=40))
    climber.bests = [0.0] * 15
    assert not climber._is_left_behind(1.0)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"restarts": -1},
        {"draws": -1},
        {"flips": -1},
        {"step_size": 0.0},
        {"patience": 0},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        Ascent(**options)
    assert "\n" not in str(error.value)


def test_scopes_that_do_not_fit_are_refused() -> None:
    network = random_network(0)
    loss = MaskedLoss(network.model, as_batch(network.inputs))
    with pytest.raises(UserError, match="expected one of batch, universal"):
        Game([loss], [network.keep], "everything")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no position dimension"):
        Game([loss], [network.keep], "position")
    with pytest.raises(UserError, match="one source cannot serve several batches"):
        Game([loss, loss], [network.keep] * 2, "example")


def test_gates_by_example_are_split_over_batches() -> None:
    losses = [token_loss(4), token_loss(3, seed=1)]
    rows = torch.rand(7, 5, 6, generator=generator(0))
    first, second = per_batch(rows, losses)
    assert torch.equal(torch.cat([first, second]), rows) and len(first) == 4
    for shared in (rows[0, 0], rows[0], rows[:1]):
        assert all(part is shared for part in per_batch(shared, losses))
    with pytest.raises(UserError, match="expected 7 rows"):
        per_batch(rows[:6], losses)


def test_one_component_shared_by_name() -> None:
    """Sites keep their order, so that entries behind the nodes are the sites' deltas in that order."""
    model = by_neuron(token_model().target, ["up", "down"], share=0.9)
    game = Game([MaskedLoss(model, as_batch(token_batch()))], [torch.ones(model.n_nodes)])
    assert game.free[-2:].all() and not game.free[:-2].any()
    alone = [torch.ones(model.n_sites).index_fill(0, torch.tensor([site]), 0.0) for site in range(2)]
    for site, deltas in enumerate(alone):
        entries = torch.cat([torch.ones(model.n_nodes), deltas])
        expected = MaskedLoss(model, as_batch(token_batch())).per_example(torch.ones(model.n_nodes), deltas).mean()
        assert torch.allclose(game.loss(entries).squeeze(), expected), site
