"""From a config to groups, and from groups to a circuit that keeps them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_circuit import CONFIG, PROMPTS, network

from pdprune import cluster
from pdprune.decomposition import read_clusters
from pdprune.targets.store import save_target
from pdprune.train import main


@pytest.fixture(autouse=True)
def _material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_target(network(), Path("tiny"))
    Path("quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    Path("circuit.yaml").write_text(yaml.safe_dump(CONFIG))


def test_groups_of_a_config_are_the_nodes_of_its_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["circuit.yaml", "groups.json", "--together", "0.8"]) == 0
    groups = read_clusters("groups.json")
    assert all(len(group.components) > 1 for group in groups)
    n_nodes = 24 - sum(len(group.components) - 1 for group in groups)
    assert 1 < n_nodes < 24
    assert f"Wrote {len(groups)} groups" in capsys.readouterr().out
    assert (
        main(
            ["fit", "--config", "circuit.yaml", "--model.decomposition.nodes", "groups.json", "--model.search", "auto"]
        )
        == 0
    )
    circuit = json.loads(Path("runs/circuit/circuit.json").read_text())
    assert circuit["n_nodes"] == n_nodes
    by_label = {group.label: [list(component) for component in group.components] for group in groups}
    kept_groups = [kept for kept in circuit["kept"] if kept["label"] in by_label]
    assert kept_groups
    assert all(kept["components"] == by_label[kept["label"]] for kept in kept_groups)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "nowhere.yaml: cannot be read"),
        ("[", "lacks or garbles"),
        ("trainer: {}", "lacks or garbles 'model'"),
        (CONFIG | {"data": {"class_path": "pdprune.Nothing", "init_args": {}}}, "no class 'pdprune.Nothing'"),
        (CONFIG | {"seed_everything": "${nowhere}"}, "nowhere"),
    ],
)
def test_bad_configs(config: object, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    if config is not None:
        Path("nowhere.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    assert cluster.main(["nowhere.yaml", "groups.json"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert expected in printed.err
    assert not Path("groups.json").exists()


def test_shares_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["circuit.yaml", "groups.json", "--together", "2"]) == 2
    assert "together is 2.0; expected a number from 0 to 1" in capsys.readouterr().err
