"""The fifth claim in small: a choice for each example breaks a circuit that a choice for the batch does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdprune.claims.__main__ import main
from pdprune.claims.experiment import saved_cells
from pdprune.claims.planted.handmade import noisy_sequences
from pdprune.claims.scopes import EXPERIMENT


def test_the_small_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "scopes", "--small", "--folder", str(tmp_path)]) == 0
    assert "| batch, 64 |" in capsys.readouterr().out
    results = saved_cells(tmp_path / "scopes", EXPERIMENT.cells(EXPERIMENT.small))
    found = {(result.cell["scope"], result.cell["batch_size"]): result.figures for result in results}
    assert set(found) == {
        ("batch", 1), ("batch", 64), ("position", 1), ("position", 64), ("example", 64), ("example_position", 64),
    }  # fmt: skip
    one, many = found["batch", 1], found["batch", 64]
    assert one["worst_case"] > 3 * many["worst_case"]
    assert one["on_the_other_batch"] < 0.5 * one["worst_case"]  # fitted to one example: noise does not transfer
    assert found["example_position", 64]["worst_case"] > found["example", 64]["worst_case"] > 3 * many["worst_case"]


def test_noise_is_as_loud_as_asked_for() -> None:
    puzzle, batches = noisy_sequences(10, 3.0, 4, (2, 5), 0)
    assert [tuple(batch.shape) for batch in batches] == [(2, 4, 11), (5, 4, 11)]
    logits = puzzle.model.target(torch.ones(1, 4, 11)).detach()
    assert float(logits[0, 0, 0] - logits[0, 0, 1]) == pytest.approx(5.0)
