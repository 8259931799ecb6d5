"""Loading targets: the shipped ones as their cards say, and every damaged file refused in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pdprune.errors import UserError
from pdprune.targets import Transformer, TransformerConfig, load_target, save_target, shipped_targets
from pdprune.targets.export import export
from pdprune.targets.language_card import card_text, task_scores
from pdprune.targets.store import SHIPPED, WEIGHTS
from pdprune.targets.training import matrices_of
from pdprune.tasks import TaskData, shipped_tasks

TINY = TransformerConfig(max_length=8, n_layers=1, n_heads=2, d_model=8, d_mlp=8)


def card_of(name: str) -> dict:
    return json.loads((SHIPPED / name / "card.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_target(Transformer(TINY), tmp_path / "tiny")
    return tmp_path / "tiny"


def damage(folder: Path, header: dict[str, str] | None = None, **changed: torch.Tensor | None) -> None:
    """Write the weights again with some tensors replaced, or removed where None is given."""
    path = folder / WEIGHTS
    with open(path, "rb") as file:
        old_header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    state = {**load_file(path), **changed}
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, path, metadata=old_header if header is None else header)


def test_the_targets_ship_in_at_most_six_megabytes() -> None:
    toys = ["induction", "resid_mlp1", "resid_mlp2", "resid_mlp3", "tms_40-10", "tms_5-2"]
    assert shipped_targets() == sorted(["dense-py", "sparse-py", *toys])
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 6_000_000


@pytest.mark.parametrize("name", ["dense-py", "sparse-py"])
def test_a_shipped_target_is_ready_to_be_explained(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert not target.module.training
    assert not any(parameter.requires_grad for parameter in target.module.parameters())
    assert target.module.config.max_length == target.max_length


@pytest.mark.parametrize("name", ["dense-py", "sparse-py"])
@pytest.mark.parametrize("task", shipped_tasks())
def test_scores_are_those_of_the_card(name: str, task: str) -> None:
    promised, got = card_of(name)["tasks"][task], task_scores(load_target(name).module, TaskData(task, name))
    assert got == pytest.approx(promised, abs=0.005)


@pytest.mark.parametrize("name", ["dense-py", "sparse-py"])
def test_the_quote_task_is_solved_and_its_nonsense_twin_is_not(name: str) -> None:
    tasks = card_of(name)["tasks"]
    assert tasks["quote"]["accuracy"] >= 0.95
    assert tasks["quote_nonsense"]["accuracy"] == pytest.approx(0.5, abs=0.1)


def test_the_sparse_target_is_sparse_in_every_matrix() -> None:
    card = card_of("sparse-py")
    assert card["kept_fraction"] <= 1 / 16
    for name, weight in matrices_of(load_target("sparse-py").module).items():
        assert weight.count_nonzero() == card["nonzero_weights"][name]
        assert weight.count_nonzero() <= card["kept_fraction"] * weight.numel()


@pytest.mark.parametrize("name", ["dense-py", "sparse-py"])
def test_the_card_to_read_is_the_card_for_machines(name: str) -> None:
    assert (SHIPPED / name / "card.md").read_text() == card_text(card_of(name))


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="dense-py"):
        load_target("dense_py")


def test_a_saved_target_comes_back(folder: Path) -> None:
    target = load_target(folder)
    assert (target.name, target.max_length) == ("tiny", 8)
    ids = torch.arange(5)[None]
    save_target(target.module, folder.parent / "again")
    torch.testing.assert_close(load_target(folder.parent / "again").module(ids), target.module(ids))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"embed.weight": torch.zeros(3, 8)}, r"embed\.weight has shape \[3, 8\], expected \[128, 8\]"),
        ({"norm.weight": torch.full((8,), float("nan"))}, r"norm\.weight has NaN"),
        ({"norm.weight": None}, r"norm\.weight is missing"),
        ({"extra.weight": torch.zeros(1)}, r"extra\.weight is not a parameter"),
        ({"header": {}}, "header"),
        ({"header": {"pdprune_transformer": '{"n_heads": 3, "d_model": 8}'}}, "n_heads"),
        ({"header": {"pdprune_transformer": '{"n_legs": 3}'}}, "n_legs"),
    ],
)
def test_damaged_weights_are_refused_by_name(folder: Path, changed: dict, named: str) -> None:
    damage(folder, **changed)
    with pytest.raises(UserError, match=named) as refusal:
        load_target(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", None])
def test_a_file_that_is_no_weights_is_refused(folder: Path, content: bytes | None) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_target(folder)


def test_export_asks_for_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export(tmp_path / "run", "name", tmp_path / "out")


@pytest.mark.parametrize("name", shipped_targets())
def test_a_shipped_config_names_no_place_of_the_machine_that_made_it(name: str) -> None:
    config = yaml.safe_load((SHIPPED / name / "config.yaml").read_text())
    assert "default_root_dir" not in config["trainer"] and not config["data"]["init_args"].get("root")
