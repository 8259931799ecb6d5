"""Auditing a circuit that pdprune did not find, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_circuit import QUICK, write_material

from pdprune import Circuit
from pdprune.compare import main as compare
from pdprune.train import default_run_folder, main

GRAPH = {
    "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {name: {"in_graph": name != "a0.h0"} for name in ("input", "a0.h0", "a0.h1", "m0", "logits")},
    "edges": {"input->a0.h1<v>": {"score": 0.5, "in_graph": True}, "a0.h0->m0": {"score": 0.1, "in_graph": False}},
}


@pytest.fixture(autouse=True)
def _in_a_folder_with_material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_material(tmp_path))
    Path("found.json").write_text(json.dumps(GRAPH))


def test_a_graph_from_elsewhere_is_audited(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *QUICK, "--circuit", "found.json"]) == 0
    printed = capsys.readouterr().out
    assert "found.json keeps 20 of 24 nodes." in printed
    assert "test/adversarial" in printed and "test/faithful" in printed
    folder = Path("runs/circuit-found")
    audit, circuit = (json.loads((folder / name).read_text()) for name in ("audit.json", "circuit.json"))
    assert (audit["n_kept"], audit["held_out"], audit["scheme"]) == (20, True, "imported")
    assert audit["faithful"] is (audit["adversarial"]["loss"] <= 0.05)
    assert audit["adversarial"]["loss"] >= audit["complete_loss"] > audit["model_loss"]
    assert [node["node"] for node in circuit["kept"]] == list(range(4, 24))
    assert circuit["task"] == "quotes" and circuit["config"]["model"]["init_args"]["target_loss"] == 0.05
    assert load_file(folder / "circuit.safetensors")["worst_source"][4:].tolist() == [1.0] * 20

    # As a circuit of ours it can be audited again, and it is the same one.
    again = ["--trainer.default_root_dir", "runs/again"]
    assert main(["test", *QUICK, "--circuit", str(folder / "circuit.json"), *again]) == 0
    assert json.loads(Path("runs/again/audit.json").read_text()) == audit
    assert Circuit.load(folder).compare(Circuit.load("runs/again")).jaccard == 1
    assert compare([str(folder), "runs/again"]) == 0
    assert "elsewhere" in capsys.readouterr().out, "the column says that it was found elsewhere"


def test_a_list_of_nodes_is_audited_and_what_is_odd_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["--model.decomposition.sites", "['*.attn.out']", "--model.decomposition.basis", "head"]
    Path("part.txt").write_text("blocks.0.attn.out:1  # of a head of four\n")
    assert main(["test", *QUICK, *heads, "--circuit", "part.txt"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("part.txt"))
    assert told == (
        "part.txt keeps 1 of 2 nodes. "
        "kept whole, though only a part of their components is named: blocks.0.attn.out:head0"
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--circuit", "nowhere.json"], "nowhere.json"),
        (["--circuit", "quotes.jsonl"], "quotes.jsonl"),
        (["--circuit", "circuit.yaml"], "circuit.yaml:1"),
        (["--circuit", "found.json", "--ckpt_path", "last"], "--circuit and --ckpt_path"),
        (["--circuit", "found.json", "--model.decomposition.sites", "['*.nowhere']"], "*.nowhere"),
    ],
)
def test_wrong_circuits_end_in_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["test", *QUICK, *args]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert says in printed.err
    assert sorted(Path().rglob("*")) == before


def test_only_test_takes_a_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *QUICK, "--circuit", "found.json"]) == 2
    assert "circuit" in capsys.readouterr().err


def test_a_run_with_a_circuit_of_its_own_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    own = Path("runs/own/checkpoints/last.ckpt")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    args = ["test", *QUICK, "--circuit", "found.json", "--trainer.default_root_dir", "runs/own"]
    assert main(args) == 2
    assert "holds a run with a circuit of its own" in capsys.readouterr().err
    assert main([*args, "--overwrite"]) == 0
    assert not own.exists() and Path("runs/own/audit.json").exists() and Path("runs/own/config.yaml").exists()


def test_run_folders_are_named_after_config_and_circuit() -> None:
    args = ["test", "--config", "configs/quickstart.yaml", "--circuit", "graphs/ioi.json"]
    assert default_run_folder(args) == "runs/quickstart-ioi"
