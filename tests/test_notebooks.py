"""The notebooks run from top to bottom, and what is committed is what a run left."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""

# Jupyter's client asks for the running event loop in a way that newer Pythons warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell put out: `stdout`, in however many pieces, or the richest type of what it showed."""
    shown = (
        output.get("name") or max(output.data, key=lambda kind: kind.startswith("image")) for output in cell.outputs
    )
    return [kind for kind, _ in itertools.groupby(shown)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_puts_out_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for found, expected in zip(code_cells(notebook), code_cells(stored), strict=True):
        assert kinds(found) == kinds(expected), found.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_of_one_whole_run(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert {kind for cell in cells for kind in kinds(cell)} <= {"stdout", "image/png"}  # no warnings, no tracebacks
    assert not any("\r" in output.get("text", "") for cell in cells for output in cell.outputs)
    assert not any("execution" in cell.metadata for cell in cells)  # times, different on every run
