"""Rankings of nodes by gates alone, before a circuit is chosen: what schemes and gate maps are compared by."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from lightning import LightningDataModule
from torch import Tensor

from pdprune.circuits.prune import learn_gates
from pdprune.circuits.pruning import CircuitPruner
from pdprune.claims.recovery import top


def learned_ranking(pruner: CircuitPruner, data: LightningDataModule, steps: int) -> Float[Tensor, "*lead n"]:
    """Learn gates for so many keep steps; how open each has been of late is its node's rank."""
    learn_gates(pruner, data, steps)
    return pruner.openness


def smallest_top(ranking: Float[Tensor, " n"], is_good: Callable[[set[int]], bool]) -> set[int]:
    """The fewest highest nodes that are good enough, by bisection on their number; all of them if none tried is.

    Where a larger top may be worse than a smaller one this finds one of the sizes at which it turns good.
    """
    too_few, enough = -1, len(ranking)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if is_good(top(ranking, middle)):
            enough = middle
        else:
            too_few = middle
    return top(ranking, enough)
