"""Several prunings at once: each ends as it would alone, run one by one or as one batch, stopped or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from circuits.networks import token_model
from circuits.test_pruning import LIGHT, Data, StopAt, pruner, tokens, trainer

from pdprune.adversary.opponent import TrainingAdversary
from pdprune.circuits.frontier import FrontierPruner, Levels
from pdprune.circuits.frontier_curve import Frontier, FrontierPoint
from pdprune.circuits.pruning import CircuitPruner, Learning
from pdprune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated

LOSSES = Levels(target_loss=(0.02, 0.1, 0.5))


def frontier(levels: Levels = LOSSES, **options: Any) -> FrontierPruner:
    return FrontierPruner(token_model(), levels, **({"attack": LIGHT} | options))


def learned(folder: Path, module: FrontierPruner, steps: int = 6, data: Data | None = None) -> FrontierPruner:
    trainer(folder, steps).fit(module, datamodule=data or tokens())
    return module


def require_same(level: CircuitPruner, single: CircuitPruner) -> None:
    for name in ("theta", "openness", "log_price"):
        assert torch.equal(getattr(level, name), getattr(single, name)), name
    assert torch.equal(level.opponent.sources, single.opponent.sources)


@pytest.mark.parametrize(
    "options",
    [
        {"adversary": TrainingAdversary(mode="fresh", particles=2)},
        {"adversary": TrainingAdversary(mode="persistent", optimizer="adam"), "scope": "position"},
        {"adversary": TrainingAdversary(mode="free"), "learning": Learning(gate_map="hard_concrete")},
        {"scheme": "stochastic", "reference": "mean", "per_position": True},
        {"scheme": "complete", "reference": "resample", "learning": Learning(gate_map="heaviside")},
    ],
    ids=["fresh", "persistent", "free", "stochastic", "complete"],
)
def test_a_level_ends_bit_for_bit_as_a_run_of_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    levels = Levels(target_loss=(0.02, 0.5), seeds=(0, 3))
    several = learned(tmp_path, frontier(levels, **options))
    several.select(tokens())
    for asked, level in zip(several.asked, several.levels.values(), strict=True):
        single = pruner(target_loss=asked.target_loss, seed=asked.seed, **options)
        trainer(tmp_path, 6).fit(single, datamodule=tokens())
        require_same(level, single)
        single.select(tokens())
        assert level.selected is not None and single.selected is not None
        assert torch.equal(level.selected.keep, single.selected.keep)
        assert level.selected.loss == single.selected.loss


@pytest.mark.parametrize("levels", [Levels(target_nodes=(1, 3, 5)), Levels(coefficient=(0.01, 0.1, 1.0))])
def test_levels_by_size_and_by_price_are_runs_of_their_own_too(tmp_path: Path, levels: Levels) -> None:
    several = learned(tmp_path, frontier(levels))
    for asked, level in zip(several.asked, several.levels.values(), strict=True):
        single = pruner(target_nodes=asked.target_nodes, coefficient=asked.coefficient)
        trainer(tmp_path, 6).fit(single, datamodule=tokens())
        require_same(level, single)


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
@pytest.mark.parametrize("scheme", ["adversarial", "stochastic", "complete"])
def test_as_one_batch_levels_learn_what_they_learn_one_by_one(
    tmp_path: Path, mode: Any, scheme: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversary = TrainingAdversary(mode=mode, particles=2, optimizer="adam", max_ablated=4)
    options = {"adversary": adversary, "scheme": scheme, "reference": "mean"}
    one_by_one = learned(tmp_path, frontier(**options), steps=5)
    sizes = []
    vmap = torch.vmap

    def watched(function: Any, **how: Any) -> Any:
        def run(*stacked: Any) -> Any:
            sizes.append(len(stacked[0]))
            return vmap(function, **how)(*stacked)

        return run

    monkeypatch.setattr("torch.vmap", watched)
    monkeypatch.setattr("pdprune.adversary.objective.how_many_at_once", lambda *_, **__: 64)
    monkeypatch.setattr(FrontierPruner, "_at_once", lambda *_: 2)
    together = learned(tmp_path, frontier(**options), steps=5)
    assert together.model.can_batch and 2 in sizes, "two levels were never one batch"
    for level, other in zip(together.levels.values(), one_by_one.levels.values(), strict=True):
        torch.testing.assert_close(level.gates(), other.gates(), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.log_price, other.log_price, rtol=0, atol=1e-5)
        torch.testing.assert_close(level.opponent.sources, other.opponent.sources, rtol=0, atol=1e-4)


def test_the_target_runs_once_a_batch_for_all_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = frontier(levels=Levels(coefficient=(0.0, 0.1, 0.2, 0.3)), scheme="complete")
    plain = []
    forward = several.model.forward

    def counted(inputs: Any, mask: Any = None, *rest: Any, **others: Any) -> Any:
        plain.append(mask is None)
        return forward(inputs, mask, *rest, **others)

    several.prepare(tokens())
    monkeypatch.setattr(several.model, "forward", counted)
    run = trainer(tmp_path, 3)
    run.log_every_n_steps = 0  # which runs circuits by themselves, to be looked at
    run.fit(several, datamodule=tokens())
    assert plain.count(True) == 3 and plain.count(False) == 4 * 3


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
def test_a_resumed_frontier_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path, mode: Any) -> None:
    def fresh() -> FrontierPruner:
        return frontier(adversary=TrainingAdversary(mode=mode, steps=2, optimizer="adam"))

    whole = learned(tmp_path, fresh(), steps=7)
    checkpoint = tmp_path / "some.ckpt"
    trainer(tmp_path, 7, StopAt(4, checkpoint)).fit(fresh(), datamodule=tokens())
    resumed = fresh()
    trainer(tmp_path, 7).fit(resumed, datamodule=tokens(), ckpt_path=checkpoint, weights_only=True)
    assert resumed.global_step == 7
    for level, other in zip(resumed.levels.values(), whole.levels.values(), strict=True):
        require_same(level, other)


def saved(folder: Path) -> dict[str, Any]:
    path = folder / "some.ckpt"
    trainer(folder, 3, StopAt(2, path)).fit(frontier(), datamodule=tokens())
    return torch.load(path, weights_only=True)


def test_checkpoints_hold_all_gates_and_not_the_target(tmp_path: Path) -> None:
    state = saved(tmp_path)["state_dict"]
    assert {name.split(".")[1] for name in state} == {"0", "1", "2"}
    assert {name.split(".")[2] for name in state} == {"theta", "openness", "log_price", "opponent"}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: frontier(Levels(target_loss=(0.02, 0.1))), "its levels is"),
        (lambda: frontier(per_position=True), "its gates is"),
        (pruner, "its levels is"),
    ],
    ids=["levels", "shape", "single"],
)
def test_a_checkpoint_of_other_levels_is_refused_in_one_line(tmp_path: Path, other: Any, says: str) -> None:
    checkpoint = saved(tmp_path)
    module = other()
    module.prepare(tokens())
    with pytest.raises(UserError) as error:
        module.on_load_checkpoint(checkpoint)
    assert says in str(error.value) and "\n" not in str(error.value)


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ({}, "got none of target_loss, target_nodes, coefficient"),
        ({"target_loss": (0.1,), "target_nodes": (3,)}, "got target_loss and target_nodes of"),
        ({"target_loss": (0.1, 0.2, 0.1)}, "expected each value once"),
        ({"target_loss": (0.1,), "seeds": (1, 1)}, "expected each value once"),
        ({"target_loss": (0.1, -1.0)}, "expected more than 0"),
    ],
)
def test_levels_that_make_no_sense_are_refused_in_one_line(levels: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        frontier(Levels(**levels))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_more_nodes_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 7; expected at most the 6 nodes"):
        learned(tmp_path, frontier(Levels(target_nodes=(3, 7))))


# -- the result ------------------------------------------------------------------------------------------------------


def some_frontier() -> Frontier:
    point = FrontierPoint("target_loss-0.5", 0.5, None, None, 0, 3, True, 0.1, 0.2, 0.4, True)
    return Frontier("sets", "tokens", "kl", "adversarial", 6, 24, 0.0, [point])


def test_a_frontier_comes_back_from_its_file(tmp_path: Path) -> None:
    some_frontier().save(tmp_path)
    assert Frontier.load(tmp_path) == Frontier.load(tmp_path / "frontier.json") == some_frontier()
    header, row = (tmp_path / "frontier.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["level", "target_loss"] and row.startswith("target_loss-0.5,0.5,,,0,3,True,0.1")


@pytest.mark.parametrize("change", [{"schema": "pdprune.frontier/9"}, {"points": [{"level": "a"}]}, {"nodes": 3}])
def test_a_damaged_frontier_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    some_frontier().save(tmp_path)
    file = tmp_path / "frontier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        Frontier.load(tmp_path)
    assert "frontier.json" in str(error.value) and "\n" not in str(error.value)
