"""Sites whose components are parameters, so that they can be learned; what they leave over follows them, live.

The sums, and so forward passes, losses and the adversary, are those of any other decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.decomposition.building import build
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.sites import Kind, Site, at_least_float32, require_kind, weight_of
from pdprune.errors import UserError
from pdprune.seeding import generator


class TrainableSite(Site):
    """A site whose `V` and `U` are parameters, and whose delta `Δ = W − (V U)ᵀ` has a gradient to both."""

    W: Float[Tensor, "O I"]

    def __init__(
        self,
        name: str,
        kind: Kind,
        V: Float[Tensor, "I C"],
        U: Float[Tensor, "C O"],
        W: Float[Tensor, "O I"],
        node_index: Int[Tensor, " C"],
    ) -> None:
        nn.Module.__init__(self)
        self.name = name
        self.kind = kind
        self._V = nn.Parameter(V)
        self.U = nn.Parameter(U)
        self.register_buffer("W", W, persistent=False)
        self.register_buffer("node_index", node_index, persistent=False)

    @property
    def delta(self) -> Float[Tensor, "O I"]:
        """What the components leave over now."""
        return self.W - (self.V @ self.U).t()

    @property
    def has_delta(self) -> bool:
        """Always: while components are learned they leave something over."""
        return True

    def output_change(
        self,
        x: Tensor,
        reference: Tensor | None,
        k: Float[Tensor, "#*lead C"] | None,
        k_delta: Float[Tensor, "#*lead 1"] | None,
    ) -> Float[Tensor, "*lead O"] | None:
        """As at any site, but without ever making the delta: `((k − k_Δ) ⊙ xV) U + k_Δ x Wᵀ`."""
        if k_delta is None:
            return super().output_change(x, reference, k, None)
        scale = -k_delta if k is None else k - k_delta
        change = (self._read(at_least_float32(self.V), x, reference) * scale) @ self.U
        return change + self._read(self.W.t(), x, reference) * k_delta


def trainable(target: nn.Module, n_components: Mapping[str, int], seed: int = 0) -> DecomposedModel:
    """A target with random components to be learned, a node each.

    `V` is normal with variance `1 / d_in`, so that activations are of the input's scale (SPD, arXiv 2506.20790), and
    `U` such that the sum of the components is of the weight's scale.

    Args:
        target: any module; it is left as it is.
        n_components: by module path.
        seed: decides the initial components.

    Raises:
        UserError: a path that is no site, a number of components below 1, weights that are not finite.
    """
    modules = dict(target.named_modules(remove_duplicate=False))
    initial = {}
    for name, count in n_components.items():
        if count < 1:
            raise UserError(f"site {name!r}: {count} components; expected at least 1")
        if name in modules:  # `build` tells the user of a path that is not there
            W = weight_of(modules[name], require_kind(name, modules[name]))
            initial[name] = _initial(W, count, generator(seed, "components", name))
        else:
            initial[name] = (torch.zeros(1, count), torch.zeros(count, 1))
    sites, nodes = build(target, initial, None, None)
    learned = [
        TrainableSite(
            site.name, site.kind, *initial[site.name], weight_of(modules[site.name], site.kind), site.node_index
        )
        for site in sites
    ]
    return DecomposedModel(target, learned, nodes)


def settled(model: DecomposedModel) -> DecomposedModel:
    """The decomposition as it is now, no longer to be learned: same target, nodes and importances."""
    components = {name: (site.V.detach(), site.U.detach()) for name, site in model.sites.items()}
    groups, labels = [node.components for node in model.nodes], [node.label for node in model.nodes]
    fixed = DecomposedModel.from_components(model.target, components, groups, labels)
    fixed.target_name = model.target_name
    return fixed


def faithfulness(model: DecomposedModel) -> Float[Tensor, ""]:
    """`Σ‖Δ‖² / n_params`: the mean square of what the components leave over (method.md, section 7)."""
    deltas = [site.delta for site in model.sites.values()]
    return torch.stack([delta.square().sum() for delta in deltas]).sum() / sum(delta.numel() for delta in deltas)


def _initial(
    W: Float[Tensor, "O I"], count: int, rng: torch.Generator
) -> tuple[Float[Tensor, "I C"], Float[Tensor, "C O"]]:
    d_out, d_in = W.shape
    scale = float(W.square().mean().sqrt()) or 1 / math.sqrt(d_in)  # a weight of zeros has none of its own
    V = torch.randn(d_in, count, generator=rng) / math.sqrt(d_in)
    U = torch.randn(count, d_out, generator=rng) * (scale * math.sqrt(d_in / count))
    return V.to(W), U.to(W)
