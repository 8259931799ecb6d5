"""Every shipped config parses and runs a step, through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pdprune.train import main

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = {
    "quickstart-complete.yaml": "quickstart.yaml",
    "decompose/dense-py-all.yaml": "decompose/dense-py.yaml",
}
"""Configs that are layered on top of another one."""


@pytest.mark.parametrize("name", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
def test_config_runs_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = [OVERLAYS[name], name] if name in OVERLAYS else [name]
    arguments = [argument for layer in layers for argument in ("--config", str(CONFIGS / layer))]
    # The rest of a fit, warm-up, selection and audit, has tests of its own, on smaller networks.
    for module in ("circuits.pruning.CircuitPruner", "decomposition.learning.ComponentLearner"):
        monkeypatch.setattr(f"pdprune.{module}.finish", lambda *_, **__: None)
    monkeypatch.setattr("pdprune.decomposition.learning.warm_up", lambda *_: None)
    assert main(["fit", *arguments, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0
    assert [path.name for path in tmp_path.glob("runs/*/checkpoints/finished")] == ["finished"]


@pytest.mark.parametrize("key", ["target_loss", "decomposition.basis"])
def test_a_flag_takes_null(capsys: pytest.CaptureFixture[str], key: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), f"--model.{key}", "null", "--print_config"])
    assert done.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    for part in key.split("."):
        value = value[part]
    assert value is None
