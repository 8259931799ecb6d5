"""A network in which the circuit of a behaviour is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pdprune.adversary.objective import MaskedLoss, Reference, ReferenceKind, by_size, masked_losses
from pdprune.batches import as_batches
from pdprune.claims.planted.handmade import Puzzle
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.clusters import regroup
from pdprune.seeding import generator


@dataclass(frozen=True)
class Planted:
    """A network, data of one behaviour, and the nodes that the behaviour was built, or trained, to go through.

    Attributes:
        model: its nodes are in random order.
        batches: to prune on.
        held_out: to audit on.
        loss, reference, target_loss: what a circuit is asked for.
        truth: the true nodes.
    """

    model: DecomposedModel
    batches: list[Any]
    held_out: list[Any]
    loss: str
    reference: ReferenceKind
    target_loss: float
    truth: frozenset[int]

    def losses(self, loss: Any = None) -> list[MaskedLoss]:
        """The losses of the batches that are pruned on, by the name of the loss or another one."""
        batches = as_batches(self.batches)
        reference = Reference.measure(self.reference, self.model, batches)
        return masked_losses(self.model, batches, loss or self.loss, reference)

    def single_ablations(self) -> list[float]:
        """The loss with each node ablated alone, and nothing else."""
        losses = self.losses()
        values = []
        with torch.no_grad():
            for node in range(self.model.n_nodes):
                mask = torch.ones(self.model.n_nodes)
                mask[node] = 0
                values.append(by_size(losses, [float(loss.per_example(mask).mean()) for loss in losses]))
        return values


def shuffled(model: DecomposedModel, truth: set[int], seed: int) -> tuple[DecomposedModel, frozenset[int]]:
    """The same nodes in random order, so that no ranking is helped by where the true ones stand."""
    order = torch.randperm(model.n_nodes, generator=generator(seed, "node order")).tolist()
    again = regroup(model, [model.nodes[node].components for node in order])
    return again, frozenset(place for place, node in enumerate(order) if node in truth)


def of_puzzle(puzzle: Puzzle, seed: int) -> Planted:
    """A hand-made network: the truth is the one circuit that its definition singles out."""
    (truth,) = puzzle.adversarial
    model, truth_now = shuffled(puzzle.model, truth, seed)
    return Planted(model, [puzzle.batch], [puzzle.batch], "kl", "zero", puzzle.target_loss, truth_now)
