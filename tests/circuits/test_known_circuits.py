"""Searches on networks whose circuits are known by definition, from 3 to 400 nodes, and what audits say of them.

Complete ablation must find the small seeming circuit where the definition has one, the adversarial scheme the one that
holds, and the audit must tell the two apart.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits.small_networks import random_network

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.circuits.audit import audit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.prune import prune
from pdprune.claims.planted.handmade import (
    Puzzle,
    bent_pairs,
    bypassed_attention,
    cancelling_sets,
    embedded_pairs,
    norm_gain,
    pairs_across_sites,
    redundant_routes,
    small_contributions,
)

STEPS = 80
"""Enough for the small networks here; the default is for larger ones."""

PUZZLES: dict[str, Puzzle] = {
    "pair": cancelling_sets(1),
    "3 pairs and idle nodes": cancelling_sets(3, idle=4),
    "sets of 2 and 3": cancelling_sets(2, 2, 3),
    "set of 5 and 5": cancelling_sets(1, 5, 5, idle=1),
    "2 routes": redundant_routes(2, idle=1),
    "4 routes": redundant_routes(4, idle=4),
    "rms norm": norm_gain(6),
    "layer norm": norm_gain(6, "layer"),
    "attention": bypassed_attention(1),
    "attention of 3 pairs": bypassed_attention(3),
    "pairs across sites": pairs_across_sites(2, idle=3),
    "pairs in an embedding": embedded_pairs(3),
    "bent pairs": bent_pairs(2, 4),
    "bent pair and a backup": bent_pairs(1, 2, backed_up=True),
}


def found(puzzle: Puzzle, scheme: Any, **options: Any) -> Circuit:
    return prune(puzzle.model, [puzzle.batch], **({"scheme": scheme, "target_loss": puzzle.target_loss} | options))


def check(puzzle: Puzzle, circuit: Circuit) -> None:
    """It is what its scheme's definition singles out, and the audit finds out whether it holds."""
    expected = puzzle.adversarial if circuit.scheme == "adversarial" else puzzle.complete
    assert set(circuit.kept) in expected and circuit.reached is True
    checked = audit(puzzle.model, circuit, [puzzle.batch], random_circuits=0, draws=4)
    assert checked.scheme == circuit.scheme and checked.target_loss == puzzle.target_loss
    assert checked.complete_loss <= puzzle.target_loss
    assert checked.faithful is (set(circuit.kept) in puzzle.adversarial)


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_gradient_search_finds_what_the_definition_says(name: str, scheme: str) -> None:
    puzzle = PUZZLES[name]
    check(puzzle, found(puzzle, scheme, search="gradient", steps=STEPS))


@pytest.mark.parametrize("name", [name for name, puzzle in PUZZLES.items() if puzzle.model.n_nodes <= 9])
@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_exact_search_finds_what_the_definition_says(name: str, scheme: str) -> None:
    check(PUZZLES[name], found(PUZZLES[name], scheme, search="exact"))


@pytest.mark.parametrize("reference", ["mean", "resample"])
@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_other_references_find_cancelling_nodes_too(reference: str, scheme: str) -> None:
    puzzle = PUZZLES["3 pairs and idle nodes"]
    circuit = found(puzzle, scheme, reference=reference, search="gradient", steps=STEPS)
    assert set(circuit.kept) in (puzzle.adversarial if scheme == "adversarial" else puzzle.complete)


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_other_losses_find_cancelling_nodes_too(loss: str, scheme: str) -> None:
    puzzle = PUZZLES["3 pairs and idle nodes"]
    batch = (puzzle.batch, (puzzle.batch[:, 0] < 0).long())
    target_loss = {"ce": 0.15, "mse": 0.1}[loss]  # the model's own cross-entropy is .127
    circuit = prune(
        puzzle.model, [batch], loss=loss, scheme=scheme, target_loss=target_loss, search="gradient", steps=STEPS
    )
    assert set(circuit.kept) in (puzzle.adversarial if scheme == "adversarial" else puzzle.complete)


def test_norm_gain_beats_the_model_under_cross_entropy() -> None:
    """The seeming circuit is one node, and better than the network it was found in."""
    puzzle = PUZZLES["rms norm"]
    labels = (puzzle.batch[:, 0] < 0).long()
    batch = (puzzle.batch, labels)
    circuit = prune(
        puzzle.model, [batch], loss="ce", scheme="complete", target_loss=0.02, search="gradient", steps=STEPS
    )
    checked = audit(puzzle.model, circuit, [batch], loss="ce", random_circuits=0, draws=4)
    assert circuit.kept == [0] and circuit.reached is True
    assert checked.model_loss > 0.05 > checked.complete_loss and checked.beats_model is True
    assert checked.faithful is False and checked.kl is not None and checked.kl.complete > 0.02


# -- hundreds of nodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_a_hundred_pairs_among_400_nodes(scheme: str) -> None:
    puzzle = cancelling_sets(100, idle=199, examples=256)
    check(puzzle, found(puzzle, scheme, search="gradient", steps=150))


def test_a_set_of_399_nodes_that_cancel() -> None:
    """Gates cannot come down without an imbalance; a circuit grown from nothing has none of them."""
    puzzle = cancelling_sets(1, 199, 200)
    check(puzzle, found(puzzle, "complete", search="gradient", steps=60))


def test_as_many_of_300_loud_nodes_as_the_norm_needs() -> None:
    """The loud nodes are alike, so that the least number that will do follows from trying all numbers."""
    puzzle = norm_gain(300)
    loss = MaskedLoss(puzzle.model, as_batch(puzzle.batch))
    with torch.no_grad():
        needed = next(
            size
            for size in range(302)
            if float(loss.per_example((torch.arange(301) < size).float()).mean()) <= 0.9 * puzzle.target_loss
        )
    circuit = found(puzzle, "adversarial", search="gradient", steps=150)
    assert circuit.n_kept == needed and 0 in circuit.kept


def test_small_contributions_line_up_only_for_one_example_at_a_time() -> None:
    """One source for the whole batch cannot line them up, and one node will do; one for each example can."""
    puzzle = small_contributions(150)
    shared = found(puzzle, "adversarial", search="gradient", steps=80)
    assert shared.kept == [0]
    separate = found(puzzle, "adversarial", search="gradient", scope="example", steps=80)
    assert separate.reached is True and 0 in separate.kept and separate.n_kept > 40
    by_scope = {
        scope: audit(puzzle.model, shared, [puzzle.batch], scope=scope, random_circuits=0, draws=4)
        for scope in ("batch", "example")
    }
    assert by_scope["batch"].faithful is True and by_scope["example"].faithful is False


# -- networks that nobody made by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
@pytest.mark.parametrize("seed", [5, 20, 47])
def test_gradient_search_keeps_as_few_as_exact_search_in_random_networks(seed: int, scheme: Any) -> None:
    network = random_network(seed)
    n = network.model.n_nodes
    with torch.no_grad():
        nothing = MaskedLoss(network.model, as_batch(network.inputs)).per_example(torch.zeros(n))
    options: dict[str, Any] = {"scheme": scheme, "target_loss": 0.15 * float(nothing.mean())}
    exact = prune(network.model, [network.inputs], search="exact", **options)
    gradient = prune(network.model, [network.inputs], search="gradient", steps=150, **options)
    assert gradient.reached == exact.reached
    assert gradient.n_kept <= exact.n_kept + (scheme == "complete")


def test_a_random_network_has_small_seeming_circuits_that_do_not_hold() -> None:
    """Untrained weights and random labels: complete ablation finds a circuit that answers better than the network."""
    network = random_network(12)
    batch = (network.inputs, torch.arange(len(network.inputs)) % 2)
    best = prune(network.model, [batch], loss="ce", scheme="complete", coefficient=0.0, search="exact")
    checked = audit(network.model, best, [batch], loss="ce", random_circuits=0, draws=4)
    assert checked.complete_loss < 0.7 < 5 < checked.model_loss and checked.beats_model is True
    assert checked.adversarial.loss >= checked.model_loss and checked.kl is not None and checked.kl.adversarial > 1
    honest = prune(network.model, [batch], scheme="adversarial", target_loss=0.05, search="exact")
    assert honest.n_kept > best.n_kept
    assert audit(network.model, honest, [batch], random_circuits=0, draws=4).adversarial.loss <= 0.055
