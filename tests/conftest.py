"""What every test needs: one thread each, no network, no leftovers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Before torch is imported. Two workers with two threads each would fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> None:
    """A test must not depend on what ran before it: the command line, for one, has denormal numbers flushed."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture
def in_a_copy(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is in a copy of the folder that its module has as `material`."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", default=None, help="a folder for pictures of the pages that are tested")
