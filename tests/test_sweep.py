"""Sweeps: trials are a function of the file and the seed, and an interrupted sweep is completed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdprune import sweep
from pdprune.run_folder import RunFolder
from pdprune.sweep import Sweep, main

SHIPPED = sorted((Path(__file__).parent.parent / "configs/sweeps").glob("*.yaml"))
COMMAND = ["${env}", "python", "-m", "pdprune.train", "fit", "--config=toy.yaml"]
RUN_FOLDER = "--trainer.default_root_dir=sweeps/toy/${oc.env:WANDB_RUN_ID}"


def write(folder: Path, **changes: Any) -> Path:
    content = {
        "method": "grid",
        "parameters": {"model.lr": {"values": [0.1, 0.2]}, "model.size": {"values": [2, 3]}, "seed": {"value": 7}},
        "command": [*COMMAND, RUN_FOLDER, "${args}"],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_grid_is_all_combinations(tmp_path: Path) -> None:
    trials = Sweep.read(write(tmp_path)).trials(None)
    assert [tuple(trial.values()) for trial in trials] == [(0.1, 2, 7), (0.1, 3, 7), (0.2, 2, 7), (0.2, 3, 7)]
    assert Sweep.read(write(tmp_path)).trials(3) == trials[:3]


def test_draws_lie_where_they_may_and_follow_from_the_seed(tmp_path: Path) -> None:
    parameters = {
        "uniform": {"min": -1.0, "max": 1.0},
        "log": {"distribution": "log_uniform_values", "min": 0.01, "max": 100.0},
        "int": {"distribution": "int_uniform", "min": 1, "max": 3},
        "one": {"values": ["a", "b"]},
    }
    read = Sweep.read(write(tmp_path, method="random", parameters=parameters))
    trials = read.trials(200, seed=1)
    assert trials[:5] == read.trials(5, seed=1) and trials[:5] != read.trials(5, seed=2)
    assert all(-1 <= trial["uniform"] <= 1 and 0.01 <= trial["log"] <= 100 for trial in trials)
    assert {trial["int"] for trial in trials} == {1, 2, 3} and {trial["one"] for trial in trials} == {"a", "b"}
    assert 60 < sum(trial["log"] < 1 for trial in trials) < 140, "half of them below the geometric mean"


def test_trials_are_run_once_each_and_stopped_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []
    statuses = [0, 143, 0, 0, 0]

    def train(args: list[str]) -> int:
        asked.append(args)
        folder = RunFolder(next(Path(a.partition("=")[2]) for a in args if a.startswith("--trainer.default_root_dir")))
        status = statuses[len(asked) - 1]
        if status == 0:
            folder.checkpoints.mkdir(parents=True)
            folder.mark_finished()
        return status

    monkeypatch.setattr(sweep, "train", train)
    file = str(write(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([file])
    assert stopped.value.code == 143 and len(asked) == 2
    assert main([file]) == 0
    assert [args[-2].rpartition("/")[2] for args in asked] == ["000", "001", "001", "002", "003"]
    assert asked[0][:3] == ["fit", "--config=toy.yaml", "--model.lr=0.1"] and asked[0][-1] == "--ckpt_path=last"
    rows = json.loads((tmp_path / "sweeps/toy/sweep.json").read_text())
    assert [row["parameters"]["model.size"] for row in rows] == [2, 3, 2, 3]
    assert main([str(write(tmp_path, parameters={"model.lr": {"values": [0.3]}}))]) == 2
    assert "holds another trial" in capsys.readouterr().err


def test_the_smallest_faithful_circuit_comes_first() -> None:
    rows: list[dict[str, Any]] = [
        {"n_kept": 3, "adversarial_loss": 0.9, "faithful": False},
        {"n_kept": 30, "adversarial_loss": 0.1, "faithful": True},
        {"n_kept": 20, "adversarial_loss": 0.1, "faithful": True},
        {"n_kept": 5, "adversarial_loss": 0.5, "faithful": False},
    ]
    assert [row["n_kept"] for row in sorted(rows, key=sweep._worth)] == [20, 30, 5, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "bayes"}, "grid or random"),
        ({"parameters": {}}, "no parameters"),
        ({"parameters": {"lr": {"min": 1, "max": 2}}}, "lr is"),
        ({"method": "random", "parameters": {"lr": {"min": 2, "max": 1}}}, "lr is"),
        ({"command": [*COMMAND, "${args}"]}, "command is not"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_of_flags_that_there_are(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pdprune.train import main as train

    monkeypatch.chdir(file.parent.parent.parent)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    read = Sweep.read(file)
    (trial, *_) = read.trials(1)
    folder = f"{sweep.FOLDER}{read.folder}/{sweep.RUN_ID}"
    swept = [f"--{name}={value}" for name, value in trial.items()]
    with pytest.raises(SystemExit) as printed:
        train(["fit", *read.flags, folder, *swept, "--print_config"])
    assert not printed.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["default_root_dir"].endswith(f"{read.folder}/abc")
