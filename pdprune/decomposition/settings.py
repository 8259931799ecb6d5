"""A decomposition as a config describes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdprune.decomposition.bases import Basis, decompose
from pdprune.decomposition.checkpoints import load_decomposition
from pdprune.decomposition.clusters import regroup_by_file
from pdprune.decomposition.model import DecomposedModel
from pdprune.errors import UserError
from pdprune.targets import load_target


@dataclass(frozen=True)
class Decomposition:
    """Which target is explained, and how it is written as a sum of components: in a basis, or as learned before."""

    target: str | None = None
    """A shipped target, `dense-py` or `sparse-py`, or the folder of one (see `pdprune.targets.load_target`); with
    `path`, by default what is told there."""
    sites: list[str] = field(default_factory=list)
    """Patterns of the module paths that are decomposed, e.g. `*.mlp.down`; not with `path`."""
    basis: Basis | None = None
    """`svd`, `neuron` (one component per input column; the default) or `head` (columns grouped by head); not with
    `path`."""
    n_heads: int | None = None
    """For `head`; by default what the target's config says."""
    path: str | None = None
    """A saved decomposition or an SPD run folder (see `pdprune.load_decomposition`), instead of a basis."""
    nodes: str | None = None
    """A JSON file of groups of components that become the nodes (see `pdprune.decomposition.clusters`); by default a
    node is a component, a head, or what was saved."""
    compile: bool = False
    """Whether the target's pass goes through `torch.compile`: worth its half a minute or more in long runs."""

    def load(self) -> DecomposedModel:
        """Load the target and decompose it, or load the decomposition.

        Raises:
            UserError: for an unknown target, a pattern that matches nothing, a decomposition or groups that cannot be
                read or do not fit, or both a basis and a path.
        """
        model = self._components()
        if self.nodes is not None:
            model = regroup_by_file(model, self.nodes)
        if self.compile:
            model.compile()
        return model

    def _components(self) -> DecomposedModel:
        """The decomposition with the nodes that it has by itself."""
        if self.path is not None:
            if self.sites or self.basis is not None or self.n_heads is not None:
                raise UserError(
                    f"decomposition: path {self.path!r} has sites and components of its own; expected no sites, basis "
                    "or n_heads beside it"
                )
            return load_decomposition(self.path, self.target)
        if self.target is None:
            raise UserError("decomposition: got neither target nor path; expected a target, or a saved decomposition")
        target = load_target(self.target)
        model = decompose(target.module.requires_grad_(False), self.sites, self.basis or "neuron", self.n_heads)
        model.target_name = target.name
        return model
