"""Mixed precision: what stays in float32, and how the adversary's gradients are scaled in float16.

There is no GPU here: `torch.amp.GradScaler` and float16 autocast are those of the CPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.test_pruning import tokens
from decomposition.learners import learner
from decomposition.learners import tokens as words
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import as_batch
from pdprune.circuits.audit import audit
from pdprune.circuits.pruning import AuditSettings, CircuitPruner
from pdprune.claims.planted.handmade import by_neuron
from pdprune.decomposition.learning import WarmUp
from pdprune.errors import UserError
from pdprune.precision import LossScale, computing_in, require_float32_parameters
from pdprune.seeding import generator

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


# -- the scale of the ascent's losses


class Faint(nn.Module):
    """Its gradients with respect to what the hidden layer gives out are below what float16 can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(0.5)
            self.second.weight.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def faint_game(scale: LossScale) -> Game:
    inputs = torch.ones(2, 4)
    model = by_neuron(Faint(), ["first"])
    loss = MaskedLoss(model, as_batch(inputs), lambda output, *_: output.float().squeeze(-1) * 1e-9, scale=scale)
    return Game([loss], [torch.zeros(model.n_nodes)])


def test_a_scale_saves_gradients_that_float16_would_lose() -> None:
    entries = torch.full((5,), 0.5)
    _, exact = faint_game(LossScale()).loss_and_gradient(entries)
    with computing_in("float16", torch.device("cpu")):
        _, lost = faint_game(LossScale()).loss_and_gradient(entries)
        _, saved = faint_game(LossScale(scaler(2.0**16))).loss_and_gradient(entries)
    assert bool((exact[:4] > 0).all())
    assert bool((lost == 0).all())
    assert torch.allclose(saved, exact, rtol=1e-2, atol=0)


def test_where_a_gradient_overflows_the_source_stays_and_the_scale_backs_off() -> None:
    scale = LossScale(scaler(4.0))
    assert float(scale.scaled(torch.tensor(3.0))) == 12.0
    assert scale.unscaled(torch.tensor([4.0, 8.0])).tolist() == [1.0, 2.0]
    scale.after_step()
    assert scale.scaler.get_scale() == 4.0
    assert scale.unscaled(torch.tensor([1.0, torch.inf])).tolist() == [0.0, 0.0]
    scale.after_step()
    assert scale.scaler.get_scale() == 2.0
    scale.after_step()
    assert scale.scaler.get_scale() == 2.0


def test_the_scale_backs_off_once_for_the_ascent_and_the_descent_of_a_step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scale = torch.optim.SGD([parameter], lr=1.0), LossScale(scaler(4.0))
    scale.scaled(torch.ones(()))
    scale.unscaled(torch.tensor([torch.nan]))
    parameter.grad = torch.tensor([torch.inf])
    scale.scaler.step(optimizer)
    scale.scaler.update()
    scale.after_step()
    assert scale.scaler.get_scale() == 2.0
    assert float(parameter.detach()) == 1.0, "the step was not skipped"


def test_without_a_scaler_nothing_is_done() -> None:
    scale, gradient = LossScale.of(SimpleNamespace(precision_plugin=SimpleNamespace())), torch.tensor([torch.inf])
    assert scale.scaled(gradient) is gradient and scale.unscaled(gradient) is gradient
    scale.after_step()


# -- trainings


def trained(module: LightningModule, data: Any, folder: Path, steps: int = 12, **options: Any) -> LightningModule:
    Trainer(
        default_root_dir=folder, max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    ).fit(module, datamodule=data)  # fmt: skip
    return module


def in_float16(scale: float) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler(scale))]}


def pruner(mode: Any = "free") -> CircuitPruner:
    return CircuitPruner(token_model(), target_loss=0.05, adversary=TrainingAdversary(mode, step_size=0.2, steps=2))


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, in_float16(2.0**10)], ids=["bfloat16", "float16"])
def test_gates_and_sources_stay_in_float32(options: dict[str, Any], mode: str, tmp_path: Path) -> None:
    module = trained(pruner(mode), tokens(), tmp_path, **options)
    exact = trained(pruner(mode), tokens(), tmp_path)
    state = module.optimizers().optimizer.state[module.theta]
    for value in (module.theta, module.opponent.sources, module.opponent.moments, state["exp_avg"], module.openness):
        assert value.dtype == torch.float32 and bool(torch.isfinite(value).all())
    assert float((module.gates() - exact.gates()).abs().max()) < 0.05
    assert not torch.equal(module.gates(), exact.gates()), "nothing was computed in half precision"


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
def test_scaled_losses_lead_to_the_same_gates_and_sources(mode: str, tmp_path: Path) -> None:
    """In float32, where nothing is lost: every gradient is divided by what its loss was multiplied by."""
    plain = trained(pruner(mode), tokens(), tmp_path)
    plugin = MixedPrecision("16-mixed", "cpu", scaler(2.0**10))
    plugin.autocast_context_manager = lambda: computing_in("float32", torch.device("cpu"))  # type: ignore[method-assign]
    scaled = trained(pruner(mode), tokens(), tmp_path, plugins=[plugin])
    assert torch.allclose(scaled.theta, plain.theta, rtol=0, atol=1e-6)
    assert torch.allclose(scaled.opponent.sources, plain.opponent.sources, rtol=0, atol=1e-6)


def test_components_are_clipped_by_their_unscaled_gradients(tmp_path: Path) -> None:
    norms: dict[float, list[float]] = {}
    for scale in (1.0, 2.0**8):
        module = learner(gradient_clip=1e-3, warm_up=WarmUp(0))
        step, norms[scale] = torch.optim.Adam.step, []

        def watched(self: Any, *args: Any, scale: float = scale, step: Any = step, module: Any = module) -> Any:
            found = step(self, *args)
            norms[scale].append(float(torch.cat([p.grad.flatten() for p in module.learned()]).norm()))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", watched)
            trained(module, words(), tmp_path, 2, **in_float16(scale))
    assert norms[1.0] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert norms[2.0**8] == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_faithfulness_is_summed_in_float32(tmp_path: Path) -> None:
    """In bfloat16 the product of the components would be off by more than they leave over."""
    exact, half = (
        trained(learner(), words(), tmp_path / precision, 3, precision=precision)
        for precision in ("32-true", "bf16-mixed")
    )
    found, wanted = (float(module.trainer.callback_metrics["faithfulness"]) for module in (half, exact))
    assert found == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_halved_parameters_are_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"got '{precision}'; expected 32-true, bf16-mixed or 16-mixed") as refused:
        require_float32_parameters(SimpleNamespace(precision=precision))
    assert "\n" not in str(refused.value)


# -- scores


def test_scores_are_in_float32_unless_told(tmp_path: Path) -> None:
    """Also where training is not: validation happens within its autocast."""
    logged = {}
    asked = {"exact": ("32-true", "float32"), "half": ("bf16-mixed", "float32"), "told": ("bf16-mixed", "bfloat16")}
    for name, (precision, compute) in asked.items():
        module = CircuitPruner(token_model(), target_loss=0.05, audit=AuditSettings(compute=compute))
        data = tokens()
        data.val_dataloader = data.train_dataloader
        (logged[name],) = Trainer(
            accelerator="cpu", precision=precision, logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, inference_mode=False, limit_val_batches=1,
        ).validate(module, datamodule=data, verbose=False)  # fmt: skip
    assert logged["half"] == logged["exact"] != logged["told"]
    with pytest.raises(UserError, match="compute: got 'double'"):
        AuditSettings(compute="double")  # type: ignore[arg-type]


def test_an_audit_within_autocast_is_near_one_in_float32() -> None:
    model, batches = token_model(), [token_batch(8, seed) for seed in range(2)]
    keep = torch.rand(model.n_nodes, generator=generator(0, "keep")) > 0.5
    exact = audit(model, keep, batches)
    with computing_in("bfloat16", torch.device("cpu")):
        half = audit(model, keep, batches)
    assert half.adversarial.loss == pytest.approx(exact.adversarial.loss, rel=0.05)
    assert half.adversarial.loss != exact.adversarial.loss
