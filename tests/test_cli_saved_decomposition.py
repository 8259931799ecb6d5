"""A circuit of a saved decomposition through the command line, from a warm start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from pdprune.circuits.circuit import Circuit
from pdprune.decomposition import decompose
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings
from pdprune.decomposition.saved import save_decomposition
from pdprune.targets.store import load_target, save_target
from pdprune.targets.transformer import Transformer, TransformerConfig
from pdprune.train import main

CONFIG = {
    "seed_everything": 0,
    "trainer": {"accelerator": "cpu", "max_steps": 3, "check_val_every_n_epoch": 1000},
    "model": {
        "class_path": "pdprune.circuits.pruning.CircuitPruner",
        "init_args": {
            "decomposition": {"target": "tiny", "path": "learned"},
            "scheme": "complete",
            "target_nodes": 5,
            "warm_start": True,
            "audit": {"draws": 1, "random_circuits": 0},
        },
    },
    "data": {
        "class_path": "pdprune.tasks.TaskData",
        "init_args": {"task": "quotes.jsonl", "target": "tiny", "batch_size": 16},
    },
}
PROMPTS = [{"prompt": f"{n} = {quote}x{n}", "answer": quote, "wrong": "#"} for n in range(20) for quote in "'\""]


@pytest.fixture(autouse=True)
def _material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_target(
            Transformer(TransformerConfig(max_length=16, n_layers=1, n_heads=2, d_model=8, d_mlp=8)), Path("tiny")
        )
    model = decompose(load_target("tiny").module, ["*.mlp.down", "*.attn.out"], "svd")
    model.importances = CausalImportances(model.sites, ImportanceSettings(hidden=[]), seed=1)
    save_decomposition("learned", model)
    Path("quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))


def fit(config: dict) -> int:
    Path("circuit.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", "circuit.yaml"])


def test_fit_on_a_saved_decomposition() -> None:
    assert fit(CONFIG) == 0
    circuit = Circuit.load("runs/circuit")
    assert circuit.n_nodes == 16
    circuit.check_fits(decompose(load_target("tiny").module, ["*.mlp.down", "*.attn.out"], "svd"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "nowhere"}, "there is no such folder"),
        ({"path": "learned", "basis": "svd"}, "expected no sites, basis or n_heads beside it"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(
    change: dict, message: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    init_args = {**CONFIG["model"]["init_args"], "decomposition": {"target": "tiny", **change}}  # type: ignore[index]
    assert fit({**CONFIG, "model": {**CONFIG["model"], "init_args": init_args}}) == 2  # type: ignore[dict-item]
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
