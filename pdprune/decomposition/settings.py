"""A decomposition as a config describes it."""

from __future__ import annotations

from dataclasses import dataclass

from pdprune.decomposition.bases import Basis, decompose
from pdprune.decomposition.model import DecomposedModel
from pdprune.targets import load_target


@dataclass(frozen=True)
class Decomposition:
    """Which target is explained, and how it is written as a sum of components."""

    target: str
    """A shipped target, `dense-py` or `sparse-py`, or the folder of one (see `pdprune.targets.load_target`)."""
    sites: list[str]
    """Patterns of the module paths that are decomposed, e.g. `*.mlp.down`."""
    basis: Basis = "neuron"
    """`svd`, `neuron` (one component per input column) or `head` (columns grouped by head)."""
    n_heads: int | None = None
    """For `head`; by default what the target's config says."""

    def load(self) -> DecomposedModel:
        """Load the target and decompose it.

        Raises:
            UserError: for an unknown target, or a pattern that matches nothing.
        """
        target = load_target(self.target)
        model = decompose(target.module.requires_grad_(False), self.sites, self.basis, self.n_heads)
        model.target_name = target.name
        return model
