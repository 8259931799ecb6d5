"""A real circuit through the command line, on a network small enough to audit in a second."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import in_a_child
from killed_endings import attacks_made, dying_at, dying_in_audit, numbers_scored
from safetensors.torch import load_file
from tiny_circuit import PROMPTS, network, write_material

from pdprune.targets.store import save_target
from pdprune.train import main

pytestmark = pytest.mark.usefixtures("in_a_copy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a task and a config."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def uninterrupted(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(material, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit() == 0
        return results()


def fit(*args: str) -> int:
    return main(["fit", "--config", "circuit.yaml", *args])


def results() -> dict[str, Any]:
    folder = Path("runs/circuit")
    tensors = load_file(folder / "circuit.safetensors")
    names = ("circuit.json", "audit.json", "metrics.csv", "config.yaml", "report.html")
    return {name: (folder / name).read_text() for name in names} | {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_fit_ends_with_a_circuit_and_its_audit(uninterrupted: dict[str, Any]) -> None:
    circuit, audit = json.loads(uninterrupted["circuit.json"]), json.loads(uninterrupted["audit.json"])
    assert circuit["n_kept"] == len(circuit["kept"]) == sum(uninterrupted["keep"]) == audit["n_kept"]
    assert 0 < circuit["n_kept"] < circuit["n_nodes"]
    assert circuit["task"] == "quotes"
    assert circuit["config"]["model"]["init_args"]["target_loss"] == 0.05
    assert audit["held_out"] is True
    assert audit["adversarial"]["loss"] >= max(audit["complete_loss"], audit["stochastic"]["max"], audit["model_loss"])


def test_killed_at_random_moments_and_resumed(uninterrupted: dict[str, Any]) -> None:
    moments = random.Random(1)
    kills = [in_a_child(lambda: fit("--ckpt_path", "last"), kill_after=moments.uniform(0.5, 2.5)) for _ in range(5)]
    assert -signal.SIGKILL in kills
    if 0 not in kills:
        assert fit("--ckpt_path", "last") == 0
    assert results() == uninterrupted


def test_killed_just_before_each_file_of_the_end(uninterrupted: dict[str, Any]) -> None:
    for name in ("circuit.json", "audit.json", "report.html"):
        assert in_a_child(lambda name=name: _fit_dying_before(name)) == -signal.SIGKILL
        assert not Path("runs/circuit", name).exists()
        assert fit("--ckpt_path", "last") == 0
        assert results() == uninterrupted, f"killed before {name}"
        shutil.rmtree("runs")


def _fit_dying_before(name: str) -> int:
    import os

    replace: Callable[..., None] = os.replace

    def dying(source: Any, destination: Any) -> None:
        if Path(destination).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    os.replace = dying  # type: ignore[assignment]
    return fit()


def test_too_weak_an_attack_is_refused_before_anything_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.attack.restarts", "1") == 2
    assert "audit: got 1 restarts" in capsys.readouterr().err and not Path("runs").exists()


def test_a_killed_selection_scores_nothing_twice(uninterrupted: dict[str, Any]) -> None:
    assert in_a_child(lambda: dying_at(7, fit)) == -signal.SIGKILL
    assert in_a_child(lambda: dying_at(3, lambda: fit("--ckpt_path", "last"))) == -signal.SIGKILL
    numbers = numbers_scored(lambda: fit("--ckpt_path", "last"))
    assert numbers[:3] == [9, 10, 11], "six circuits were scored, then two"
    assert results() == uninterrupted
    assert "selection" not in torch.load("runs/circuit/checkpoints/last.ckpt", weights_only=True)


def test_a_killed_audit_makes_no_attack_twice(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    all_of_them = attacks_made(lambda: fit("--trainer.default_root_dir", str(tmp_path / "whole")))
    assert in_a_child(lambda: dying_in_audit(2, fit)) == -signal.SIGKILL
    assert in_a_child(lambda: dying_in_audit(2, lambda: fit("--ckpt_path", "last"))) == -signal.SIGKILL
    assert attacks_made(lambda: fit("--ckpt_path", "last")) == all_of_them - 2 > 0
    assert results() == uninterrupted
    assert "audit" not in torch.load("runs/circuit/checkpoints/last.ckpt", weights_only=True)


def test_what_a_selection_was_told_with_other_settings_is_not_believed() -> None:
    other = ("--model.attack.draws", "2", "--model.selection.drop_scores", "5")
    assert in_a_child(lambda: dying_at(7, fit)) == -signal.SIGKILL
    assert numbers_scored(lambda: fit("--ckpt_path", "last", *other))[0] == 1
    found = results()
    assert fit(*other, "--overwrite") == 0
    assert {**results(), "config.yaml": ""} == {**found, "config.yaml": ""}


def test_validate_test_and_predict_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    before = json.loads(Path("runs/circuit/audit.json").read_text())
    assert main(["validate", "--config", "circuit.yaml"]) == 0
    assert "select/adversarial" in capsys.readouterr().out
    assert main(["test", "--config", "circuit.yaml", "--ckpt_path", "runs/circuit/checkpoints/last.ckpt"]) == 0
    audit = json.loads(Path("runs/circuit/audit.json").read_text())
    assert [rung["steps"] for rung in audit["adversarial"]["ladder"]] == [20, 80, 320]
    assert audit["adversarial"]["loss"] >= before["adversarial"]["loss"]
    assert main(["predict", "--config", "circuit.yaml"]) == 0
    predictions = Path("runs/circuit/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == audit["n_examples"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--model.decomposition.sites ['*.nowhere']", "*.nowhere"),
        ("--model.target_loss null --model.target_nodes 1000", "1000"),
        ("--model.decomposition.target nowhere --data.target nowhere", "nowhere"),
        ("--data.max_length 3", "expected at most 3"),
        ("--data.task empty.jsonl", "empty.jsonl"),
        ("--data.task foreign.jsonl", "foreign.jsonl:1"),
        ("--data.task nowhere.jsonl", "nowhere.jsonl"),
        ("--model.scheme adversary", "model.scheme: expected one of"),
        ("--model.decomposition.target broken --data.target broken", "broken"),
        ("--ckpt_path other.ckpt", "checkpoint"),
    ],
)
def test_bad_input(args: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.jsonl").write_text("")
    Path("foreign.jsonl").write_text("".join(json.dumps({**prompt, "answer": "é"}) + "\n" for prompt in PROMPTS))
    broken = network()
    with torch.no_grad():
        broken.blocks[0].mlp.up.weight[0, 0] = float("nan")
    save_target(broken, Path("broken"))
    torch.save({"state_dict": {}, "loops": {}, "global_step": 1, "pytorch-lightning_version": "2.6.6"}, "other.ckpt")
    before = sorted(Path().rglob("*"))
    assert fit(*args.split()) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert expected in printed.err
    assert sorted(Path().rglob("*")) == before
