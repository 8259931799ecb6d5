"""The claims about bases and norms in small: that cells are made, saved, and add up to a table that says what they do.

Trainings are too short to find much, but for what holds however short they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdprune.adversary.attack import passes_of
from pdprune.circuits.audit import FLOOR
from pdprune.circuits.findings import Audit
from pdprune.claims import figures
from pdprune.claims.__main__ import main
from pdprune.claims.experiment import Figures, Result, crossed, grouped, saved_cells
from pdprune.claims.intervals import markdown
from pdprune.claims.language import Splits, audited
from pdprune.claims.nodes import CHANNELS, in_nodes
from pdprune.claims.registry import EXPERIMENTS
from pdprune.claims.sparse import by_recipe

LEARNED, HEADS = "learned components", "neurons and heads"


def small(name: str, folder: Path, *changes: str) -> list[Result]:
    """The results of a small version, with some settings changed."""
    experiment = EXPERIMENTS[name]
    given = [word for change in changes for word in ("--set", change)]
    assert main(["run", name, "--small", "--folder", str(folder), *given]) == 0
    results = saved_cells(folder / name, experiment.cells(experiment.small))
    assert experiment.table(results).count("\n| ") >= len(results)
    return results


def by(results: list[Result], *names: str) -> dict[tuple[Any, ...], Figures]:
    return {key: of_it[0] for key, of_it in grouped(results, *names).items()}


@pytest.mark.slow
def test_neurons_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = by(small("neurons", tmp_path), "scheme")
    assert f"| dense-py at 0.15, {HEADS}: quote, complete |" in capsys.readouterr().out
    assert set(found) == {("complete",), ("adversarial",)}
    complete, adversarial = found["complete",], found["adversarial",]
    assert complete["n_nodes"] == 776 and complete["kept"] < adversarial["kept"]
    assert complete["worst_ce"] > 1 and complete["faithful"] is False
    for one in (complete, adversarial):
        assert [at["kept"] for at in one["curve"]] == [388]
        for at in (one, *one["curve"]):
            assert at["worst_ce"] >= max(at["complete_ce"], at["model_ce"])


@pytest.mark.slow
def test_sparse_in_small(tmp_path: Path) -> None:
    found = by(small("sparse", tmp_path), "target")
    assert {target: one["n_nodes"] for (target,), one in found.items()} == {"sparse-py": 1600, "dense-py": 960}
    for one in found.values():
        assert one["worst_ce"] >= max(one["complete_ce"], one["model_ce"])


@pytest.mark.slow
def test_bases_in_small(tmp_path: Path) -> None:
    found = by(small("bases", tmp_path), "basis")
    sizes = {basis: (one["n_nodes"], one["deltas"]) for (basis,), one in found.items()}
    assert sizes == {LEARNED: (768, 4), "singular vectors": (384, 0)}


def test_bases_are_compared_on_the_same_prompts() -> None:
    """A basis that keeps half of what another keeps, of twice as many nodes; a pair that is not whole is none."""
    kept = {("first", 0): 10, ("other", 0): 20, ("first", 1): 30, ("other", 1): 60, ("first", 2): 1}
    rest = dict.fromkeys(("model_ce", "complete_ce", "stochastic_ce", "worst_ce"), 0.1) | {"faithful": True}
    results = [
        Result(
            {"basis": basis, "task": "quote", "seed": seed},
            {"n_nodes": 200 if basis == "first" else 100, "kept": count, **rest},
            1.0,
        )
        for (basis, seed), count in kept.items()
    ]
    assert EXPERIMENTS["bases"].table(results).endswith("| first over other | 0.25; 2/2 | 0.50; 2/2 |")
    assert "over" not in EXPERIMENTS["bases"].table([result for result in results if result.cell["basis"] == "first"])


def test_frozen_norm_in_small(tmp_path: Path) -> None:
    found = by(small("frozen-norm", tmp_path), "norm_scales")
    frozen, live = found["frozen",], found["live",]
    assert frozen["model_ce"] == live["model_ce"]  # the audit is live, on the same prompts
    assert frozen["kept"] != live["kept"]
    assert set(frozen["elsewhere"]) == {"model", "complete", "adversarial"}


def test_the_recipe_keeps_what_its_gates_leave_open_longest() -> None:
    """A circuit within the target loss on the prompts that it was chosen on, if any top of the ranking is."""
    model = in_nodes("dense-py", CHANNELS)
    splits = Splits.of("quote", "dense-py", 64, 16)
    within = {target: by_recipe(model, splits, target, steps=3, seed=0) for target in (0.2, 5.0)}
    assert within[5.0] < within[0.2] < set(range(model.n_nodes))


def test_the_recipe_comes_with_a_row_of_its_own_for_each_way() -> None:
    cells = EXPERIMENTS["sparse"].cells(EXPERIMENTS["sparse"].settings)
    assert {(cell["way"], cell["steps"]) for cell in cells} == {("recipe", 600), ("adversarial", 60)}


def test_a_path_of_components_learned_by_sampling_is_a_row_more() -> None:
    bases = EXPERIMENTS["bases"]
    more = bases.cells(bases.set_up(False, {"sampled": "runs/stochastic"}))
    known = bases.cells(bases.settings)
    assert {cell["basis"] for cell in more} == {cell["basis"] for cell in known} | {"runs/stochastic"}
    assert all(cell in more for cell in known)


def test_audits_of_claims_have_the_least_budget_or_more() -> None:
    found: Audit = audited(in_nodes("dense-py", CHANNELS), {0}, Splits.of("quote", "dense-py", 64, 8), 0.15, 0)
    attack = found.adversarial
    assert (attack.steps, attack.step_size, attack.restarts) == (FLOOR.steps, FLOOR.step_size, FLOOR.restarts)
    assert passes_of(FLOOR) > FLOOR.steps * FLOOR.restarts
    told = figures.audit_figures(found)
    assert told["kept"] == 1 and told["worst_ce"] == attack.loss >= told["complete_ce"]


def test_crossed_cells_come_with_the_first_axis_innermost() -> None:
    cells = crossed({"a": (1, 2), "b": ("x", "y")}, {"steps": 3})
    assert cells == [{"a": a, "b": b, "steps": 3} for b in "xy" for a in (1, 2)]
    assert list(cells[0]) == ["a", "b", "steps"]


def test_columns_by_hand() -> None:
    one = {"n_nodes": 1600, "kept": 3, "model_ce": 0.1, "complete_ce": 0.2, "stochastic_ce": 0.3, "worst_ce": 0.4}
    row = figures.columns([one | {"faithful": True}, one | {"faithful": False}])
    assert row == ["3 of 1,600", "0.10", "0.20", "0.30", "0.40", "1 of 2"]
    assert markdown(figures.HEAD, [row]).count("\n") == 2
