"""What docs/claims.md and the notebook show is what the saved cells hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdprune.claims.experiment import saved_cells
from pdprune.claims.registry import EXPERIMENTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "claims.md").read_text()
SAVED = sorted(folder.name for folder in (DOCS / "claims").iterdir())
CHANGES = {"bases": {"sampled": "runs/stochastic/decomposition"}}
"""Settings that the page gives beside the defaults."""


@pytest.mark.parametrize("name", SAVED)
def test_every_saved_cell_is_one_of_the_experiment(name: str) -> None:
    experiment = EXPERIMENTS[name]
    settings = experiment.set_up(small=False, changes=CHANGES.get(name, {}))
    results = saved_cells(DOCS / "claims" / name, experiment.cells(settings))
    assert len(results) == len(list((DOCS / "claims" / name).glob("*.json"))) > 0
    assert experiment.table(results).startswith("| ")


def test_the_page_has_the_saved_rows_of_recovery() -> None:
    experiment = EXPERIMENTS["cancellation"]
    results = saved_cells(DOCS / "claims" / "cancellation", experiment.cells(experiment.settings))
    networks = {f"| {result.cell['network']}: " for result in results}
    rows = [line for line in experiment.table(results).splitlines() if line.startswith(tuple(networks))]
    assert len(rows) == len(networks)
    assert all(row in PAGE for row in rows)


def test_every_command_of_the_page_names_an_experiment() -> None:
    commands = [line.split() for line in PAGE.splitlines() if line.startswith("    python -m pdprune.claims ")]
    named = [words[4] for words in commands if words[3] != "list"]
    assert named and set(named) <= set(EXPERIMENTS)


def test_the_notebook_shows_every_experiment() -> None:
    notebook = json.loads((DOCS.parent / "notebooks" / "claims.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert all(f'show("{name}"' in text for name in EXPERIMENTS)
