"""The command line through its front door, with a toy model: what it writes, refuses, and survives."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forking import in_a_child

from pdprune.train import default_run_folder, main

STEPS = 50
CONFIG: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "max_steps": STEPS},
    "model": {"class_path": "toy_runs.ToyPruner", "init_args": {"seed": "${seed_everything}"}},
    "data": {"class_path": "toy_runs.ToyData", "init_args": {"seed": "${seed_everything}"}},
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(CONFIG))


def fit(*args: str) -> int:
    return main(["fit", "--config", "toy.yaml", *args])


def files_in(folder: Path | str = ".") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def results(folder: str) -> dict[str, Any]:
    """All that a run must end with, whatever happened to it on the way."""
    path = Path(folder)
    state = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        **{name: (path / name).read_text() for name in ("circuit.json", "audit.json", "metrics.csv")},
        "gates": state["state_dict"]["weight"].tolist(),
        "adversary": state["state_dict"]["source"].tolist(),
        "step": state["global_step"],
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    root = str(folder / "run")
    assert main(["fit", "--config", str(folder / "toy.yaml"), "--trainer.default_root_dir", root]) == 0
    return results(root)


# -- what a fit leaves behind


def test_fit_writes_the_run_folder() -> None:
    assert fit() == 0
    assert files_in("runs/toy") == [
        "audit.json",
        "checkpoints/finished",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "circuit.json",
        "config.yaml",
        "metrics.csv",
    ]

    header, *rows = Path("runs/toy/metrics.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["step", "epoch"]
    assert {"loss", "rare", "select_loss"} <= set(header.split(","))
    assert [int(row.split(",")[0]) for row in rows] == list(range(STEPS))
    rare = header.split(",").index("rare")
    assert {int(row.split(",")[0]) for row in rows if row.split(",")[rare]} == {0, 10, 20, 30, 40}


def test_the_written_config_runs_again_to_the_same_result(uninterrupted: dict[str, Any]) -> None:
    assert fit("--overwrite") == 0
    resolved = yaml.safe_load(Path("runs/toy/config.yaml").read_text())
    assert "overwrite" not in resolved and "ckpt_path" not in resolved
    assert main(["fit", "--config", "runs/toy/config.yaml", "--trainer.default_root_dir", "runs/again"]) == 0
    assert results("runs/again") == results("runs/toy") == uninterrupted


def test_a_model_without_results_of_its_own_is_fitted_too() -> None:
    assert fit("--model", "toy_runs.Regression", "--trainer.max_steps", "5") == 0
    assert "checkpoints/finished" in files_in("runs/toy")
    assert fit("--model", "toy_runs.Regression", "--trainer.max_steps", "5") == 2


def test_a_trial_run_leaves_nothing() -> None:
    assert fit("--trainer.fast_dev_run", "1") == 0
    assert files_in() == ["toy.yaml"]


def test_weights_and_biases_runs_offline_in_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    script = "import sys; from pdprune.train import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "fit", "--config", "toy.yaml", "--trainer.max_steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(list(Path("runs/toy/wandb").glob("offline-run-*/run-*.wandb"))) == 1


# -- configuration


def test_layers_overrides_and_interpolation(capsys: pytest.CaptureFixture[str]) -> None:
    Path("overlay.yaml").write_text(
        "model: {init_args: {lr: 0.5}}\ntrainer: {max_steps: 7}\ndata: {init_args: {seed: '${model.init_args.seed}'}}\n"
    )
    arguments = ["--config", "overlay.yaml", "--model.size", "4", "--data.size=4", "--seed_everything", "9"]
    with pytest.raises(SystemExit) as done:
        fit(*arguments, "--print_config")
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["init_args"]["lr"], printed["trainer"]["max_steps"]) == (0.5, 7)

    assert fit(*arguments) == 0
    resolved = yaml.safe_load(Path("runs/overlay/config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 7
    assert resolved["trainer"]["default_root_dir"] == "runs/overlay"
    model, data = resolved["model"]["init_args"], resolved["data"]["init_args"]
    assert (model["lr"], model["size"], model["seed"], data["seed"]) == (0.5, 4, 9, 9)


def test_run_folder_is_known_while_values_are_interpolated() -> None:
    callback = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "${trainer.default_root_dir}/best", "monitor": "loss"},
    }
    Path("callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert fit("--config", "callback.yaml", "--trainer.max_steps=8") == 0
    assert any(name.startswith("best/") for name in files_in("runs/callback"))


@pytest.mark.parametrize(
    ("args", "folder"),
    [
        (["fit", "--config", "configs/quickstart.yaml"], "runs/quickstart"),
        (["fit", "--config=a/b.yaml", "-c", "c/d.yml", "--model.x", "1"], "runs/d"),
        (["fit", "-c", "c/d.yml", "--config=a/b.yaml"], "runs/b"),
        (["fit", "--config", "a/b.yaml", "--config", "configs/trainer/ddp.yaml"], "runs/b"),
        (["fit"], "runs/unnamed"),
    ],
)
def test_default_run_folder(args: list[str], folder: str) -> None:
    assert default_run_folder(args) == folder


# -- going on after an interruption


def test_killed_at_a_step_and_resumed(uninterrupted: dict[str, Any]) -> None:
    for die_at in (0, 19, 20, 41):
        assert in_a_child(lambda step=die_at: fit("--model.die_at", str(step))) == -signal.SIGKILL
        assert fit("--ckpt_path", "last") == 0
        assert results("runs/toy") == uninterrupted, f"killed at step {die_at}"
        shutil.rmtree("runs")


def test_killed_between_its_results_and_resumed(uninterrupted: dict[str, Any]) -> None:
    assert in_a_child(lambda: fit("--model.die_in_finish", "true")) == -signal.SIGKILL
    assert "audit.json" not in files_in("runs/toy")
    assert fit("--ckpt_path", "last") == 0
    assert results("runs/toy") == uninterrupted


def test_killed_again_and_again_at_random_moments(uninterrupted: dict[str, Any]) -> None:
    moments = random.Random(0)
    arguments = ["--checkpoint.every_n_steps", "3", "--model.pause", "0.02"]
    for _ in range(6):
        in_a_child(lambda: fit("--ckpt_path", "last", *arguments), kill_after=moments.uniform(0.1, 1.2))
    assert fit("--ckpt_path", "last", *arguments) == 0
    assert results("runs/toy") == uninterrupted


@pytest.mark.parametrize("step", [33, 34])
def test_sigterm_saves_and_can_be_resumed(step: int, uninterrupted: dict[str, Any]) -> None:
    """The second at the last batch of an epoch."""
    assert in_a_child(lambda: fit("--model.terminate_at", str(step))) == 128 + signal.SIGTERM
    assert torch.load("runs/toy/checkpoints/last.ckpt", weights_only=True)["global_step"] == step + 1
    assert fit("--ckpt_path", "last") == 0
    assert results("runs/toy") == uninterrupted


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(uninterrupted: dict[str, Any]) -> None:
    assert in_a_child(lambda: fit("--model.die_at", "45")) == -signal.SIGKILL
    last = Path("runs/toy/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read; going on from .*previous\.ckpt"):
        assert fit("--ckpt_path", "last") == 0
    assert results("runs/toy") == uninterrupted


def test_config_wins_over_the_checkpoint() -> None:
    assert fit("--trainer.max_steps", "5") == 0
    shutil.copy("runs/toy/checkpoints/last.ckpt", "other.ckpt")
    assert fit("--ckpt_path", "other.ckpt", "--model.lr", "0.7", "--trainer.default_root_dir", "runs/other") == 0
    resolved = yaml.safe_load(Path("runs/other/config.yaml").read_text())
    assert resolved["model"]["init_args"]["lr"] == 0.7


# -- the other commands


def test_validate_test_and_predict(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    before = {name: Path("runs/toy", name).read_bytes() for name in files_in("runs/toy")}
    for command, value in (("validate", "select_loss"), ("test", "held_out_loss")):
        capsys.readouterr()
        assert main([command, "--config", "toy.yaml", "--ckpt_path", "runs/toy/checkpoints/last.ckpt"]) == 0
        assert value in capsys.readouterr().out
    assert main(["predict", "--config", "toy.yaml"]) == 0
    records = [json.loads(line) for line in Path("runs/toy/predictions.jsonl").read_text().splitlines()]
    assert [record["batch"] for record in records] == [0, 0, 1, 1]
    assert records[0]["prompt"] == "é0"
    assert records[0]["weight"] != 0
    assert {name: Path("runs/toy", name).read_bytes() for name in before} == before


# -- what it refuses


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail in one line, exit with 2 and change no file; returns the line."""

    def run(*args: str) -> str:
        before = {name: Path(name).read_bytes() for name in files_in()}
        capsys.readouterr()
        status = main(list(args))
        printed = capsys.readouterr()
        assert {name: Path(name).read_bytes() for name in files_in()} == before, "files were changed"
        assert status == 2
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("pdprune: error: ")
        return printed.err.removeprefix("pdprune: error: ").strip()

    return run


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--model.sise 4", "model.sise = 4: there is no such key; did you mean 'size'?"),
        ("--model.siz 4", "model.siz = 4: there is no such key; did you mean 'size'?"),
        ("--trainer.max_step 4", "trainer.max_step = 4: there is no such key; did you mean 'trainer.max_steps'?"),
        ("--modle.size 4", "modle.size = 4: there is no such key; did you mean 'model'?"),
        ("--model.size four", "model.size: expected int, got 'four'"),
        ("--trainer.max_steps x", "trainer.max_steps: expected int, got 'x'"),
        ("--config dangling.yaml", "model.init_args.lr: ${nowhere.x} names no key of the config"),
        ("--model toy_runs.Nothing", "model: class toy_runs.Nothing can't be imported"),
        ("--config missing.yaml", "config file missing.yaml cannot be read: No such file or directory"),
        ("--config broken.yaml", "config file broken.yaml is no valid YAML"),
        ("--config misspelt.yaml", "trainer.max_stepz = 3: there is no such key; did you mean 'trainer.max_steps'?"),
        ("--config nested.yaml", "model.sise = 5: there is no such key; did you mean 'size'?"),
        ("--model.size 0", "size: got 0; expected at least 1"),
        ("--data.empty true", "data: there are no prompts; expected at least one"),
        ("--trainer.accelerator tpuu", "accelerator"),
        ("--trainer.accelerator tpu", "Requirement 'torch_xla"),
        ("--seed_everything -1", "seed_everything: -1 is not in bounds"),
        ("--checkpoint.every_n_steps 0", "checkpoint.every_n_steps"),
        ("--ckpt_path missing.ckpt", "checkpoint missing.ckpt does not exist"),
        ("--ckpt_path toy.yaml", "checkpoint toy.yaml cannot be read"),
        ("--trainer.default_root_dir toy.yaml/run", "run folder toy.yaml/run cannot be written to"),
    ],
)
def test_bad_input(args: str, expected: str, refused: Callable[..., str]) -> None:
    Path("broken.yaml").write_text("trainer: [\n")
    Path("dangling.yaml").write_text("model: {init_args: {lr: '${nowhere.x}'}}\n")
    Path("misspelt.yaml").write_text("trainer: {max_stepz: 3}\n")
    Path("nested.yaml").write_text("model: {class_path: toy_runs.ToyPruner, init_args: {sise: 5}}\n")
    assert expected in refused("fit", "--config", "toy.yaml", *args.split())


def test_no_command_and_no_config(refused: Callable[..., str]) -> None:
    assert "fit,validate,test,predict" in refused()
    assert "'fitt'" in refused("fitt")
    assert refused("fit").startswith("data, model: required")


def test_finished_and_unfinished_folders(refused: Callable[..., str]) -> None:
    assert in_a_child(lambda: fit("--model.die_at", "30")) == -signal.SIGKILL
    assert "unfinished run" in refused("fit", "--config", "toy.yaml")
    assert fit("--ckpt_path", "last") == 0
    others = (["--model.lr", "0.7"], ["--trainer.max_time", "1:0:0:0"])
    other_runs = [["--ckpt_path", "last", *other] for other in others]
    for more in ([], ["--ckpt_path", "runs/toy/checkpoints/last.ckpt"], *other_runs):
        assert "finished run; replace it with --overwrite" in refused("fit", "--config", "toy.yaml", *more)
    shutil.rmtree("runs/toy/checkpoints")
    for more in ([], ["--ckpt_path", "last"]):
        assert "finished run" in refused("fit", "--config", "toy.yaml", *more)


def test_going_on_with_a_finished_run_leaves_it_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is queued again after its last step, wherever it is put, has nothing to do, and has not failed."""
    assert fit() == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/toy").rglob("*")}
    capsys.readouterr()
    overlay = Path(__file__).parent.parent / "configs/trainer/cpu.yaml"
    elsewhere = ["--trainer.log_every_n_steps", "3", "--config", str(overlay)]
    assert fit("--ckpt_path", "last", *elsewhere) == 0
    assert capsys.readouterr().out == "Results are in runs/toy, where this run is finished already\n"
    assert {path: path.stat().st_mtime_ns for path in Path("runs/toy").rglob("*")} == before


def test_overwrite_starts_over_and_keeps_foreign_files(uninterrupted: dict[str, Any]) -> None:
    assert fit("--trainer.max_steps", "30", "--seed_everything", "5") == 0
    Path("runs/toy/notes.txt").write_text("mine")
    assert fit("--overwrite") == 0
    assert results("runs/toy") == uninterrupted
    assert Path("runs/toy/notes.txt").read_text() == "mine"


def test_a_refused_overwrite_loses_nothing(refused: Callable[..., str]) -> None:
    assert fit() == 0
    assert "no prompts" in refused("fit", "--config", "toy.yaml", "--overwrite", "--data.empty", "true")


def test_bad_checkpoints(refused: Callable[..., str]) -> None:
    assert fit("--trainer.max_steps", "5") == 0
    good = Path("runs/toy/checkpoints/last.ckpt").read_bytes()
    flipped = bytearray(good)
    at = good.index(torch.load("runs/toy/checkpoints/last.ckpt")["state_dict"]["source"].numpy().tobytes())
    flipped[at] ^= 1
    for name, content in (("cut.ckpt", good[:1000]), ("flipped.ckpt", bytes(flipped)), ("empty.ckpt", b"")):
        Path(name).write_bytes(content)
        for command in ("fit", "validate", "test", "predict"):
            folder = ["--trainer.default_root_dir", "runs/elsewhere"]
            message = refused(command, "--config", "toy.yaml", "--ckpt_path", name, *folder)
            assert f"checkpoint {name} cannot be read" in message
    torch.save({"weights": torch.zeros(3)}, "other.ckpt")
    message = refused("test", "--config", "toy.yaml", "--ckpt_path", "other.ckpt")
    assert "other.ckpt is not a checkpoint of a run" in message
    assert "no checkpoint in runs/empty" in refused(
        "test", "--config", "toy.yaml", "--trainer.default_root_dir", "runs/empty"
    )


def test_checkpoint_of_another_model(refused: Callable[..., str]) -> None:
    assert fit("--trainer.max_steps", "5") == 0
    shutil.copy("runs/toy/checkpoints/last.ckpt", "toy.ckpt")
    arguments = ["--ckpt_path", "toy.ckpt", "--trainer.default_root_dir", "runs/elsewhere"]
    for change in (["--model.size", "4"], ["--model", "toy_runs.Regression"]):
        assert "of another model" in refused("fit", "--config", "toy.yaml", *arguments, *change)


def test_both_checkpoints_damaged(refused: Callable[..., str]) -> None:
    assert in_a_child(lambda: fit("--model.die_at", "45")) == -signal.SIGKILL
    for name in ("last.ckpt", "previous.ckpt"):
        Path("runs/toy/checkpoints", name).write_bytes(b"")
    assert "start over with --overwrite" in refused("fit", "--config", "toy.yaml", "--ckpt_path", "last")


def test_non_finite_loss_stops_with_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.nan_at", "33") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the loss is nan at keep step 33" in error
    assert "runs/toy/checkpoints/non-finite.ckpt" in error
    assert torch.load("runs/toy/checkpoints/non-finite.ckpt", weights_only=True)["global_step"] == 33
    assert torch.load("runs/toy/checkpoints/last.ckpt", weights_only=True)["global_step"] == 20


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("toy_runs.ToyPruner.training_step", buggy)
    with pytest.raises(ValueError, match="a bug"):
        fit()
