"""The LightningModule: what a keep step does and counts, what stays frozen, what its checkpoints hold."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.circuits.gates import Sparsity
from pdprune.circuits.pruning import AuditSettings, CircuitPruner, Learning
from pdprune.circuits.schemes import Draws
from pdprune.circuits.selection import Selection
from pdprune.claims.planted.handmade import Puzzle, cancelling_sets, redundant_routes
from pdprune.decomposition import DecomposedModel
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.loaders import StepLoader

LIGHT = Ascent(steps=3, step_size=0.5, restarts=1, draws=2, flips=8)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated


class Data(LightningDataModule):
    """Batches at hand; the train loader counts steps, as that of the tasks does."""

    def __init__(self, batches: list[Any], select: list[Any] | None = None) -> None:
        super().__init__()
        self.batches, self.select = batches, select or batches
        self.loader = StepLoader(lambda step: self.batches[step % len(batches)], len(batches))

    def train_batches(self) -> list[Any]:
        return self.batches

    def select_batches(self) -> list[Any]:
        return self.select

    def train_dataloader(self) -> StepLoader:
        return self.loader

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def trainer(folder: Path, steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=folder, max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def tokens() -> Data:
    return Data([token_batch(6, seed) for seed in range(3)])


def pruner(model: DecomposedModel | None = None, **options: Any) -> CircuitPruner:
    goal = {} if options.keys() & {"target_loss", "target_nodes", "coefficient"} else {"target_loss": 0.05}
    return CircuitPruner(model or token_model(), **({"attack": LIGHT} | goal | options))


class Watch(Callback):
    """Notes the step, the price and the gates after every batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.prices: list[float] = []
        self.gates: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pruner: CircuitPruner, *rest: Any) -> None:
        self.steps.append(pruner.global_step)
        self.prices.append(float(pruner.log_price))
        self.gates.append(pruner.gates())


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
def test_global_step_counts_keep_steps(tmp_path: Path, mode: Any) -> None:
    watch = Watch()
    module = pruner(adversary=TrainingAdversary(mode=mode, steps=3))
    trainer(tmp_path, 7, watch).fit(module, datamodule=tokens())
    assert watch.steps == [1, 2, 3, 4, 5, 6, 7]


def test_only_the_gates_learn(tmp_path: Path) -> None:
    module = pruner(coefficient=1.0)
    before = copy.deepcopy(module.model.state_dict())
    trainer(tmp_path, 5).fit(module, datamodule=tokens())
    after = module.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in module.model.parameters())
    (group,) = module.configure_optimizers().param_groups
    assert len(group["params"]) == 1 and group["params"][0] is module.theta
    assert bool((module.gates() < 1).any())


def learned(tmp_path: Path, puzzle: Puzzle, steps: int, **options: Any) -> tuple[CircuitPruner, Watch]:
    watch = Watch()
    module = pruner(puzzle.model, **options)
    trainer(tmp_path, steps, watch).fit(module, datamodule=Data([puzzle.batch]))
    return module, watch


def test_gates_of_needed_nodes_end_open_and_of_idle_ones_shut(tmp_path: Path) -> None:
    module, _ = learned(tmp_path, cancelling_sets(2, idle=6), 120, target_loss=0.02)
    gates = module.gates()
    assert gates[:5].min() > 0.5 and gates[5:].max() < 0.1


@pytest.mark.parametrize("size", [1, 5])
def test_the_price_leads_to_the_number_of_nodes_asked_for(tmp_path: Path, size: int) -> None:
    module, _ = learned(tmp_path, cancelling_sets(2, idle=6), 150, target_nodes=size)
    assert float(module.gates().sum()) == pytest.approx(size, abs=1.0)


def test_the_price_rises_while_the_loss_has_room_and_falls_while_it_has_none(tmp_path: Path) -> None:
    _, easy = learned(tmp_path, redundant_routes(1, idle=4), 20, target_loss=5.0)
    assert easy.prices == sorted(easy.prices) and easy.prices[-1] > easy.prices[0]
    _, hard = learned(tmp_path, cancelling_sets(3), 20, target_loss=1e-7)
    assert any(later < earlier for earlier, later in itertools.pairwise(hard.prices))


def test_a_fixed_price_does_not_move(tmp_path: Path) -> None:
    _, watch = learned(tmp_path, cancelling_sets(1), 5, coefficient=0.3)
    assert set(watch.prices) == {0.0}


@pytest.mark.parametrize("gate_map", ["leaky_hard", "hard_concrete", "heaviside"])
def test_parameters_stay_where_they_can_come_back_from(tmp_path: Path, gate_map: Any) -> None:
    learning = Learning(gate_map=gate_map, lr=1.0)
    module, watch = learned(tmp_path, cancelling_sets(1), 8, coefficient=50.0, learning=learning)
    low, high = module.gate_map.bounds()
    theta = module.theta.detach()
    assert low - 1e-6 <= float(theta.min()) and float(theta.max()) <= high + 1e-6
    assert all(float(gates.min()) >= 0 and float(gates.max()) <= 1 for gates in watch.gates)


def test_a_kept_nodes_gate_asks_what_would_happen_without_it(tmp_path: Path) -> None:
    """With all gates at 1 the sources of the nodes cannot be seen, and yet needed nodes must be told from idle ones."""
    _, watch = learned(tmp_path, cancelling_sets(1, idle=3), 12, coefficient=0.02)
    assert watch.gates[-1][:3].min() > watch.gates[-1][3:].max()


# -- resuming --------------------------------------------------------------------------------------------------------


class StopAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, pruner: CircuitPruner, *rest: Any) -> None:
        if pruner.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
@pytest.mark.parametrize("gate_map", ["leaky_hard", "hard_concrete"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path, mode: Any, gate_map: Any) -> None:
    def fresh() -> CircuitPruner:
        adversary = TrainingAdversary(mode=mode, steps=2, particles=2, optimizer="adam")
        return pruner(adversary=adversary, learning=Learning(gate_map=gate_map))

    whole = fresh()
    trainer(tmp_path, 9).fit(whole, datamodule=tokens())
    checkpoint = tmp_path / "some.ckpt"
    trainer(tmp_path, 9, StopAt(5, checkpoint)).fit(fresh(), datamodule=tokens())
    resumed, watch = fresh(), Watch()
    trainer(tmp_path, 9, watch).fit(resumed, datamodule=tokens(), ckpt_path=checkpoint, weights_only=False)
    assert watch.steps == [6, 7, 8, 9]
    for name in ("theta", "openness", "log_price"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    assert torch.equal(whole.opponent.sources, resumed.opponent.sources)
    selected, again = whole.select(tokens()), resumed.select(tokens())
    assert torch.equal(selected.keep, again.keep) and selected.loss == again.loss


def saved(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "some.ckpt"
    trainer(tmp_path, 3, StopAt(2, path)).fit(pruner(), datamodule=tokens())
    return torch.load(path, weights_only=False)


def test_checkpoints_hold_gates_and_not_the_target(tmp_path: Path) -> None:
    state = saved(tmp_path)["state_dict"]
    assert not [name for name in state if name.startswith("model.")]
    assert state.keys() >= {"theta", "openness", "log_price", "opponent.sources"}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: pruner(token_model(share=0.8)), "its decomposition is"),
        (lambda: pruner(token_model(("up",))), "its decomposition is"),
        (lambda: pruner(per_position=True), "its gates is"),
        (lambda: pruner(learning=Learning(gate_map="heaviside")), "its gate_map is"),
    ],
    ids=["components", "site", "shape", "map"],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path, other: Any, says: str) -> None:
    checkpoint = saved(tmp_path)
    module = other()
    module.prepare(tokens())
    with pytest.raises(UserError) as error:
        module.on_load_checkpoint(checkpoint)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    module = pruner()
    module.prepare(tokens())
    with pytest.raises(UserError, match="it holds no gates"):
        module.on_load_checkpoint({"state_dict": {}})


def test_selection_is_the_same_whatever_ran_before(tmp_path: Path) -> None:
    module, _ = learned(tmp_path, cancelling_sets(2, idle=3), 60, target_loss=0.02)
    data = Data([cancelling_sets(2, idle=3).batch])
    first = module.select(data)
    torch.rand(7)
    again = module.select(data)
    assert torch.equal(first.keep, again.keep) and first.loss == again.loss
    circuit = module.circuit(task="sets")
    assert circuit.task == "sets" and torch.equal(circuit.keep, first.keep) and circuit.reached is True


# -- refusals --------------------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """The target is finite; with its second input column scaled down it no longer is."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.read.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return (self.read(x) - 2 + 1e-6).log()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    target = Breaks()
    model = DecomposedModel.from_components(target, {"read": (torch.eye(2), target.read.weight.detach().T)})
    module = pruner(model, loss="mse", scheme="complete")
    with pytest.raises(NonFiniteLossError) as error:
        trainer(tmp_path, 20).fit(module, datamodule=Data([torch.ones(4, 2)]))
    assert "NaN or infinite" in str(error.value) and "\n" not in str(error.value)


def test_unknown_gate_maps_are_refused() -> None:
    with pytest.raises(UserError, match="expected one of leaky_hard, hard_concrete, heaviside"):
        Learning(gate_map="sigmoid")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "given", "says"),
    [
        (AuditSettings, {"draws": 0}, "audit: draws: got 0; expected 1 or more"),
        (AuditSettings, {"random_circuits": -1}, "audit: random_circuits: got -1; expected 0 or more"),
        (AuditSettings, {"ladder": (20, 0)}, r"audit: ladder: got \[20, 0\]; expected numbers of steps"),
        (AuditSettings, {"test_ladder": (0,)}, r"audit: test_ladder: got \[0\]; expected numbers of steps"),
        (Learning, {"lr": -1.0}, "learning: lr: got -1.0; expected more than 0"),
        (Learning, {"lr": float("nan")}, "learning: lr: got nan; expected more than 0"),
        (Learning, {"aim": 0.0}, "learning: aim: got 0.0; expected more than 0"),
        (Learning, {"dual_rate": -0.1}, "learning: dual_rate: got -0.1; expected 0 or more"),
        (Selection, {"drop_scores": -1}, "selection: drop_scores: got -1; expected 0 or more"),
        (Sparsity, {"kind": "l2"}, "sparsity: kind is 'l2'; expected l0, lp or smooth_l0"),
        (Sparsity, {"end": 0.0}, "sparsity: end: got 0.0; expected more than 0"),
        (Sparsity, {"annealed_at": 1.5}, "sparsity: annealed_at: got 1.5; expected a share"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_learned(
    settings: Any, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        settings(**given)


@pytest.mark.parametrize(
    "other",
    [
        {"scheme": "stochastic"},
        {"scope": "position"},
        {"norm_scales": "frozen"},
        {"reference": "mean"},
        {"draws": Draws(count=3)},
        {"attack": Ascent(steps=4, step_size=0.5, restarts=1, draws=2, flips=8)},
        {"selection": Selection(drop_scores=3)},
        {"target_loss": 0.07},
        {"seed": 1},
        {"audit": AuditSettings(compute="bfloat16")},
        {"adversary": TrainingAdversary(max_ablated=3)},
        {"loss": "ce"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_journal_is_of_one_selection(other: dict[str, Any]) -> None:
    def journal_of(**options: Any) -> Any:
        module = pruner(normed_model(), search="gradient", **options)
        data = tokens()
        module.prepare(data)
        module.save_journal = lambda: None
        module.select(data)
        return module.journal

    first, again, different = journal_of(), journal_of(), journal_of(**other)
    assert first.about == again.about != different.about
    assert first.answers == again.answers and len(first.answers) > 2


def normed_model() -> DecomposedModel:
    """The language model in small, with a norm that does nothing but be there."""
    model = token_model()
    model.target.drop = nn.LayerNorm(6)  # type: ignore[assignment]
    return DecomposedModel.from_components(model.target, {"down": (torch.eye(6), model.target.down.weight.detach().T)})
