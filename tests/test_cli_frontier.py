"""A frontier through the command line, on a network small enough to audit in a second."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from forking import in_a_child
from killed_endings import attacks_made, dying_at, dying_in_audit, numbers_scored
from tiny_circuit import CONFIG, write_material

from pdprune import Audit, Circuit, Frontier
from pdprune.train import main

FOLDER = Path("runs/frontier")
LEVELS = ["target_loss-0.05", "target_loss-0.2", "target_loss-1.0"]
PARTS = ("frontier.json", "frontier.csv", "frontier.html", "metrics.csv", "config.yaml")
QUICK = {"draws": 2, "random_circuits": 0, "test_ladder": [20], "hypotheses": {"circuits": 0, "points": 2}}

pytestmark = pytest.mark.usefixtures("in_a_copy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a task, and the configs of a frontier and of one of its levels."""
    folder = write_material(tmp_path_factory.mktemp("material"))
    settings = dict(CONFIG["model"]["init_args"], audit=QUICK, selection={"drop_scores": 4})
    del settings["target_loss"]
    for name, class_name, goal in (
        ("frontier", "FrontierPruner", {"levels": {"target_loss": [0.05, 0.2, 1.0]}}),
        ("single", "CircuitPruner", {"target_loss": 0.2}),
    ):
        model = {"class_path": f"pdprune.{class_name}", "init_args": settings | goal}
        config = CONFIG | {"model": model, "trainer": CONFIG["trainer"] | {"max_steps": 12}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(material, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit() == 0
    return folder / FOLDER


def fit(*args: str) -> int:
    return main(["fit", "--config", "frontier.yaml", *args])


def files_of(folder: Path) -> dict[str, bytes]:
    names = [*PARTS, *(f"levels/{level}/{file}" for level in LEVELS for file in ("circuit.json", "audit.json"))]
    return {name: (folder / name).read_bytes() for name in names}


def test_a_frontier_is_its_levels(uninterrupted: Path) -> None:
    frontier = Frontier.load(uninterrupted)
    assert sorted(point.level for point in frontier.points) == LEVELS
    assert [point.n_kept for point in frontier.points] == sorted(point.n_kept for point in frontier.points)
    for point in frontier.points:
        folder = uninterrupted / "levels" / point.level
        circuit, audit = Circuit.load(folder), Audit.load(folder)
        assert point.target_loss == circuit.target_loss and point.n_kept == circuit.n_kept
        assert point.adversarial_loss == audit.adversarial.loss >= point.complete_loss == audit.complete_loss
    logged = (uninterrupted / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"{name}/{level}" for name in ("loss", "kept", "price") for level in LEVELS} <= set(logged)
    page = (uninterrupted / "frontier.html").read_text()
    assert all(f'"level":"{level}"' in page for level in LEVELS)


def test_a_level_is_what_a_single_run_finds(uninterrupted: Path) -> None:
    assert main(["fit", "--config", "single.yaml"]) == 0
    level, single = uninterrupted / "levels" / "target_loss-0.2", Path("runs/single")
    assert (level / "audit.json").read_text() == (single / "audit.json").read_text()
    one, other = (json.loads((folder / "circuit.json").read_text()) for folder in (level, single))
    assert {**one, "config": None} == {**other, "config": None}


def test_killed_at_random_moments_and_resumed(uninterrupted: Path) -> None:
    moments = random.Random(2)
    kills = [in_a_child(lambda: fit("--ckpt_path", "last"), kill_after=moments.uniform(0.5, 4)) for _ in range(5)]
    assert -signal.SIGKILL in kills
    if 0 not in kills:
        assert fit("--ckpt_path", "last") == 0
    assert files_of(FOLDER) == files_of(uninterrupted)


def test_too_weak_an_attack_is_refused_before_anything_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.attack.restarts", "1") == 2
    assert "audit: got 1 restarts" in capsys.readouterr().err and not Path("runs").exists()


def test_a_killed_selection_scores_nothing_twice(uninterrupted: Path, tmp_path: Path) -> None:
    first = numbers_scored(lambda: fit("--trainer.default_root_dir", str(tmp_path / "whole")))
    of_level = [index for index, number in enumerate(first) if number == 1]  # a scorer each
    in_the_second = of_level[1] + 3
    assert in_a_child(lambda: dying_at(in_the_second + 1, fit)) == -signal.SIGKILL
    assert numbers_scored(lambda: fit("--ckpt_path", "last")) == first[in_the_second:]
    assert files_of(FOLDER) == files_of(uninterrupted)


def test_a_killed_audit_makes_no_attack_twice(tmp_path: Path) -> None:
    twice = ("--model.audit.ladder", "[30]")  # two attacks a batch
    whole = tmp_path / "whole"
    all_of_them = attacks_made(lambda: fit(*twice, "--trainer.default_root_dir", str(whole)))
    of_a_level = all_of_them // len(LEVELS)
    assert in_a_child(lambda: dying_in_audit(of_a_level + 2, lambda: fit(*twice))) == -signal.SIGKILL
    assert attacks_made(lambda: fit(*twice, "--ckpt_path", "last")) == all_of_them - of_a_level - 1
    audits = [f"levels/{level}/audit.json" for level in LEVELS]
    assert [(FOLDER / audit).read_bytes() for audit in audits] == [(whole / audit).read_bytes() for audit in audits]


def test_an_audit_that_is_there_is_not_done_again(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(uninterrupted, FOLDER)
    (FOLDER / "checkpoints" / "finished").unlink()
    shutil.rmtree(FOLDER / "levels" / LEVELS[1])
    (FOLDER / "levels" / LEVELS[2] / "audit.json").write_text("{")
    audited = []
    write = "pdprune.circuits.pruning.CircuitPruner.write_audited"
    from pdprune.circuits.pruning import CircuitPruner

    original = CircuitPruner.write_audited

    def counted(self: CircuitPruner, data: object, folder: Path, *rest: object) -> Audit:
        audited.append(folder.name)
        return original(self, data, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(write, counted)
    assert fit("--ckpt_path", "last") == 0
    assert audited == LEVELS[1:]
    assert files_of(FOLDER) == files_of(uninterrupted)


def test_a_finished_frontier_is_refused_and_replaced_on_demand(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted, FOLDER)
    assert fit() == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert fit("--overwrite", "--model.levels.target_loss", "[1.0]", "--trainer.max_steps", "1") == 0
    assert [point.level for point in Frontier.load(FOLDER).points] == ["target_loss-1.0"]
    assert not list(FOLDER.glob(f"levels/{LEVELS[0]}/*"))


def test_validate_test_and_predict_a_finished_frontier(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(uninterrupted, FOLDER)
    assert main(["validate", "--config", "frontier.yaml"]) == 0
    assert "select/adversarial/target_loss-0.2" in capsys.readouterr().out
    assert main(["test", "--config", "frontier.yaml"]) == 0
    longer = Audit.load(FOLDER / "levels" / LEVELS[0])
    assert [rung.steps for rung in longer.adversarial.ladder] == [20]
    capsys.readouterr()
    assert main(["predict", "--config", "frontier.yaml"]) == 2
    told = capsys.readouterr().err
    assert "expected that of a single circuit" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--model.levels.target_loss [0.1,0.1]", "expected each value once"),
        ("--model.levels.target_loss [0.1,x]", "expected float, got 'x'"),
        ("--model.levels.target_nodes [3]", "got target_loss and target_nodes of"),
        ("--model.target_loss 3", "there is no such key"),
        ("--model.shceme complete", "did you mean 'scheme'?"),
        ("--model.scheme adversary", "model.scheme: expected one of"),
    ],
)
def test_bad_input(args: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert fit(*args.split()) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert expected in printed.err
    assert sorted(Path().rglob("*")) == before
