"""Rankings of nodes by gates alone, before a circuit is chosen: what schemes and gate maps are compared by."""

from __future__ import annotations

from jaxtyping import Float
from lightning import LightningDataModule
from torch import Tensor

from pdprune.circuits.prune import learn_gates
from pdprune.circuits.pruning import CircuitPruner


def learned_ranking(pruner: CircuitPruner, data: LightningDataModule, steps: int) -> Float[Tensor, "*lead n"]:
    """Learn gates for so many keep steps; how open each has been of late is its node's rank."""
    learn_gates(pruner, data, steps)
    return pruner.openness
