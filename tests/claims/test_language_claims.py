"""The claims about language models in small, and the data that they are made on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pdprune.circuits.schemes import SchemeName
from pdprune.claims.__main__ import main
from pdprune.claims.experiment import Result, saved_cells
from pdprune.claims.language import Splits, language_model, module_of, reference_of, task_scores
from pdprune.claims.nonsense import EXPERIMENT as NONSENSE
from pdprune.claims.nonsense import GRAPHS, smallest_or_best, splits_of
from pdprune.claims.overlap import ELSEWHERE, after, jaccard
from pdprune.claims.overlap import EXPERIMENT as OVERLAP
from pdprune.targets import load_target


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.of("quote", "dense-py", 128, 16)


def test_splits_are_of_the_sizes_asked_for(splits: Splits) -> None:
    assert [len(batch["labels"]) for batch in splits.train] == [64, 64]
    assert [len(batch["labels"]) for batch in (*splits.select, *splits.held_out)] == [16, 16]


def test_a_seed_draws_the_prompts_of_every_split(splits: Splits) -> None:
    drawn, again, others = (Splits.of("quote", "dense-py", 128, 16, seed) for seed in (0, 0, 1))
    for name in ("train", "select", "held_out"):
        first, one, two, other = (_prompts(getattr(each, name)) for each in (splits, drawn, again, others))
        assert one == two and len(set(one)) == len(set(first)) == len(first)
        assert one != first and one != other and set(one) != set(other)
    everything = {name: set(_prompts(getattr(drawn, name))) for name in ("train", "select", "held_out")}
    assert not everything["train"] & everything["held_out"] and not everything["select"] & everything["held_out"]


def _prompts(batches: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch["inputs"]["input_ids"].tolist()]


def test_other_answers(splits: Splits) -> None:
    right = splits.held_out[0]["labels"]
    wrong = splits.relabelled("wrong", 0).held_out[0]["labels"]
    shuffled = splits.relabelled("shuffled", 0).held_out[0]["labels"]
    assert bool((wrong != right).all())
    assert sorted(shuffled.tolist()) == sorted(right.tolist()) and not torch.equal(shuffled, right)
    assert torch.equal(splits.relabelled("right", 0).held_out[0]["labels"], right)


def test_an_untrained_model_is_at_chance_and_a_trained_one_is_not(splits: Splits) -> None:
    trained, untrained = language_model("dense-py"), language_model("dense-py", "random", 0)
    assert trained.n_nodes == untrained.n_nodes == 960
    scores = [task_scores(m, splits.held_out, None, reference_of(m, splits, 0)) for m in (trained, untrained)]
    assert scores[0][0] < 0.2 and 0.5 < scores[1][0] < 1


def test_prompts_after_a_comment_are_the_same_prompts(splits: Splits) -> None:
    tokenizer = load_target("dense-py").tokenizer
    assert tokenizer is not None
    batch = splits.held_out[0]
    moved = after(batch, ELSEWHERE, "dense-py")
    for row in (0, 5):
        end = int(batch["positions"][row]) + 1
        text = tokenizer.decode(batch["inputs"]["input_ids"][row, :end].tolist())
        end = int(moved["positions"][row]) + 1
        assert tokenizer.decode(moved["inputs"]["input_ids"][row, :end].tolist()) == ELSEWHERE + text
    model = language_model("dense-py")
    assert task_scores(model, [moved], None, reference_of(model, splits, 0))[1] > 0.6


def test_shuffled_weights_are_those_of_the_model_in_another_order() -> None:
    model, shuffled = (dict(module_of("dense-py", weights).named_parameters()) for weights in ("trained", "shuffled"))
    for name, parameter in model.items():
        assert torch.equal(parameter.flatten().sort().values, shuffled[name].flatten().sort().values)
        assert torch.equal(parameter, shuffled[name]) == (parameter.ndim == 1)
    assert torch.equal(model["unembed.weight"], load_target("dense-py").module.state_dict()["unembed.weight"])


def test_what_is_learned_by_heart_is_chosen_on_what_was_learned() -> None:
    by_heart = splits_of("quote", "shuffled", "dense-py", 128, 16, 0)
    assert by_heart.train == by_heart.select and len(by_heart.train) == 1
    assert len(by_heart.train[0]["labels"]) == 64 and len(by_heart.held_out[0]["labels"]) == 16
    right = splits_of("quote", "right", "dense-py", 128, 16, 0)
    assert [len(batch["labels"]) for batch in (*right.train, *right.select)] == [64, 64, 16]


@dataclass
class Sized:
    """A circuit's loss is a function of how many nodes it keeps; the higher a node ranks the sooner it is kept."""

    loss: Callable[[int], float]
    ranking: torch.Tensor
    asked: list[int] = field(default_factory=list)

    def score(self, keep: torch.Tensor, stop_above: float | None = None) -> float:
        size = int(keep.sum())
        assert size == len(keep) or self.ranking[keep > 0].min() > self.ranking[keep == 0].max()
        self.asked.append(size)
        return self.loss(size)


@pytest.mark.parametrize(
    ("scheme", "loss", "found"),
    [
        ("complete", lambda size: abs(size - 50) / 100, (20, True)),  # 20 to 80 of 100 will do: the fewest of them
        ("complete", lambda size: 1 + abs(size - 13) / 100, (13, False)),  # none will do: the best
        ("adversarial", lambda size: 1.0 if size < 70 else 0.1, (70, True)),
        ("adversarial", lambda size: 2 - size / 100, (100, False)),  # all nodes: the model itself
    ],
)
def test_the_smallest_circuit_within_a_loss_or_the_best(
    scheme: SchemeName, loss: Callable[[int], float], found: tuple[int, bool]
) -> None:
    ranking = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    scorer = Sized(loss, ranking)
    keep, reached = smallest_or_best(ranking, scorer, scheme, 0.3)
    assert (int(keep.sum()), reached) == found
    if scheme == "adversarial" and not reached:
        assert scorer.asked == [100], "no attack on circuits that cannot hold"


@pytest.mark.slow
def test_wrong_answers_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too short a training to find much: that cells are made, saved, and add up to a table."""
    assert main(["run", "nonsense", "--small", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = saved_cells(tmp_path / "nonsense", NONSENSE.cells(NONSENSE.small))
    by_scheme = {result.cell["scheme"]: result.figures for result in results}
    assert set(by_scheme) == {"complete", "adversarial"}
    for scheme, figures in by_scheme.items():
        assert f"| wrong answers, {scheme} |" in printed
        assert figures["model_ce"] > 1 and figures["worst_ce"] >= figures["complete_ce"]
        assert figures["faithful"] is False
        assert figures["at_share"]["kept"] == 144
    complete, adversarial = by_scheme["complete"], by_scheme["adversarial"]
    assert complete["kept"] < 1440 and complete["chosen_on"]["ce"] < adversarial["chosen_on"]["ce"]
    assert adversarial["reached"] is False and adversarial["kept"] == 1440  # no worst case is below the model's loss


def test_a_graph_is_asked_of_by_its_own_schemes() -> None:
    asked = {(cell["graph"], cell["scheme"]) for cell in NONSENSE.cells(NONSENSE.settings)}
    assert asked == {(graph, scheme) for graph, schemes in GRAPHS.items() for scheme in schemes}


def test_overlaps_by_hand() -> None:
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5 and jaccard(set(), set()) == 1
    held_out = {"model": 1.0, "complete": 0.5, "adversarial": 0.25}

    def result(seed: int, half: int, kept: list[int]) -> Result:
        figures = {"kept": kept, "n_nodes": 10, "held_out": held_out, "elsewhere": held_out}
        return Result({"scheme": "complete", "seed": seed, "half": half}, figures, 0.0)

    table = OVERLAP.table([result(0, 0, [1, 2]), result(0, 1, [1, 2]), result(1, 0, [1, 3]), result(1, 1, [3, 1])])
    (row,) = (line for line in table.splitlines() if line.startswith("| complete |"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["2 of 10", "0.33", "1.00", "0.11"]
