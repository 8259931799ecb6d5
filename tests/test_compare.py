"""The quickstart's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdprune.circuits.circuit import Circuit, Fingerprint
from pdprune.circuits.findings import Adversarial, Audit, Score, Stochastic, TaskScores
from pdprune.compare import main
from pdprune.decomposition import Node

CIRCUIT = Circuit(
    keep=torch.tensor([True, False, False]),
    gates=torch.tensor([1.0, 0.0, 0.0]),
    nodes={0: Node((("down", 0),), "down:0")},
    target=Fingerprint("tiny", "a" * 64),
    decomposition=Fingerprint("3 nodes in 1 sites", "b" * 64),
    task="quote",
)
AUDIT = Audit(
    n_nodes=3,
    n_kept=1,
    loss="kl",
    scheme="complete",
    reference="zero",
    scope="batch",
    n_examples=1024,
    batch_size=256,
    held_out=True,
    seed=0,
    model_loss=0.0,
    complete_loss=0.0125,
    stochastic=Stochastic(0.25, 0.5, 0.75, 100),
    adversarial=Adversarial(6.125, 6.0, None, 7.0, 0.5, 20, 0.1, 4, 2.0, [], None),
    complement_loss=1.0,
    random_circuits=None,
    task=TaskScores(Score(0.098, 1.0), Score(0.011, 1.0), Score(0.192, 0.9), Score(6.375, 0.1)),
    beats_model=True,
    target_loss=0.1,
    faithful=False,
)


def write_run(name: str, audit: Audit, circuit: Circuit = CIRCUIT) -> None:
    circuit.save(Path(name))
    audit.save(Path(name))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def test_table_holds_every_figure_in_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("complete", AUDIT)
    attacked = replace(AUDIT.adversarial, loss=0.0625)
    write_run("adversarial", replace(AUDIT, scheme="adversarial", n_kept=2, adversarial=attacked, faithful=True))
    assert main(["complete", "adversarial"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = {" ".join(line.split()[:-3]): line.split()[-3:] for line in printed.splitlines()}
    assert rows["nodes kept of 3"] == ["3", "1", "2"]
    assert rows["KL, rest ablated"] == ["0.000", "0.013", "0.013"]
    assert rows["KL, rest at random"] == ["0.000", "0.250", "0.250"]
    assert rows["KL, rest by adversary"] == ["0.000", "6.125", "0.062"]
    assert rows["task CE, rest ablated"] == ["0.098", "0.011", "0.011"]
    assert "task quote" in printed.lower() and "1,024 held-out prompts" in printed
    verdict = next(line for line in printed.splitlines() if "faithful" in line)
    assert verdict.split()[-2:] == ["no", "yes"]


def test_runs_of_different_things_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("one", AUDIT)
    write_run("two", AUDIT, replace(CIRCUIT, task="bracket"))
    assert main(["one", "two"]) == 2
    assert "differ in task (quote and bracket)" in capsys.readouterr().err


def test_a_folder_without_results_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pdprune: error: ") and error.count("\n") == 1
    assert main([]) == 2
