"""The first claim in small, and that the planted networks are what they are said to be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.claims.__main__ import main
from pdprune.claims.attribution import attributions
from pdprune.claims.cancellation import EXPERIMENT, HAND_MADE, NETWORKS
from pdprune.claims.experiment import saved_cells
from pdprune.claims.planted.handmade import Puzzle, bent_pairs
from pdprune.claims.planted.interchange import FLAG_A, FLAG_B, ProgramTransformer, draw, operands, program, train
from pdprune.claims.planted.superposition import train as train_superposed
from pdprune.claims.recovery import auroc, recovery, top
from pdprune.seeding import generator


def test_the_small_version_recovers_the_truth_adversarially_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "cancellation", "--small", "--folder", str(tmp_path)]) == 0
    assert "| correlated shortcut: 3 of 9 |" in capsys.readouterr().out
    results = saved_cells(tmp_path / "cancellation", EXPERIMENT.cells(EXPERIMENT.small))
    assert [result.cell["network"] for result in results] == ["correlated shortcut", "backup route"]
    shortcut, backup = (result.figures for result in results)
    assert shortcut["adversarial"]["exact"] and shortcut["adversarial"]["faithful"]
    assert shortcut["complete"]["kept"] == 1 and shortcut["complete"]["faithful"] is False
    assert shortcut["patching"]["f1"] == 1  # where each true node is needed by itself, ablating one at a time shows it
    assert backup["adversarial"]["exact"] and backup["patching"]["f1"] == backup["gradient"]["f1"] == 0
    assert all(figures["adversarial"]["f1"] >= 0.95 for figures in (shortcut, backup))


@pytest.mark.parametrize("name", HAND_MADE)
def test_seeds_shuffle_the_nodes_of_hand_made_networks(name: str) -> None:
    one, other = NETWORKS[name](0, 0), NETWORKS[name](1, 0)
    assert one.truth != other.truth and len(one.truth) == len(other.truth)
    assert 0 < len(one.truth) < one.model.n_nodes
    assert max(one.single_ablations()[node] for node in range(one.model.n_nodes) if node not in one.truth) < 0.02


def test_attributions_of_a_network_whose_inputs_differ_in_weight() -> None:
    planted = NETWORKS["correlated shortcut"](3, 0)
    scores = attributions(planted, 0)
    for name in ("patching", "gradient", "integrated"):
        assert auroc(scores[name], planted.truth) == 1, name
    assert scores["random"].shape == (planted.model.n_nodes,)


@pytest.mark.parametrize(
    "puzzle", [bent_pairs(2, 2), bent_pairs(1, 2, backed_up=True), bent_pairs(1, 1, routes=2, backed_up=True)]
)
def test_of_all_circuits_of_bent_pairs_the_truth_is_the_one_smallest_that_holds(puzzle: Puzzle) -> None:
    n = puzzle.model.n_nodes
    losses = MaskedLoss(puzzle.model, as_batch(puzzle.batch))
    with torch.no_grad():
        loss = {
            present: float(losses.per_example(torch.tensor(present, dtype=torch.float)).mean())
            for present in itertools.product((0, 1), repeat=n)
        }
    worst = {keep: max(loss[present] for present in loss if all(map(int.__ge__, present, keep))) for keep in loss}
    least = min(sum(keep) for keep, value in worst.items() if value <= puzzle.target_loss)
    smallest = {keep: value for keep, value in worst.items() if sum(keep) <= least}
    holds = [keep for keep, value in smallest.items() if value <= puzzle.target_loss]
    assert [set(itertools.compress(range(n), keep)) for keep in holds] == puzzle.adversarial
    assert smallest.pop(holds[0]) < puzzle.target_loss / 4 and min(smallest.values()) > 5 * puzzle.target_loss


def test_no_ranking_finds_bent_pairs_with_backups() -> None:
    """Patching sees the pairs alone, integrated gradients what tells the answer alone, gradients neither."""
    bent, both = NETWORKS["bent pairs"](0, 0), NETWORKS["bent pairs, backups"](0, 0)
    in_bent, in_both = (
        {name: recovery(top(scores, len(planted.truth)), planted.truth).f1 for name, scores in ranked.items()}
        for planted, ranked in ((bent, attributions(bent, 0)), (both, attributions(both, 0)))
    )
    assert in_bent["patching"] == 1 and max(in_bent["gradient"], in_bent["integrated"]) < 0.3
    assert max(in_both.values()) < 0.7


def test_the_planted_components_make_up_the_weight() -> None:
    network, writes = train_superposed(2, 0)
    assert torch.allclose(network.mlp_in.weight, (network.directions.T @ writes).T)
    cosines = network.directions @ network.directions.T - torch.eye(len(network.directions))
    assert float(cosines.abs().max()) < 0.2


def test_the_program_and_what_a_swap_does() -> None:
    ids = draw(8, FLAG_B, generator(0, "ids"))
    first, second = operands(ids, FLAG_B)
    assert torch.equal(first, ids[:, 3]) and torch.equal(program(FLAG_B, first, second), (first - second) % 4)
    assert torch.equal(program(FLAG_A, first, second), (first + second) % 4)
    network = train(1, 0)
    assert isinstance(network, ProgramTransformer)
    other = network.run(ids.flip(0))[1]
    keep = torch.ones(8, 14)
    plain, swapped_all = network(ids), network.run(ids, other, torch.zeros(8, 14))[0]
    assert torch.allclose(network.run(ids, other, keep)[0], plain, atol=1e-6)
    assert not torch.allclose(swapped_all, plain, atol=1e-3)
