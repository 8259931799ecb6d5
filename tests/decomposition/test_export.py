from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pdprune import load_decomposition
from pdprune.adversary.attack import Ascent
from pdprune.decomposition.audit import DecompositionChecks
from pdprune.decomposition.export import export
from pdprune.train import main

CONFIG = Path(__file__).parents[2] / "configs" / "decompose" / "dense-py.yaml"
OVERLAY = {
    "trainer": {"max_steps": 2, "limit_val_batches": 0},
    "model": {
        "init_args": {
            "sites": {"*.attn.out": 8},
            "importances": {"d_model": 8, "n_blocks": 1, "n_heads": 2, "hidden": [8]},
            "warm_up": {"steps": 2},
            "audit": {"batches": 1, "attack": {"steps": 1, "restarts": 1}, "ladder": [], "draws": 1},
        }
    },
    "data": {"init_args": {"window": 16, "batch_size": 2}},
}
CHECKS = DecompositionChecks(batches=1, attack=Ascent(steps=1, restarts=1), ladder=[2], draws=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    (folder / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    place = ["--trainer.default_root_dir", str(folder / "run")]
    assert main(["fit", "--config", str(CONFIG), "--config", str(folder / "overlay.yaml"), *place]) == 0
    return folder / "run"


def test_what_ships_loads_and_its_card_compares_as_many_components(run: Path, tmp_path: Path) -> None:
    folder = export(run, [run], tmp_path / "shipped", CHECKS, windows=2)
    learned = load_decomposition(folder)
    assert learned.target_name == "dense-py"
    assert learned.importances is not None
    assert str(run) not in (folder / "config.yaml").read_text()

    card = json.loads((folder / "card.json").read_text())
    own, same, strongest, others, svd, *more = card["rows"]
    assert same["reconstruction"] == own["reconstruction"]
    assert others["reconstruction"] == strongest["reconstruction"]
    for row in (strongest, svd):
        for name, site in row["sites"].items():
            assert site["l0"] == max(1, round(own["sites"][name]["l0"]))
    assert [row["l0"] / svd["l0"] for row in more] == [2, 4]
    # more of the same components, each of them whole, and all of them are the matrix
    assert svd["faithfulness"] < 1e-10
    for row in card["rows"]:
        losses = row["reconstruction"]
        assert losses["complete"] <= losses["adversarial"] <= losses["adversarial_2"]
        assert f"{losses['adversarial_2']:.4f}" in (folder / "card.md").read_text()


def test_a_run_that_learned_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdprune.decomposition import export as module

    monkeypatch.setattr("sys.argv", ["export", str(tmp_path), "--out", str(tmp_path / "out")])
    assert module.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.yaml" in error
    assert not (tmp_path / "out").exists()
