"""What runs leave with experiment trackers, read back from what was written; nothing here uses a network."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import WandbLogger
from tiny_circuit import QUICK, write_material
from wandb_files import read_offline_run

from pdprune.circuits.node_table import COLUMNS
from pdprune.tracking import Results, Table, as_markdown, show_results
from pdprune.train import main

SUMMARY = ("kept", "complete", "stochastic", "adversarial", "gap", "faithful")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the material of a run lies; it is the current folder."""
    monkeypatch.chdir(write_material(tmp_path))
    return tmp_path / "runs" / "circuit"


def audited(folder: Path) -> dict[str, float]:
    """The summary that the files of a run folder come to."""
    audit = json.loads((folder / "audit.json").read_text())
    losses = (audit["complete_loss"], audit["stochastic"]["mean"], audit["adversarial"]["loss"])
    values = (audit["n_kept"], *losses, losses[2] - losses[0], audit["faithful"])
    return {f"audit/{name}": pytest.approx(float(value)) for name, value in zip(SUMMARY, values, strict=True)}


def test_weights_and_biases_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    script = "import sys; from pdprune.train import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "fit", *QUICK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")

    run = read_offline_run(folder)
    steps = [row for row in run.history if "train/loss" in row]
    assert [row["trainer/global_step"] for row in steps] == [0, 1, 2]
    assert {"train/kept", "train/price", "train/complete"} <= steps[0].keys()
    assert {name: float(run.summary[name]) for name in audited(folder)} == audited(folder)
    assert run.summary["audit/faithful"] is json.loads((folder / "audit.json").read_text())["faithful"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: run.config[name] for name in resolved} == resolved

    media = run.history[-1]
    for name in ("circuit/curve", "circuit/graph"):
        assert (run.files / media[f"{name}/path"]).read_bytes().startswith(b"\x89PNG")
    table = json.loads((run.files / media["circuit/kept_nodes/path"]).read_text())
    kept = json.loads((folder / "circuit.json").read_text())["kept"]
    assert table["columns"] == list(COLUMNS)
    assert [row[:2] for row in table["data"]] == [[node["node"], node["label"]] for node in kept]
    assert "run" not in run.artifacts, "the run folder goes along only where there is somewhere to go"


def test_tensorboard_shows_the_same(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(folder / "tensorboard")]
    assert main(["fit", *QUICK, *logger]) == 0
    assert not list(folder.glob("wandb")), "the logger that was chosen, and no other"

    (written,) = {path.parent for path in folder.glob("tensorboard/**/events.out.*")}
    seen = events.EventAccumulator(str(written)).Reload()
    scalars = {name: [event.value for event in seen.Scalars(name)] for name in seen.Tags()["scalars"]}
    assert len(scalars["train/loss"]) == 3
    assert {name: scalars[name][0] for name in audited(folder)} == audited(folder)
    assert set(seen.Tags()["images"]) == {"circuit/curve", "circuit/graph"}
    (text,) = seen.Tensors("circuit/kept_nodes/text_summary")
    kept = json.loads((folder / "circuit.json").read_text())["kept"]
    assert all(f"| {node['label']} |" in text.tensor_proto.string_val[0].decode() for node in kept)
    assert "hparams.yaml" in {path.name for path in written.iterdir()}
    assert (folder / "metrics.csv").is_file()


def test_a_logger_without_media_gets_the_values(folder: Path) -> None:
    assert main(["fit", *QUICK, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder / "csv")]) == 0
    (written,) = folder.glob("csv/**/metrics.csv")
    last = list(csv.DictReader(io.StringIO(written.read_text())))[-1]
    assert {name: float(last[name]) for name in audited(folder)} == audited(folder)


# -- a run that is online, as far as that can be seen without a network


class OnlineRun:
    """What Weights & Biases is handed."""

    offline = False

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.log_artifact = self.artifacts.append
        self.log = self.logged.update
        self.is_finished = False

    def finish(self) -> None:
        self.is_finished = True


class OnlineLogger(WandbLogger):
    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def experiment(self) -> Any:
        return self._run


def test_the_run_folder_is_an_artifact_without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    folder = tmp_path / "a run"
    for name in ("circuit.json", "report.html", "decomposition/d.json", "checkpoints/last.ckpt", "wandb/run.wandb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    run = OnlineRun()
    show_results([OnlineLogger(run)], Results({"kept": 3, "faithful": None}), folder, step=1)
    (artifact,) = run.artifacts
    assert (artifact.name, artifact.type) == ("a-run", "run")
    assert set(artifact.manifest.entries) == {"circuit.json", "report.html", "decomposition/d.json"}
    assert run.summary == {"audit/kept": 3}
    assert list(run.logged) == ["report"] and run.is_finished


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = OnlineRun()

    def draw() -> Any:
        import matplotlib  # noqa: F401

    show_results([OnlineLogger(run)], Results({"kept": 3}, {"t": Table(["a"], [[1]])}, draw), tmp_path, step=1)
    assert capsys.readouterr().err.count("\n") == 1
    assert list(run.logged) == ["t"]


def test_a_tracker_that_fails_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise OSError("the tracker\nis full")

    monkeypatch.setattr("pdprune.train.show_results", failing)
    assert main(["fit", *QUICK, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv"]) == 0
    assert capsys.readouterr().err == "pdprune: the results were not logged: the tracker is full\n"
    assert (folder / "checkpoints" / "finished").exists() and (folder / "audit.json").exists()


def test_tables_as_text() -> None:
    table = Table(["name", "value"], [["a|b", 0.123456], ["c", None], *[["d", 1]] * 600])
    lines = as_markdown(table).splitlines()
    assert lines[:4] == ["| name | value |", "| --- | --- |", "| a\\|b | 0.1235 |", "| c |  |"]
    assert lines[-1] == "and 102 more"
