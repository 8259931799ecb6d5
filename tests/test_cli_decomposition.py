"""A decomposition learned through the command line: its files, interrupted or not, and one key for the adversary."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forking import in_a_child

from pdprune.decomposition.importances import importance_mask
from pdprune.decomposition.learning import ComponentLearner
from pdprune.decomposition.saved import read_decomposition
from pdprune.targets import TMS, TMSConfig
from pdprune.targets.store import save_target
from pdprune.train import main

CONFIG: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "max_steps": 40, "check_val_every_n_epoch": 1000, "log_every_n_steps": 4},
    "checkpoint": {"every_n_steps": 4},
    "model": {
        "class_path": "pdprune.ComponentLearner",
        "init_args": {
            "target": "tiny",
            "sites": {"linear1": 6, "linear*": 7},
            "loss": "mse",
            "mode": "adversarial",
            "importances": {"kind": "component_mlp", "hidden": [4]},
            "minimality": {"coefficient": 1e-3, "start": 2.0, "end": 0.5},
            "warm_up": {"steps": 20},
            "audit": {"attack": {"steps": 2, "restarts": 1, "draws": 2, "flips": 2}, "ladder": [4], "batches": 1},
            "seed": "${seed_everything}",
        },
    },
    "data": {
        "class_path": "pdprune.targets.SparseFeatures",
        "init_args": {"n_features": 5, "batch_size": 32, "audit_batch_size": 32, "seed": "${seed_everything}"},
    },
}
FILES = ("decomposition/decomposition.json", "decomposition/decomposition.safetensors", "decomposition_audit.json")


@pytest.fixture(autouse=True)
def _material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a target and a config, to be in."""
    monkeypatch.chdir(tmp_path)
    save_target(TMS(TMSConfig(5, 2)), Path("tiny"))
    Path("tms.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))


def fit(*args: str) -> int:
    return main(["fit", "--config", "tms.yaml", *args])


def results(folder: str = "runs/tms") -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in (*FILES, "metrics.csv")}


def test_fit_ends_with_a_decomposition_and_its_audit(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    model = read_decomposition("runs/tms/decomposition")
    assert {name: site.n_components for name, site in model.sites.items()} == {"linear1": 7, "linear2": 7}
    x = torch.rand(4, 5)
    assert torch.allclose(model(x), model.target(x))
    assert importance_mask(model, x).shape == (4, 14)
    found = json.loads(Path("runs/tms/decomposition_audit.json").read_text())
    assert found["target"] == "tiny" and found["mode"] == "adversarial" and found["steps"] == 40
    assert set(found["known_answers"]) == {"linear1", "linear2"}
    assert fit() == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert fit("--overwrite") == 0


def test_killed_at_some_steps_and_resumed() -> None:
    assert fit("--trainer.default_root_dir", "whole") == 0
    for step in (2, 6, 17, 33):  # the first before any checkpoint, the others between two
        assert in_a_child(lambda step=step: _fit_dying_at(step, "--ckpt_path", "last")) == -signal.SIGKILL
    assert fit("--ckpt_path", "last") == 0
    assert results() == results("whole")


def _fit_dying_at(step: int, *args: str) -> int:
    training_step = ComponentLearner.training_step

    def dying(learner: ComponentLearner, raw: Any, index: int) -> None:
        training_step(learner, raw, index)
        if learner.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ComponentLearner.training_step = dying  # type: ignore[method-assign]
    return fit(*args)


def test_killed_just_before_each_file_of_the_end() -> None:
    assert fit("--trainer.default_root_dir", "whole") == 0
    for name in FILES:
        folder = f"dying/{Path(name).stem}{Path(name).suffix}"
        where = ("--trainer.default_root_dir", folder)
        assert in_a_child(lambda name=name, where=where: _fit_dying_before(Path(name).name, *where)) == -signal.SIGKILL
        assert fit("--ckpt_path", "last", *where) == 0
        assert results(folder) == results("whole"), f"killed before {name}"


def _fit_dying_before(name: str, *args: str) -> int:
    replace = os.replace

    def dying(source: Any, destination: Any) -> None:
        if Path(destination).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    os.replace = dying  # type: ignore[assignment]
    return fit(*args)


def test_one_key_switches_the_mode() -> None:
    found = {}
    for mode in ("stochastic", "attribution"):
        folder = f"runs/{mode}"
        assert fit("--model.mode", mode, "--trainer.default_root_dir", folder, "--trainer.max_steps", "3") == 0
        found[mode] = json.loads(Path(folder, "decomposition_audit.json").read_text())
        config = yaml.safe_load(Path(folder, "config.yaml").read_text())
        assert config["model"]["init_args"]["mode"] == found[mode]["mode"] == mode
    assert read_decomposition("runs/attribution/decomposition").importances is None


def test_validate_and_test_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    before = results()
    assert main(["validate", "--config", "tms.yaml"]) == 0
    assert "val/stochastic" in capsys.readouterr().out
    assert main(["test", "--config", "tms.yaml", "--model.audit.ladder", "[4, 8]"]) == 0
    assert "test/adversarial" in capsys.readouterr().out
    longer = json.loads(Path("runs/tms/decomposition_audit.json").read_text())
    shorter = json.loads(before["decomposition_audit.json"])
    assert longer["steps"] == shorter["steps"] == 40
    assert longer["reconstruction"].pop("adversarial_8") >= shorter["reconstruction"]["adversarial_4"]
    assert longer == shorter


def test_a_mistake_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, told in (
        (("--model.modes", "stochastic"), "modes"),
        (("--model.mode", "adverse"), "adverse"),
        (("--model.sites", "{linear3: 4}"), "site pattern 'linear3' matches nothing"),
        (("--model.importances.kind", "mlp"), "mlp"),
    ):
        assert fit(*args) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and "\n" not in error
        assert not Path("runs").exists()
