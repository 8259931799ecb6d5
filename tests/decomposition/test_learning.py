"""Learning components: that it finds known ones, what a step changes, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decomposition.learners import features, learner, target, tokens, trainer
from decomposition.small_nets import SITES
from lightning import Callback, Trainer
from torch import Tensor, nn

from pdprune.adversary.game import Game
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.decomposition.attribution import TopK
from pdprune.decomposition.importances import ImportanceSettings
from pdprune.decomposition.learning import (
    ComponentLearner,
    Schedule,
    WarmUp,
    Weights,
    numbers_of_components,
    warm_up,
)
from pdprune.decomposition.minimality import Minimality
from pdprune.decomposition.trainable import faithfulness, trainable
from pdprune.errors import NonFiniteLossError, UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated


class Watch(Callback):
    """Notes what is logged at every step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


# -- known components ------------------------------------------------------------------------------------------------


class Superposition(nn.Module):
    """Five features on the corners of a pentagon, read off and thresholded: each is a component of both matrices."""

    def __init__(self) -> None:
        super().__init__()
        angles = 2 * math.pi * torch.arange(5) / 5
        self.linear1, self.linear2 = nn.Linear(5, 2, bias=False), nn.Linear(2, 5)
        self.linear1.weight.data = 1.13 * torch.stack([angles.cos(), angles.sin()])
        self.linear2.weight.data = self.linear1.weight.data.t().clone()
        self.linear2.bias.data.fill_(-0.35)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear2(self.linear1(x)))


@pytest.mark.parametrize("mode", ["stochastic", "adversarial"])
def test_features_in_superposition_are_recovered(tmp_path: Path, mode: Any) -> None:
    """TMS 5→2 in small; the full figures come from `configs/decompose/tms_5-2.yaml`."""
    module = ComponentLearner(
        Superposition().requires_grad_(False),
        sites={"linear*": 10},
        loss="mse",
        mode=mode,
        importances=ImportanceSettings("component_mlp", hidden=[8]),
        minimality=Minimality(3e-3),
        schedule=Schedule(lr=1e-2),
        warm_up=WarmUp(100),
    )
    run = trainer(tmp_path, 550)
    run.log_every_n_steps = 50
    run.fit(module, datamodule=features(0, 512))
    site = module.model.sites["linear1"]
    components = torch.einsum("ic,co->coi", site.V, site.U).detach()
    wanted = module.model.target.get_parameter("linear1.weight").detach()
    similarity = F.cosine_similarity(components, wanted[None], dim=1).amax(0)
    assert float(similarity.mean()) > 0.95
    last = run.logged_metrics
    assert last["l0"] < 3 and last["alive"] <= 15  # of 20; 5 features in each matrix, each on at 15 % of inputs
    assert last["faithfulness"] < 1e-4


# -- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stochastic", "adversarial", "attribution"])
def test_components_and_importances_learn_and_the_target_does_not(tmp_path: Path, mode: Any) -> None:
    module = learner(mode=mode, weights=Weights(subsets=0.5))
    before = copy.deepcopy(module.state_dict())
    watch = Watch()
    trainer(tmp_path, 3, watch).fit(module, datamodule=tokens())
    after = module.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("model.target."), name
    assert all(parameter.grad is None for parameter in module.model.target.parameters())
    drawn = {"site_by_site", "subsets", "minimality"} if mode != "attribution" else set()
    assert watch.logged[-1].keys() == {"loss", "l0", "alive", "all_sites", "faithfulness"} | drawn


def test_the_loss_is_the_weighted_sum_of_what_is_logged(tmp_path: Path) -> None:
    watch = Watch()
    weights = Weights(faithfulness=3.0, all_sites=0.5, site_by_site=0.25, subsets=2.0)
    module = learner(weights=weights, minimality=Minimality(coefficient=0.1))
    trainer(tmp_path, 2, watch).fit(module, datamodule=tokens())
    for row in watch.logged:
        parts = 3 * row["faithfulness"] + 0.5 * row["all_sites"] + 0.25 * row["site_by_site"] + 2 * row["subsets"]
        assert row["loss"] == pytest.approx(parts + 0.1 * row["minimality"], rel=1e-5)


def test_modes_differ_in_the_reconstruction_at_all_sites_alone(tmp_path: Path) -> None:
    first = {}
    for mode in ("stochastic", "adversarial"):
        watch = Watch()
        trainer(tmp_path, 1, watch).fit(learner(mode=mode, weights=Weights(subsets=1.0)), datamodule=tokens())
        first[mode] = watch.logged[0]
    for name in ("faithfulness", "site_by_site", "subsets", "minimality"):
        assert first["stochastic"][name] == first["adversarial"][name]
    assert first["stochastic"]["all_sites"] != first["adversarial"]["all_sites"]


def test_the_adversary_is_at_least_as_bad_as_complete_ablation() -> None:
    module = learner(mode="adversarial", adversary=TrainingAdversary(mode="fresh", steps=2), scope="position")
    module.setup("fit")
    seen = module.look(tokens().loader.batch_at(0), 0)
    game = Game([seen.loss], [seen.gates.detach()], "position")
    chosen = module.opponent.choose(game, 0)
    with torch.no_grad():
        assert float(game.loss(chosen)) >= float(game.loss(game.corner(0.0)))


def test_a_batch_takes_one_run_of_the_target_and_one_for_each_masked_forward(tmp_path: Path) -> None:
    module, runs = learner(warm_up=WarmUp(0)), []
    module.model.target.register_forward_hook(lambda *_: runs.append(1))
    trainer(tmp_path, 1).fit(module, datamodule=tokens())
    assert len(runs) == 1 + 1 + len(SITES)


def test_all_outputs_count_whatever_a_task_scores() -> None:
    raw = {"inputs": torch.zeros(2, 4, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    raw["positions"] = torch.tensor([1, 3])
    seen = learner().look(raw, 0)
    assert seen.loss.batch.positions is None and seen.gates.shape[:2] == (2, 4)


def test_warm_up_is_on_faithfulness_alone() -> None:
    model = trainable(target(), dict.fromkeys(SITES, 6))
    before = float(faithfulness(model).detach())
    warm_up(model, WarmUp(100, lr=0.02))
    assert float(faithfulness(model).detach()) < 0.05 * before


def test_gradients_are_clipped(tmp_path: Path) -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: ComponentLearner, *rest: Any) -> None:
            gradients = [parameter.grad for parameter in module.learned() if parameter.grad is not None]
            norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    trainer(tmp_path, 2, Norm()).fit(learner(gradient_clip=1e-3), datamodule=tokens())
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_the_learning_rate_rises_and_falls_along_a_cosine(tmp_path: Path) -> None:
    schedule = Schedule(lr=2.0, warm_up=0.2, final=0.1)
    rates = [schedule.at(step, 100) for step in range(100)]
    assert rates[0] < 0.2 and max(rates) == rates[20] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates[99] == pytest.approx(0.2, rel=0.01)
    assert {Schedule(lr=0.3, final=1.0).at(step, 10) for step in range(10)} == {0.3}
    module = learner(schedule=Schedule(lr=0.3, final=1.0))
    trainer(tmp_path, 1).fit(module, datamodule=tokens())
    assert module.optimizers().param_groups[0]["lr"] == 0.3


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    module = learner(warm_up=WarmUp(0))
    with torch.no_grad():
        module.model.sites["mix"].U.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError):
        trainer(tmp_path, 1).fit(module, datamodule=tokens())


# -- resuming --------------------------------------------------------------------------------------------------------


class StopAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, module: ComponentLearner, *rest: Any) -> None:
        if module.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


WAYS: dict[str, dict[str, Any]] = {
    "stochastic": {"weights": Weights(subsets=1.0)},
    "fresh": {"mode": "adversarial", "adversary": TrainingAdversary(mode="fresh", steps=2)},
    "persistent": {
        "mode": "adversarial",
        "adversary": TrainingAdversary(mode="persistent", steps=2, particles=2, optimizer="adam"),
    },
    "by position": {"mode": "adversarial", "scope": "position"},
    "by token": {"mode": "adversarial", "scope": "example_position"},
    "free": {"mode": "adversarial", "adversary": TrainingAdversary(mode="free", particles=2)},
    "attribution": {"mode": "attribution", "top_k": TopK(2.0, directions=2)},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path, way: str) -> None:
    whole = learner(**WAYS[way])
    trainer(tmp_path, 5).fit(whole, datamodule=tokens())
    path = tmp_path / "some.ckpt"
    trainer(tmp_path, 5, StopAt(3, path)).fit(learner(**WAYS[way]), datamodule=tokens())
    resumed = learner(**WAYS[way])
    trainer(tmp_path, 5).fit(resumed, datamodule=tokens(), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoints_leave_the_target_out(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    trainer(tmp_path, 2, StopAt(1, path)).fit(learner(), datamodule=tokens())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert not [name for name in state if name.startswith("model.target.")]
    assert len([name for name in state if name.startswith("model.site_list.")]) == 2 * len(SITES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sites": {"*": 3}}, "its components is"),
        ({"importances": ImportanceSettings(hidden=[5])}, "its importances is"),
        ({"mode": "attribution"}, "its importances is"),
        ({"mode": "adversarial", "scope": "position"}, "its sources is"),
    ],
)
def test_checkpoints_of_other_settings_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    path = tmp_path / "some.ckpt"
    trainer(tmp_path, 2, StopAt(1, path)).fit(learner(), datamodule=tokens())
    with pytest.raises(UserError, match=says):
        trainer(tmp_path, 2).fit(learner(**options), datamodule=tokens(), ckpt_path=path, weights_only=True)


# -- settings --------------------------------------------------------------------------------------------------------


def test_the_last_pattern_that_matches_counts() -> None:
    assert numbers_of_components(target(), {"*": 3, "*p": 4, "up": 5}) == {
        "embed": 3, "mix": 3, "up": 5, "down": 3, "unembed": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "adverse"}, "mode: got 'adverse'; expected one of stochastic, adversarial, attribution"),
        ({"loss": "l1"}, "loss: got 'l1'"),
        ({"gradient_clip": 0.0}, "gradient_clip: got 0.0"),
        (
            {"mode": "adversarial", "weights": Weights(all_sites=0.0)},
            "all_sites is 0; expected more in mode adversarial",
        ),
        ({"sites": {"mlp.*": 3}}, "site pattern 'mlp.*' matches nothing"),
        ({"sites": {}}, "no site pattern given"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner(**options)


@pytest.mark.parametrize("kind", [{"lr": 0.0}, {"warm_up": 1.0}, {"final": 2.0}])
def test_schedules_without_meaning_are_refused(kind: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected lr above 0"):
        Schedule(**kind)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(UserError, match="subsets is -1"):
        Weights(subsets=-1)
