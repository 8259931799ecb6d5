"""Runs the notebooks from top to bottom and stores what they put out: `make notebooks`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(path: Path) -> None:
    """Run a notebook in its folder, and write it with its outputs; without times, which differ on every run."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=where).execute()
    path.write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.name, flush=True)
        run(path)
