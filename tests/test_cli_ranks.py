"""The command line on two ranks: DDP over gloo, one writer, stopped in every way and gone on with; and under SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forking import in_a_child, on_ranks
from tiny_circuit import CONFIG, PROMPTS, network

from pdprune import report, train
from pdprune.circuits import pruning
from pdprune.circuits.pruning import CircuitPruner
from pdprune.decomposition.learning import ComponentLearner
from pdprune.decomposition.saved import read_decomposition
from pdprune.signals import requeue_job
from pdprune.targets.store import save_target
from pdprune.train import main

ROOT = Path(__file__).parent.parent
OVERLAY = ROOT / "configs/trainer/ddp.yaml"
ON_TWO_RANKS = ("--config", str(OVERLAY), "--trainer.accelerator", "cpu", "--trainer.devices", "2")
LIGHT = {
    "trainer": {"max_steps": 12},
    "model": {
        "init_args": {
            "adversary": {"mode": "persistent", "steps": 2, "step_size": 0.2},
            "target_loss": None,
            "target_nodes": 10,
            "attack": {"draws": 2, "flips": 4},
            "selection": {"swap_scores": 0},
            "audit": {"draws": 2, "random_circuits": 0, "test_ladder": [20]},
        }
    },
}
COMPONENTS = {
    "trainer": {"accelerator": "cpu", "max_steps": 12, "check_val_every_n_epoch": 1000, "log_every_n_steps": 1},
    "checkpoint": {"every_n_steps": 4},
    "model": {
        "class_path": "pdprune.ComponentLearner",
        "init_args": {
            "target": "tiny",
            "sites": {"*.mlp.*": 6},
            "mode": "adversarial",
            "warm_up": {"steps": 3},
            "audit": {"attack": {"steps": 2, "restarts": 1, "draws": 2, "flips": 2}, "ladder": [], "batches": 1},
        },
    },
    "data": {"class_path": "pdprune.tasks.TaskData", "init_args": {"task": "quotes.jsonl", "target": "tiny"}},
}

pytestmark = pytest.mark.usefixtures("in_a_copy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a task, and a config of each kind."""
    folder = tmp_path_factory.mktemp("material")
    save_target(network(), folder / "tiny")
    (folder / "quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    (folder / "circuit.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "light.yaml").write_text(yaml.safe_dump(LIGHT))
    (folder / "components.yaml").write_text(yaml.safe_dump(COMPONENTS))
    return folder


CIRCUIT = ("--config", "circuit.yaml", "--config", "light.yaml", "--trainer.default_root_dir", "runs/here")
LEARNED = ("--config", "components.yaml", "--trainer.default_root_dir", "runs/here")


def fit(*args: str) -> int:
    return main(["fit", *args])


def fit_on_two_ranks(*args: str) -> list[int]:
    return on_ranks(2, lambda: fit(*args, *ON_TWO_RANKS))


def results(folder: str = "runs/here") -> dict[str, Any]:
    """All that a run must end with, but for when and where."""
    path = Path(folder)
    state = torch.load(path / "checkpoints/last.ckpt", weights_only=True)
    files = [file for file in path.rglob("*") if file.suffix in (".csv", ".json", ".safetensors", ".yaml")]
    return {
        "files": {str(file.relative_to(path)): file.read_bytes() for file in files},
        "state": {name: value.tolist() for name, value in state["state_dict"].items()},
        "step": state["global_step"],
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert (found["state"], found["step"]) == (wanted["state"], wanted["step"])
    assert found["files"].keys() == wanted["files"].keys()
    for name, content in wanted["files"].items():
        assert found["files"][name].decode(errors="replace") == content.decode(errors="replace"), name


def in_material(material: Path, folder: Path, run: Callable[[], Any]) -> dict[str, Any]:
    shutil.copytree(material, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run()
        return results()


@pytest.fixture(scope="module")
def circuit(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks end with when nothing comes in between, the second one started by the first."""

    def run() -> None:
        command = [sys.executable, "-m", "pdprune.train", "fit", *CIRCUIT, *ON_TWO_RANKS]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("Results are in runs/here") == 1

    return in_material(material, tmp_path_factory.mktemp("circuit"), run)


@pytest.fixture(scope="module")
def components(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def run() -> None:
        assert fit_on_two_ranks(*LEARNED) == [0, 0]

    return in_material(material, tmp_path_factory.mktemp("components"), run)


# -- what two ranks leave behind


def test_two_ranks_leave_what_one_process_does(circuit: dict[str, Any]) -> None:
    assert fit(*CIRCUIT) == 0
    one = results()
    assert one["files"].keys() == circuit["files"].keys()
    for name in ("theta", "opponent.sources", "log_price"):
        assert torch.allclose(torch.tensor(one["state"][name]), torch.tensor(circuit["state"][name]), atol=1e-6), name
    rows = [found["files"]["metrics.csv"].decode().splitlines() for found in (one, circuit)]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]
    kept = [json.loads(found["files"]["circuit.json"])["kept"] for found in (one, circuit)]
    assert [node["node"] for node in kept[0]] == [node["node"] for node in kept[1]]


def test_an_audit_by_one_of_two_ranks() -> None:
    assert fit(*CIRCUIT) == 0
    first = json.loads(results()["files"]["audit.json"])
    assert on_ranks(2, lambda: main(["test", *CIRCUIT, *ON_TWO_RANKS])) == [0, 0]
    audit = json.loads(results()["files"]["audit.json"])
    assert [rung["steps"] for rung in audit["adversarial"]["ladder"]] == [20]
    assert audit["adversarial"]["loss"] >= first["adversarial"]["loss"]


def test_a_decomposition_is_learned_by_both_and_written_by_one(components: dict[str, Any]) -> None:
    assert fit(*LEARNED) == 0
    one = results()
    assert one["files"].keys() == components["files"].keys()
    for name, value in one["state"].items():
        assert torch.allclose(torch.tensor(value), torch.tensor(components["state"][name]), atol=1e-6), name
    assert read_decomposition("runs/here/decomposition").n_nodes == 12


def test_another_number_of_processes_than_were_started_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks(2, lambda: fit(*CIRCUIT)) == [2, 2]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and all("You set `devices=1`" in line and "world size (2)" in line for line in told)
    assert not Path("runs").exists()


# -- stopped, and gone on with


def signalled(number: int, module: Any, at_step: int, rank: int, *args: str) -> list[int]:
    """How two ranks end if one of them gets a signal in the middle of a step."""

    def run() -> int:
        training_step = module.training_step

        def interrupted(self: Any, *rest: Any) -> Any:
            if self.global_step == at_step and self.trainer.global_rank == rank:
                os.kill(os.getpid(), number)
            return training_step(self, *rest)

        module.training_step = interrupted
        return fit(*args, *ON_TWO_RANKS)

    return on_ranks(2, run)


def test_stopped_and_killed_and_gone_on_with(circuit: dict[str, Any]) -> None:
    """By SIGTERM of one rank, which ends both after the same step; then by SIGKILL, and the last checkpoint is cut."""
    stopped, last = 128 + signal.SIGTERM, Path("runs/here/checkpoints/last.ckpt")
    assert signalled(signal.SIGTERM, CircuitPruner, 5, 1, *CIRCUIT) == [stopped, stopped]
    assert torch.load(last, weights_only=True)["global_step"] == 6
    survivor, victim = signalled(signal.SIGKILL, CircuitPruner, 11, 1, *CIRCUIT, "--ckpt_path", "last")
    assert victim == -signal.SIGKILL and survivor != 0
    last.write_bytes(last.read_bytes()[:-500])
    assert fit(*CIRCUIT, "--ckpt_path", str(last)) == 2, "a damaged checkpoint that is named is refused"
    assert on_ranks(2, lambda: _unwarned(*CIRCUIT, "--ckpt_path", "last", *ON_TWO_RANKS)) == [0, 0]
    assert_same(results(), circuit)


def _unwarned(*args: str) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*last\.ckpt cannot be read; going on from")
        return fit(*args)


def test_components_go_on_where_a_rank_was_killed(components: dict[str, Any]) -> None:
    assert signalled(signal.SIGKILL, ComponentLearner, 7, 0, *LEARNED)[0] == -signal.SIGKILL
    assert fit_on_two_ranks(*LEARNED, "--ckpt_path", "last") == [0, 0]
    assert_same(results(), components)


@pytest.fixture
def asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A job of SLURM's as a process sees it, and what it has asked SLURM for."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "circuit")
    return lambda: (tmp_path / "asked").read_text()


def warned_in(owner: Any, name: str, *args: str) -> int:
    """How a command ends that SLURM warns as soon as this function is called."""

    def run() -> int:
        function = getattr(owner, name)

        def interrupted(*given: Any, **named: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return function(*given, **named)

        setattr(owner, name, interrupted)
        return main([*args])

    return in_a_child(run)


def checkpoints_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).rglob("*.ckpt"))


def test_slurm_queues_a_job_again_that_it_is_about_to_stop(asked_of_slurm: Callable[[], str]) -> None:
    assert fit(*CIRCUIT) == 0
    whole = results()
    shutil.rmtree("runs")

    def warned() -> int:
        training_step = CircuitPruner.training_step

        def interrupted(self: Any, *args: Any) -> None:
            if self.global_step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            training_step(self, *args)

        CircuitPruner.training_step = interrupted  # type: ignore[method-assign]
        return fit(*CIRCUIT, "--ckpt_path", "last")

    assert in_a_child(warned) == 128 + signal.SIGTERM
    assert asked_of_slurm() == "requeue 4711\n"
    assert checkpoints_in("runs/here") == ["last.ckpt", "previous.ckpt"]
    # Warned again before training goes on, when the circuit is chosen, audited, and when its page is written.
    moments = ((CircuitPruner, name) for name in ("prepare", "select_on"))
    for owner, name in (*moments, (pruning, "audit_circuit"), (report, "write_report")):
        assert warned_in(owner, name, "fit", *CIRCUIT, "--ckpt_path", "last") == 128 + signal.SIGTERM, name
    assert asked_of_slurm() == 5 * "requeue 4711\n"
    handled = signal.getsignal(signal.SIGUSR1)
    assert fit(*CIRCUIT, "--ckpt_path", "last") == 0
    assert signal.getsignal(signal.SIGUSR1) == handled
    assert_same(results(), whole)


def test_slurm_warns_in_the_last_validation(asked_of_slurm: Callable[[], str]) -> None:
    validating = (*CIRCUIT, "--trainer.val_check_interval", "12", "--trainer.check_val_every_n_epoch", "null")
    assert fit(*validating) == 0
    whole = results()
    shutil.rmtree("runs")
    assert warned_in(CircuitPruner, "validated", "fit", *validating) == 128 + signal.SIGTERM
    assert asked_of_slurm() == "requeue 4711\n" and not Path("runs/here/circuit.json").exists()
    assert fit(*validating, "--ckpt_path", "last") == 0
    assert results()["state"] == whole["state"]


@pytest.mark.parametrize(
    ("command", "owner", "name"),
    [
        ("validate", CircuitPruner, "validated"),
        ("test", pruning, "audit_circuit"),
        ("test", report, "write_report"),
        ("predict", pruning, "prediction_records"),
        ("predict", train, "write_atomically"),
    ],
)
def test_slurm_queues_other_commands_again(
    command: str, owner: Any, name: str, asked_of_slurm: Callable[[], str]
) -> None:
    assert fit(*CIRCUIT) == 0
    assert warned_in(owner, name, command, *CIRCUIT) == 128 + signal.SIGTERM
    assert asked_of_slurm() == "requeue 4711\n"
    assert checkpoints_in("runs/here") == ["last.ckpt", "previous.ckpt"], "none of Lightning's own"
    assert main([command, *CIRCUIT]) == 0


@pytest.mark.parametrize(("failing", "told"), [(False, ""), (True, "SLURM job 4700_3 could not be queued again: no")])
def test_a_task_of_an_array_is_queued_again_by_itself(
    failing: bool, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, int(failing), stderr="no\n")

    monkeypatch.setattr(subprocess, "run", run)
    for name, value in {"JOB_ID": "4711", "ARRAY_JOB_ID": "4700", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeue_job()
    assert asked == [["scontrol", "requeue", "4700_3"]]
    assert told in caplog.text and bool(caplog.text) == failing


# -- what is written about it


def test_the_commands_of_the_overlays_name_what_there_is() -> None:
    for overlay in sorted((ROOT / "configs/trainer").glob("*.yaml")):
        named = re.findall(r"--config (configs/\S+)", overlay.read_text())
        assert f"configs/trainer/{overlay.name}" in named
        assert all((ROOT / name).is_file() for name in named)
