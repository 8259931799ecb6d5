"""Several ranks are one process: batches, reductions, and whole trainings on two ranks against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from decomposition.learners import learner
from decomposition.small_nets import VOCAB
from forking import on_ranks
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor

from pdprune.adversary.opponent import TrainingAdversary
from pdprune.circuits.frontier import FrontierPruner, Levels
from pdprune.circuits.pruning import CircuitPruner, Learning
from pdprune.circuits.schemes import Draws
from pdprune.decomposition.attribution import TopK
from pdprune.decomposition.learning import Weights
from pdprune.decomposition.minimality import Minimality
from pdprune.errors import UserError
from pdprune.loaders import StepLoader
from pdprune.ranks import ALONE, Ranks, require_whole_model
from pdprune.seeding import generator
from pdprune.targets import TMS, TargetTrainer, TMSConfig, TransformerConfig
from pdprune.targets.toy_training import ToyTrainer
from pdprune.targets.training import WeightSparsity

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own uses of what is deprecated

STEPS = {"fresh": 50, "persistent": 50, "free": 50}
"""Of the trainings with these names; the others are shorter."""
FEW_STEPS = 8
EXAMPLES = 7
"""Of a batch, an odd number: shares are of different sizes."""


# -- batches


def test_shares_are_every_nth_example_wherever_tensors_are() -> None:
    whole = {"inputs": (torch.arange(7), torch.arange(14).view(7, 2)), "name": "words"}
    assert ALONE.share(whole) is whole
    shares = [Ranks(rank, 3).share(whole) for rank in range(3)]
    assert [share["inputs"][0].tolist() for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares[1]["inputs"][1].tolist() == [[2, 3], [8, 9]]
    assert {share["name"] for share in shares} == {"words"}
    assert Ranks(1, 2).share(torch.arange(6).view(2, 3), dim=1).tolist() == [[1], [4]]


def test_every_rank_needs_an_example() -> None:
    with pytest.raises(UserError, match="3 examples over 4 processes"):
        Ranks(0, 4).share(torch.zeros(3))


def test_one_process_reduces_nothing() -> None:
    value = torch.rand(3)
    for reduced in (
        ALONE.mean(value, 4),
        ALONE.sum(value),
        ALONE.largest(value),
        ALONE.gather(value),
        ALONE.any(value),
    ):
        assert reduced is value


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_split_a_model_are_refused(strategy: Any) -> None:
    with pytest.raises(UserError, match=f"got {type(strategy).__name__}, which splits parameters") as refused:
        require_whole_model(SimpleNamespace(strategy=strategy))
    assert "\n" not in str(refused.value)
    for allowed in (DDPStrategy(), SingleDeviceStrategy()):
        require_whole_model(SimpleNamespace(strategy=allowed))


# -- reductions


class Reductions(LightningModule):
    """Reduces what is known of each rank; the gradients of its two weights are learned by."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.found: dict[str, Tensor] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)

    def training_step(self, batch: Tensor, index: int) -> None:
        ranks = Ranks.of(self.trainer)
        own = ranks.share(batch)
        loss = ranks.mean((own[:, None] * self.weight).mean(0), len(own))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss.square().sum())
        optimizer.step()
        self.found = {
            "loss": loss.detach(),
            "gradient": self.weight.grad.clone(),
            "sum": ranks.sum(own.sum()),
            "largest": ranks.largest(torch.tensor([own.max(), -own.min()])),
            "any": ranks.any(own[:2] > batch[-1] - 0.5),
            "gathered": ranks.gather({"x": own})["x"],
            "of flags": ranks.gather(own > 2),
            "first": ranks.of_first(own[:1]),
            "nothing": ranks.mean(torch.zeros(1), torch.tensor(0.0)),
        }


class OneBatch(LightningDataModule):
    """The same batch, whole, for every rank."""

    def train_dataloader(self) -> StepLoader:
        return StepLoader(lambda step: torch.arange(7.0), 1)


def test_reductions_of_shares_are_those_of_the_whole(tmp_path: Path) -> None:
    fit = fitting(tmp_path, {"reductions": Reductions}, OneBatch, lambda module: module.found)
    found = on_two_ranks_and_one(tmp_path, fit)["reductions"]
    for rank in found.ranks:
        assert rank.keys() == found.one.keys()
        for name, value in found.one.items():
            if name != "any":
                assert torch.allclose(rank[name].to(value), value), name
        assert rank["any"].tolist() == [False, False]


# -- trainings


class Recorded(Callback):
    """Notes every source that the adversary chooses."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        opponent: Any = getattr(module, "opponent", None)
        if opponent is None:
            return
        choose = opponent.choose

        def noted(*args: Any) -> Tensor:
            self.chosen.append(choose(*args))
            return self.chosen[-1]

        opponent.choose = noted


class Both(SimpleNamespace):
    """What one process found, `one`, and what each of two ranks did, `ranks`."""


def fitting(
    folder: Path,
    modules: Mapping[str, Callable[[], LightningModule]],
    data: Callable[[], LightningDataModule],
    results: Callable[[LightningModule], dict[str, Tensor]],
) -> Callable[[int], int]:
    """A function of the number of ranks that trains modules one after another and writes what this rank finds."""

    def fit(count: int) -> int:
        for name, make in modules.items():
            recorded, module = Recorded(), make()
            trainer = Trainer(
                accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto",
                max_steps=STEPS.get(name, FEW_STEPS),
                max_epochs=-1, callbacks=[recorded], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                log_every_n_steps=4, inference_mode=False, default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(module, datamodule=data())
            found = {key: value.detach().clone() for key, value in results(module).items()}
            if recorded.chosen:
                found["chosen"] = torch.stack(recorded.chosen)
            logged = {f"logged {key}": value for key, value in trainer.callback_metrics.items()}
            torch.save(found | logged, folder / f"{name}-{trainer.global_rank}-of-{count}.pt")
        return 0

    return fit


def on_two_ranks_and_one(folder: Path, fit: Callable[[int], int]) -> dict[str, Both]:
    assert on_ranks(2, lambda: fit(2)) == [0, 0]
    assert fit(1) == 0

    def found(path: Path) -> Any:
        return torch.load(path, weights_only=True)

    names = [path.name.removesuffix("-0-of-1.pt") for path in folder.glob("*-0-of-1.pt")]
    return {
        name: Both(
            one=found(folder / f"{name}-0-of-1.pt"),
            ranks=[found(folder / f"{name}-{rank}-of-2.pt") for rank in range(2)],
        )
        for name in names
    }


def learned(module: LightningModule) -> dict[str, Tensor]:
    frozen = ("model.target.", "decomposition.")
    kept = {key: value for key, value in module.state_dict().items() if not key.startswith(frozen)}
    return {key: value for key, value in kept.items() if ".model." not in key}


class Shared(LightningDataModule):
    """Batches that follow from the step, of which each rank takes its share."""

    def __init__(self, batch_at: Callable[[int], Any]) -> None:
        super().__init__()
        self.batch_at = batch_at

    def train_batches(self) -> list[Any]:
        return [self.batch_at(step) for step in range(3)]

    select_batches = train_batches

    def train_dataloader(self) -> StepLoader:
        ranks = Ranks.of(self.trainer)
        return StepLoader(lambda step: ranks.share(self.batch_at(step)), 10)


def prompts(step: int) -> dict[str, Any]:
    return token_batch(EXAMPLES, step % 3)


def texts(step: int) -> dict[str, Any]:
    """Tokens with padding: what is averaged over differs from example to example, and from rank to rank."""
    rng = generator(0, "texts", step)
    length = torch.randint(1, 5, (EXAMPLES, 1), generator=rng)
    ids = torch.randint(0, VOCAB, (EXAMPLES, 4), generator=rng)
    return {"inputs": {"input_ids": ids, "attention_mask": (torch.arange(4) < length).long()}}


def pruner(**options: Any) -> CircuitPruner:
    goal = {} if options.keys() & {"target_nodes", "coefficient"} else {"target_loss": 0.05}
    return CircuitPruner(token_model(("up", "down")), **(goal | options))


def played(mode: Any, **settings: Any) -> TrainingAdversary:
    return TrainingAdversary(mode=mode, **settings)


CIRCUITS: dict[str, dict[str, Any]] = {
    "fresh": {"adversary": played("fresh", steps=3)},
    "persistent": {"adversary": played("persistent", steps=2, step_size=0.2)},
    "free": {"adversary": played("free", step_size=0.2, particles=2)},
    "fresh, Adam": {"adversary": played("fresh", steps=3, particles=2, optimizer="adam"), "loss": "ce"},
    "persistent, by position": {"scope": "position", "adversary": played("persistent", steps=2, step_size=0.2)},
    "free, Adam, universal": {"scope": "universal", "adversary": played("free", step_size=0.1, optimizer="adam")},
    "fresh, by example": {"scope": "example"},
    "stochastic": {"scheme": "stochastic", "target_nodes": 4, "learning": Learning(gate_map="hard_concrete", lr=0.1)},
    "stochastic, by token": {
        "scheme": "stochastic", "scope": "example_position", "draws": Draws("bernoulli"), "coefficient": 0.05,
    },
    "complete": {"scheme": "complete", "reference": "mean", "per_position": True, "coefficient": 0.05},
    "resampled": {"reference": "resample"},
}  # fmt: skip


@pytest.fixture(scope="module")
def circuits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    folder = tmp_path_factory.mktemp("circuits")
    made = {name: lambda options=options: pruner(**options) for name, options in CIRCUITS.items()}
    return on_two_ranks_and_one(folder, fitting(folder, made, lambda: Shared(prompts), learned))


@pytest.mark.parametrize("name", CIRCUITS)
def test_circuits_are_those_of_one_process(name: str, circuits: dict[str, Both]) -> None:
    assert_two_ranks_are_one(circuits[name], {"theta", "openness", "log_price", "logged loss"})


FRONTIERS: dict[str, dict[str, Any]] = {
    "fresh": {"adversary": played("fresh", steps=3)},
    "persistent": {"adversary": played("persistent", steps=2, step_size=0.2)},
    "free": {"adversary": played("free", step_size=0.2)},
}
LEVELS = Levels(target_loss=(0.05, 0.1))


@pytest.fixture(scope="module", params=[1, 2], ids=["one by one", "as one batch"])
def frontiers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Both]]:
    folder = tmp_path_factory.mktemp("frontiers")
    model = token_model(("up", "down"))
    made = {
        name: lambda options=options: FrontierPruner(model, LEVELS, **options) for name, options in FRONTIERS.items()
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FrontierPruner, "_at_once", lambda *_: request.param)
        yield on_two_ranks_and_one(folder, fitting(folder, made, lambda: Shared(prompts), learned))


@pytest.mark.parametrize("name", FRONTIERS)
def test_frontiers_are_those_of_one_process(name: str, frontiers: dict[str, Both]) -> None:
    found = frontiers[name]
    assert not torch.equal(found.one["pruners.0.theta"], found.one["pruners.1.theta"])
    assert_two_ranks_are_one(found, {"pruners.1.theta", "pruners.1.openness", "logged loss"})


ADVERSARIAL = Weights(site_by_site=0.0)
COMPONENTS: dict[str, dict[str, Any]] = {
    "fresh": {"mode": "adversarial", "adversary": played("fresh", steps=1, step_size=0.5), "weights": ADVERSARIAL},
    "persistent": {
        "mode": "adversarial",
        "adversary": played("persistent", steps=2, step_size=0.1),
        "weights": ADVERSARIAL,
    },
    "free": {"mode": "adversarial", "adversary": played("free", step_size=0.1), "weights": ADVERSARIAL},
    "fresh, by token": {"mode": "adversarial", "adversary": played("fresh", steps=2), "scope": "example_position"},
    "stochastic": {"mode": "stochastic", "weights": Weights(subsets=0.5), "gradient_clip": 0.1},
    "by attribution": {"mode": "attribution", "top_k": TopK(directions=3)},
}


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    folder = tmp_path_factory.mktemp("components")
    made = {
        name: lambda options=options: learner(minimality=Minimality(1e-2, frequency=1.0), **options)
        for name, options in COMPONENTS.items()
    }
    return on_two_ranks_and_one(folder, fitting(folder, made, lambda: Shared(texts), learned))


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_those_of_one_process(name: str, components: dict[str, Both]) -> None:
    always = {"model.site_list.1._V", "model.site_list.4.U", "logged loss", "logged l0", "logged alive"}
    assert_two_ranks_are_one(components[name], always)


def windows(step: int) -> dict[str, Any]:
    ids = torch.randint(0, 9, (EXAMPLES, 5), generator=generator(0, "windows", step))
    return {"inputs": {"input_ids": ids[:, :-1]}, "labels": ids[:, 1:]}


def features(step: int) -> dict[str, Any]:
    return {"inputs": torch.rand(EXAMPLES, 5, generator=generator(0, "features", step))}


def language_model() -> TargetTrainer:
    torch.manual_seed(0)
    sizes = TransformerConfig(vocab_size=9, max_length=4, n_layers=1, n_heads=2, d_model=4, d_mlp=6)
    return TargetTrainer(sizes, WeightSparsity(0.5))


def toy() -> ToyTrainer:
    torch.manual_seed(0)
    return ToyTrainer(TMS(TMSConfig(5, 2)))


@pytest.mark.parametrize(("make", "batch_at"), [(language_model, windows), (toy, features)])
def test_targets_are_those_of_one_process(make: Any, batch_at: Any, tmp_path: Path) -> None:
    fit = fitting(tmp_path, {"target": make}, lambda: Shared(batch_at), learned)
    assert_two_ranks_are_one(on_two_ranks_and_one(tmp_path, fit)["target"], {"logged train_loss"})


def assert_two_ranks_are_one(found: Both, among: set[str]) -> None:
    """Ranks hold the same bits of all that is shared, and what one process does, to 1e-6."""
    first, second = found.ranks
    assert among <= found.one.keys() == first.keys() == second.keys()
    own_examples = found.one.get("chosen", torch.zeros(0)).shape[1:2] == (EXAMPLES,)
    for name, value in found.one.items():
        if name == "chosen" and own_examples:
            whole = torch.empty_like(value)
            whole[:, 0::2], whole[:, 1::2] = first[name], second[name]
            assert torch.allclose(whole, value, rtol=0, atol=1e-6), name
            continue
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        assert torch.allclose(first[name], value, rtol=1e-6 if name.startswith("logged") else 0, atol=1e-6), (
            f"{name} is off by {float((first[name] - value).abs().max())}"
        )
