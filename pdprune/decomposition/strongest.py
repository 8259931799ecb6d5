"""What is kept of each token where no importances were learned: the components that do most there.

The baseline that learned importances are held against, and the only one for components that were not learned (SVD).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.decomposition.importances import activations
from pdprune.decomposition.model import DecomposedModel


@torch.no_grad()
def strongest(model: DecomposedModel, inputs: object, counts: Mapping[str, int]) -> Float[Tensor, "*lead n"]:
    """1 for the `counts[site]` components of each site that write most on a token, 0 for the others.

    A component writes `|x·V[:, c]| ‖U[c]‖`. Every component must be a node of its own.

    Args:
        model: any decomposition.
        inputs: of the target.
        counts: how many are kept of each site; more than it has keeps all.
    """
    read = model.site_inputs(inputs)
    lead = max((activations(site, read[name]).shape[:-1] for name, site in model.sites.items()), key=len)
    gates = torch.zeros(*lead, model.n_nodes, device=model.delta_sites.device)
    for name, site in model.sites.items():
        written = activations(site, read[name]).abs() * site.U.norm(dim=-1)
        kept = written.topk(min(counts[name], site.n_components), dim=-1).indices
        own = torch.zeros_like(written).scatter(-1, kept, 1.0)
        gates[..., site.node_index] = own.expand(*lead, -1)
    return gates
