"""A circuit of a Hugging Face model for prompts of one's own, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from targets.tiny_models import save_byte_level, save_model

from pdprune.train import main

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PROMPTS = [
    {"prompt": f"{'the ' * (n % 4)}{who} {n}", "answer": answer, "wrong": wrong}
    for n in range(12)
    for who, answer, wrong in (("cat", " sat", " ran"), ("dog", " ran", [" sat", " her"]))
]


@pytest.fixture(autouse=True)
def _material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "folder", "llama")
    save_byte_level(tmp_path / "folder")
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    monkeypatch.chdir(tmp_path)


def run(command: str, *args: str) -> int:
    mine = ("--model.decomposition.target", "./folder", "--data.task", "my.jsonl", "--trainer.max_steps", "12")
    sites = ("--model.decomposition.sites", "['*.down_proj', '*.o_proj']", "--model.target_loss", "0.5")
    return main([command, "--config", str(QUICKSTART), *mine, *sites, *args])


def test_the_quickstart_on_a_folder_and_a_file_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit") == 0
    circuit, audit = (json.loads(Path("runs/quickstart", name).read_text()) for name in ("circuit.json", "audit.json"))
    assert (circuit["target"]["name"], circuit["task"]) == ("folder", "my")
    assert circuit["n_nodes"] == audit["n_nodes"] == 2 * (12 + 8)
    assert circuit["n_kept"] == audit["n_kept"] > 0
    assert {kept["label"].split(":")[0] for kept in circuit["kept"]} <= {
        f"model.layers.{i}.{site}" for i in range(2) for site in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert audit["adversarial"]["loss"] >= max(audit["complete_loss"], audit["model_loss"])
    assert "Loading weights" not in capsys.readouterr().err
    assert run("predict") == 0
    predictions = [json.loads(line) for line in Path("runs/quickstart/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == audit["n_examples"]
    assert {record["target"]["choice"] for record in predictions} <= {" sat", " ran", " her"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--model.decomposition.target nowhere", "nowhere"),
        ("--model.decomposition.basis head", "'model.layers.0.mlp.down_proj' reads something else than the outputs of"),
        ("--data.max_length 2", "expected at most 2"),
    ],
)
def test_bad_input(args: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", *args.split()) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert expected in printed.err
