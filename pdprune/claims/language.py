"""A shipped language model and the prompts of a task, as the experiments prune and audit them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pdprune.adversary.objective import Reference
from pdprune.batches import as_batch, as_batches
from pdprune.circuits.audit import Audit, audit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.prune import prune
from pdprune.circuits.schemes import SchemeName
from pdprune.circuits.selection import Selection
from pdprune.claims.nodes import SITES
from pdprune.decomposition import DecomposedModel, decompose
from pdprune.decomposition.norms import NormScaling
from pdprune.losses import task_loss_and_accuracy
from pdprune.seeding import generator
from pdprune.targets import load_target
from pdprune.tasks import TaskData

BATCH_SIZE = 64
EVERYTHING = 1 << 20
"""Prompts in a batch, when a split should be one batch."""
SELECTION = Selection(drop_scores=12, swap_scores=60)
"""Dropping nodes one by one is dear, and makes a circuit of hundreds only a little smaller."""


@dataclass(frozen=True)
class Splits:
    """The batches of a task: to learn gates on, to choose the circuit on, and to audit on."""

    train: list[Any]
    select: list[Any]
    held_out: list[Any]

    @classmethod
    def of(cls, task: str, target: str, train: int, others: int, seed: int | None = None) -> Splits:
        """So many prompts of the training split, and of each of the other two.

        Args:
            task, target: names of shipped ones.
            train, others: how many.
            seed: draws them from their split; without, they are the first.
        """
        data = TaskData(task, target, audit_batch_size=EVERYTHING)
        (all_train,), (all_select,), (all_held_out,) = (
            data.train_batches(),
            data.select_batches(),
            data.held_out_batches(),
        )
        return cls(
            _in_batches(_drawn(all_train, train, "train", seed), BATCH_SIZE),
            [_drawn(all_select, others, "select", seed)],
            [_drawn(all_held_out, others, "held_out", seed)],
        )

    def relabelled(self, how: str, seed: int) -> Splits:
        """With other answers: `wrong`, the first wrong one; `shuffled`, other prompts'; `right`, as they are."""
        return Splits(*(_relabelled(split, how, seed) for split in (self.train, self.select, self.held_out)))


def _drawn(whole: Any, size: int, name: str, seed: int | None) -> Any:
    """Some prompts of a split; fewer if it has fewer."""
    batch = as_batch(whole)
    order = torch.arange(batch.size)
    if seed is not None:
        order = torch.randperm(batch.size, generator=generator(seed, "prompts of", name))
    return batch.select(order[:size]).raw


def _in_batches(whole: Any, size: int) -> list[Any]:
    batch = as_batch(whole)
    return [batch.select(part).raw for part in torch.arange(batch.size).split(size)]


def _relabelled(batches: Sequence[Any], how: str, seed: int) -> list[Any]:
    match how:
        case "right":
            return list(batches)
        case "wrong":
            return [batch | {"labels": batch["choices"][:, 1].clone()} for batch in batches]
        case "shuffled":
            return [batch | {"labels": _shuffled(batch["labels"], seed, index)} for index, batch in enumerate(batches)]
        case _:
            raise AssertionError(f"no labels {how!r}")


def _shuffled(labels: torch.Tensor, seed: int, index: int) -> torch.Tensor:
    return labels[torch.randperm(len(labels), generator=generator(seed, "shuffled labels", index))]


def language_model(target: str, weights: str = "trained", seed: int = 0) -> DecomposedModel:
    """A shipped model by neurons and channels; `weights` as in `module_of`."""
    model = decompose(module_of(target, weights, seed), SITES, "neuron")
    model.target_name = target if weights == "trained" else f"{target}, {weights} weights"
    return model


def module_of(target: str, weights: str = "trained", seed: int = 0) -> nn.Module:
    """A shipped model, frozen; or its architecture before any training (`random`), or with shuffled weights."""
    module = load_target(target).module
    match weights:
        case "trained":
            found = module
        case "random":
            found = untrained(module, seed)
        case "shuffled":
            found = shuffled_within_matrices(module, seed)
        case _:
            raise AssertionError(f"no weights {weights!r}")
    return found.requires_grad_(False)


def untrained(module: nn.Module, seed: int) -> nn.Module:
    """A network of the same kind and sizes with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(module)(module.config)
    return fresh.eval()


def shuffled_within_matrices(module: nn.Module, seed: int) -> nn.Module:
    """The entries of every matrix in another order: random weights of the sizes that training makes."""
    shuffled = copy.deepcopy(module)
    rng = generator(seed, "shuffled weights")
    with torch.no_grad():
        for matrix in (parameter for parameter in shuffled.parameters() if parameter.ndim == 2):
            order = torch.randperm(matrix.numel(), generator=rng)
            matrix.copy_(matrix.flatten()[order].view_as(matrix))
    return shuffled


def pruned(
    model: DecomposedModel,
    splits: Splits,
    scheme: SchemeName,
    target_loss: float,
    steps: int,
    seed: int,
    norm_scales: NormScaling = "live",
) -> Circuit:
    """The smallest circuit within a task cross-entropy, under a scheme; what is ablated is replaced by means."""
    return prune(
        model,
        splits.train,
        loss="ce",
        scheme=scheme,
        reference="mean",
        target_loss=target_loss,
        search="gradient",
        select=splits.select,
        selection=SELECTION,
        steps=steps,
        norm_scales=norm_scales,
        seed=seed,
    )


def audited(model: DecomposedModel, keep: Any, splits: Splits, target_loss: float, seed: int, **options: Any) -> Audit:
    """The audit on held-out prompts, by its least attack."""
    return audit(
        model,
        keep,
        splits.held_out,
        loss="ce",
        reference=reference_of(model, splits, seed),
        target_loss=target_loss,
        draws=16,
        random_circuits=0,
        held_out=True,
        seed=seed,
        **options,
    )


def reference_of(model: DecomposedModel, splits: Splits, seed: int) -> Reference:
    """The means over the training prompts, which pruning used too."""
    return Reference.measure("mean", model, as_batches(splits.train), seed)


def task_scores(
    model: DecomposedModel, batches: Sequence[Any], mask: torch.Tensor | None, reference: Reference
) -> tuple[float, float]:
    """Cross-entropy among the choices and accuracy, under a mask of the nodes (the deltas are none)."""
    losses, right = [], []
    with torch.no_grad():
        for index, raw in enumerate(batches):
            batch = as_batch(raw)
            output = model(batch.inputs, mask, None, reference.on(model, batch, index))
            nats, hits = task_loss_and_accuracy(output, batch)
            losses.append(nats)
            right.append(hits)
    return float(torch.cat(losses).mean()), float(torch.cat(right).mean())
