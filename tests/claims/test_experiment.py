"""Cells are saved one by one, a stopped run goes on, and the command line says what is wrong in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdprune.claims.__main__ import main
from pdprune.claims.experiment import Experiment, run_cells, saved_cells
from pdprune.claims.registry import EXPERIMENTS
from pdprune.errors import UserError

CELLS = [{"name": "a", "seed": 0}, {"name": "a", "seed": 1}, {"name": "b", "seed": 0}]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    def run(name: str, seed: int) -> dict[str, Any]:
        if (name, seed) == ("b", 0) and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((name, seed))
        return {"figure": len(ran)}

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_cells(tmp_path, CELLS, run, told.append)
    assert [result.figures["figure"] for result in saved_cells(tmp_path, CELLS)] == [1, 2]
    ran.append(("stopped", 0))
    results = run_cells(tmp_path, CELLS, run, told.append)
    assert [result.figures["figure"] for result in results] == [1, 2, 4]
    assert ran == [("a", 0), ("a", 1), ("stopped", 0), ("b", 0)]
    assert [result.cell for result in results] == CELLS and len(told) == 3
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cell_with_another_setting_is_another_cell(tmp_path: Path) -> None:
    run_cells(tmp_path, [{"name": "a", "steps": 10}], lambda name, steps: {"figure": steps}, lambda line: None)
    assert saved_cells(tmp_path, [{"name": "a", "steps": 20}]) == []
    assert saved_cells(tmp_path, [{"name": "a", "steps": 10}])[0].figures == {"figure": 10}


def test_a_damaged_cell_is_told_of(tmp_path: Path) -> None:
    run_cells(tmp_path, CELLS[:1], lambda name, seed: {}, lambda line: None)
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        saved_cells(tmp_path, CELLS[:1])


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_every_experiment_names_its_cells_apart(experiment: Experiment) -> None:
    for settings in (experiment.settings, experiment.small):
        cells = [dict(cell) for cell in experiment.cells(settings)]
        assert cells and all(cells.count(cell) == 1 for cell in cells)


def test_the_list_says_what_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(experiment.claim in printed for experiment in EXPERIMENTS.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["table", "cancellation"], "run it first"),
        (["run", "cancellation", "--set", "seeds"], "NAME=VALUE"),
        (["run", "cancellation", "--set", "sedes=[0]"], "no setting 'sedes'"),
        (["run", "cancellation", "--set", 'networks=["x"]'], "networks: got 'x'; expected some of correlated shortcut"),
        (["run", "sparse", "--set", 'ways=["x"]'], "ways is ('x',); expected values as in ('recipe',"),
        (["run", "nonsense", "--set", "seeds=[a]"], "seeds is ('a',); expected values as in (0, 1, 2)"),
        (["run", "nonsense", "--set", "seeds=3"], "seeds is 3; expected values as in (0, 1, 2)"),
        (["run", "nonsense", "--set", "aim=half"], "aim is 'half'; expected values as in 0.5"),
        (["run", "bases", "--set", "sampled=runs/misspelt"], "runs/misspelt"),
        (["run", "nonsense", "--set", 'cases=["x"]'], "cases: got 'x'; expected some of the task itself"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert not list(tmp_path.rglob("*.json")), "no cell is computed"
