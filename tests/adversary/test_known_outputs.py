"""What the target answers, worked out once: the same numbers as at every visit, and nothing of what is not known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.test_pruning import Data, pruner, tokens, trainer
from lightning import Callback, Trainer
from torch import Tensor, nn

import pdprune
from pdprune.adversary.known_outputs import KnownOutputs
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import Batch, as_batch, as_batches
from pdprune.circuits.pruning import CircuitPruner
from pdprune.decomposition import DecomposedModel
from pdprune.errors import NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


def _one_position(size: int, seed: int) -> dict[str, Any]:
    return token_batch(size, seed)


def _several_positions(size: int, seed: int) -> dict[str, Any]:
    batch = token_batch(size, seed)
    second = torch.where(torch.arange(size) % 2 == 0, 0, -1)
    return batch | {"positions": torch.stack([batch["positions"], second], dim=1)}


def _without_padding(size: int, seed: int) -> dict[str, Any]:
    batch = token_batch(size, seed)
    mask = torch.arange(5)[None] < 2 + torch.arange(size)[:, None] % 4
    return {"inputs": batch["inputs"] | {"attention_mask": mask.long()}}


def _everything(size: int, seed: int) -> Tensor:
    ids: Tensor = token_batch(size, seed)["inputs"]["input_ids"]
    return ids


MAKERS = [_one_position, _several_positions, _without_padding, _everything]


@pytest.mark.parametrize("loss", ["kl", "mse"])
@pytest.mark.parametrize("made", MAKERS)
def test_losses_are_those_against_the_target_itself(made: Callable[[int, int], Any], loss: str) -> None:
    model = token_model()
    batches = as_batches([made(size, seed) for seed, size in enumerate((4, 6, 3))])
    known = KnownOutputs.measure(model, batches)
    assert known is not None
    rng = torch.Generator().manual_seed(0)
    for batch in batches:
        shuffled = batch.select(torch.randperm(batch.size, generator=rng)[: batch.size - 1])
        mask = torch.rand(model.n_nodes, generator=rng)
        itself = MaskedLoss(model, shuffled, loss)
        found = known.on(shuffled)
        assert found is not None
        told = MaskedLoss(model, shuffled, loss, target_output=found)
        assert float(itself.per_example(mask).min()) > 0
        torch.testing.assert_close(told.per_example(mask), itself.per_example(mask), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(told.unablated(), itself.unablated())


def test_examples_of_networks_without_positions() -> None:
    target = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = pdprune.decompose(target, ["2"], basis="neuron")
    x = torch.randn(10, 4)
    known = KnownOutputs.measure(model, as_batches([x[:7], x[7:]]))
    assert known is not None
    found = known.on(as_batch(x[[9, 0, 7]]))
    assert found is not None
    torch.testing.assert_close(found, target(x[[9, 0, 7]]))


def test_an_example_that_was_not_seen_is_not_known() -> None:
    model = token_model()
    batch = as_batch(token_batch(4, 0))
    known = KnownOutputs.measure(model, [batch])
    assert known is not None and known.on(batch) is not None
    moved = {**batch.raw, "positions": (batch.raw["positions"] + 1) % 5}
    padded = {**batch.raw, "inputs": {**batch.raw["inputs"], "attention_mask": torch.zeros(4, 5).long()}}
    other_type = {**batch.raw, "inputs": {**batch.raw["inputs"], "input_ids": batch.raw["inputs"]["input_ids"].int()}}
    for raw in (token_batch(4, 1), moved, padded, other_type):
        assert known.on(as_batch(raw)) is None


def test_nothing_is_remembered_beyond_the_limit_and_one_batch_tells() -> None:
    model = token_model()
    batches = as_batches([token_batch(4, seed) for seed in range(5)])
    size = 5 * 4 * 11 * 4  # a scored position an example
    runs: list[int] = []
    model.target.register_forward_hook(lambda *_: runs.append(1))
    assert KnownOutputs.measure(model, batches, limit=size - 1) is None
    assert len(runs) == 1
    assert KnownOutputs.measure(model, batches, limit=size) is not None


def test_batches_may_differ_in_length_and_in_what_is_scored() -> None:
    model = token_model()
    batches = as_batches([token_batch(4, 0), token_batch(4, 0, length=6), _everything(4, 1)])
    known = KnownOutputs.measure(model, batches)
    assert known is not None
    for batch in batches:
        found, mask = known.on(batch), torch.zeros(model.n_nodes)
        assert found is not None
        told = MaskedLoss(model, batch, target_output=found).per_example(mask)
        torch.testing.assert_close(told, MaskedLoss(model, batch).per_example(mask))


def test_an_output_that_is_no_number_is_told() -> None:
    model = token_model()
    with torch.no_grad():
        model.target.up.weight.fill_(torch.inf)  # type: ignore[union-attr,operator]
    with pytest.raises(NonFiniteLossError, match="target: its output"):
        KnownOutputs.measure(model, as_batches([token_batch(4, 0)]))


@pytest.mark.parametrize("mode", ["free", "fresh"])
def test_a_fit_asks_the_target_once_for_every_example(tmp_path: Path, mode: Any) -> None:
    """And ends where one does that asks at every step, but for rounding."""

    def fitted(remembers: bool) -> tuple[Tensor, int]:
        model = token_model()
        learner = pruner(model, adversary=TrainingAdversary(mode, steps=2))
        if not remembers:
            learner.answers_worth_knowing = lambda: None  # type: ignore[method-assign]
        asked: list[int] = []
        counting = _counting(model, asked)
        trainer(tmp_path, 12).fit(learner, datamodule=tokens())
        counting.remove()
        return learner.openness, len(asked)

    (known, runs), (asked, more_runs) = fitted(True), fitted(False)
    assert more_runs - runs == 12 - 3
    assert float(asked.min()) < 0.9
    torch.testing.assert_close(known, asked, rtol=0, atol=1e-6)


def _counting(model: DecomposedModel, asked: list[int]) -> Any:
    """Counts runs of the unablated target, which have the weights that it came with."""
    own = model.target.down.weight.detach().clone()  # type: ignore[union-attr,operator]

    def count(module: nn.Module, *_: Any) -> None:
        if module.weight.shape == own.shape and torch.equal(module.weight, own):  # type: ignore[arg-type]
            asked.append(1)

    return model.target.down.register_forward_hook(count)  # type: ignore[union-attr]


class Remembered(Callback):
    """Notes what is known while a run goes on."""

    known: KnownOutputs | None = None

    def on_train_batch_start(self, trainer: Trainer, pruner: CircuitPruner, *rest: Any) -> None:  # type: ignore[override]
        self.known = pruner.known_outputs


def known_in_a_run(folder: Path, steps: int, **limits: Any) -> KnownOutputs | None:
    remembered, learner = Remembered(), pruner()
    fit = trainer(folder, steps, remembered)
    for name, value in limits.items():
        setattr(fit, name, value)
    fit.fit(learner, datamodule=tokens())
    assert learner.known_outputs is None, "what follows training needs the memory itself"
    return remembered.known


def test_one_pass_over_the_data_remembers_nothing(tmp_path: Path) -> None:
    assert known_in_a_run(tmp_path, 3) is None
    known = known_in_a_run(tmp_path, 4)
    assert known is not None and known.on(_first(tokens())) is not None


def test_short_epochs_are_no_passes_over_the_data(tmp_path: Path) -> None:
    assert known_in_a_run(tmp_path, 3, limit_train_batches=1) is None
    assert known_in_a_run(tmp_path, 4, limit_train_batches=1) is not None


def _first(data: Data) -> Batch:
    return as_batch(data.batches[0])
