"""The checks of a learned decomposition: of what is saved, and against what is known of the toy networks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition.learners import Data, features, learner, tokens, trainer
from torch import Tensor

from pdprune.adversary.attack import Ascent
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.audit import DecompositionChecks, audit_decomposition, held_out, known_answers
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings
from pdprune.decomposition.learning import ComponentLearner
from pdprune.decomposition.saved import read_decomposition
from pdprune.errors import UserError
from pdprune.loaders import FixedLoader
from pdprune.targets import TMS, TMSConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated

CHECKS = DecompositionChecks(batches=2, attack=Ascent(steps=2, restarts=1, draws=2, flips=2), ladder=[4], draws=2)


class WithHeldOut(Data):
    def held_out_batches(self) -> list[Any]:
        return [self.loader.batch_at(1000 + index) for index in range(3)]


def finished(folder: Path, **options: Any) -> dict[str, Any]:
    """What a short run leaves in its folder."""
    module = learner(audit=CHECKS, **options)
    data = WithHeldOut(tokens().loader.batch_at)
    trainer(folder, 2).fit(module, datamodule=data)
    module.finish(data, folder)
    return json.loads((folder / "decomposition_audit.json").read_text())


@pytest.mark.parametrize("mode", ["stochastic", "adversarial", "attribution"])
def test_what_is_written_is_what_was_checked(tmp_path: Path, mode: Any) -> None:
    found = finished(tmp_path, mode=mode)
    model = read_decomposition(tmp_path / "decomposition", learner().model.target)
    assert found["mode"] == mode and found["steps"] == 2 and found["n_examples"] == 6 and found["batch_size"] == 3
    assert found["n_components"] == model.n_nodes == sum(site["n_components"] for site in found["sites"].values())
    assert found["alive"] == sum(site["alive"] for site in found["sites"].values())
    assert 0 <= found["l0"] <= found["alive"] <= found["n_components"]
    losses = found["reconstruction"]
    assert 0 <= losses["complete"] <= losses["adversarial"] <= losses["adversarial_4"]
    assert losses["stochastic"] <= losses["adversarial"] and losses["ablated"] > 0
    assert found["known_answers"] is None
    assert (model.importances is None) == (mode == "attribution")


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    names = ("decomposition_audit.json", "decomposition/decomposition.json", "decomposition/decomposition.safetensors")
    for run in ("a", "b"):
        finished(tmp_path / run)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_halved_it_is_checked_as_rounded(tmp_path: Path) -> None:
    whole, half = finished(tmp_path / "whole"), finished(tmp_path / "half", save_as="bfloat16")
    sizes = [
        (tmp_path / run / "decomposition" / "decomposition.safetensors").stat().st_size for run in ("whole", "half")
    ]
    assert sizes[1] < sizes[0]
    assert whole["faithfulness"] != half["faithfulness"]
    assert whole["faithfulness"] == pytest.approx(half["faithfulness"], rel=0.05)


# -- known answers ---------------------------------------------------------------------------------------------------


def perfect_tms(scale: float = 1.0) -> DecomposedModel:
    """Each feature a component of both matrices, and as many that do nothing."""
    target = TMS(TMSConfig(5, 2))
    angles = 2 * math.pi * torch.arange(5) / 5
    directions = torch.stack([angles.cos(), angles.sin()])
    target.linear1.weight.data = directions.clone()
    target.linear2.weight.data = directions.t().clone()
    idle = torch.zeros(5, 5)
    inward = (torch.cat([scale * torch.eye(5), idle], 1), torch.cat([directions.t(), torch.zeros(5, 2)]))
    outward = (torch.cat([directions, torch.zeros(2, 5)], 1), torch.cat([scale * torch.eye(5), idle]))
    model = DecomposedModel.from_components(target, {"linear1": inward, "linear2": outward})
    model.importances = CausalImportances(model.sites, ImportanceSettings("component_mlp", hidden=[]))
    for function in model.importances.functions.values():
        layer = function.layers[0]
        torch.nn.init.constant_(layer.W, 10.0)  # whatever is read at all matters
        torch.nn.init.zeros_(layer.b)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_known_decomposition_of_superposition_is_told(scale: float) -> None:
    model = perfect_tms(scale)
    found = known_answers(model.target, model)
    assert found is not None
    for name in ("linear1", "linear2"):
        assert found[name]["mean_max_cosine_similarity"] == pytest.approx(1, abs=1e-5)
        assert found[name]["of_alive"]["mean_max_cosine_similarity"] == pytest.approx(1, abs=1e-5)
        assert found[name]["of_alive"]["mean_l2_ratio"] == pytest.approx(scale, abs=1e-5)
    assert found["linear1"]["one_to_one"] == 1 and found["linear1"]["errors"] == 0


def test_of_a_perfect_decomposition_nothing_is_left_over() -> None:
    model = perfect_tms()
    found = audit_decomposition(
        model, lambda batch, index: torch.ones(64, 20), [features(0, 64).loader.batch_at(0)], "mse", CHECKS, seed=0
    )
    assert found["faithfulness"] == pytest.approx(0, abs=1e-12)
    assert found["l0"] == found["alive"] == 20
    assert found["reconstruction"]["adversarial"] == pytest.approx(0, abs=1e-10)
    assert found["reconstruction"]["ablated"] > 1e-3
    assert found["sites"]["linear1"]["left_over"] == pytest.approx(0, abs=1e-6)


# -- data and settings -----------------------------------------------------------------------------------------------


class ValidationOnly(Data):
    def val_dataloader(self) -> FixedLoader:
        return FixedLoader([torch.zeros(2, 5), torch.ones(2, 5)])


def test_the_validation_data_stand_in_for_held_out_ones() -> None:
    def batch_at(step: int) -> Tensor:
        return torch.zeros(2, 5)

    assert len(held_out(ValidationOnly(batch_at), 5)) == 2
    assert len(held_out(WithHeldOut(batch_at), 2)) == 2
    with pytest.raises(UserError, match="no held-out batches"):
        held_out(Data(batch_at), 1)


@pytest.mark.parametrize(
    ("change", "message"), [({"batches": 0}, "batches is 0"), ({"ladder": [10]}, "expected numbers that rise from 20")]
)
def test_checks_without_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecompositionChecks(**change)


def test_other_types_to_save_as_are_refused() -> None:
    with pytest.raises(UserError, match="save_as: got 'int8'"):
        ComponentLearner(TMS(TMSConfig(5, 2)), {"*": 3}, save_as="int8")  # type: ignore[arg-type]
