"""Where gates can start instead of wide open: at how much each node matters on the data, as was learned before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.batches import Batch, to_device
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.importances import importance_mask
from pdprune.errors import UserError


def mean_importances(model: DecomposedModel, batches: Sequence[Batch], per_position: bool) -> Float[Tensor, "*lead n"]:
    """Each node's causal importance, averaged over the tokens of some batches; `[n]`, or `[T, n]` if `per_position`.

    All tokens count that are no padding, also those before the scored positions: what a token answers can hinge on
    nodes that matter where it looks. A node that matters nowhere on the data gets 0.

    Raises:
        UserError: the decomposition has no causal importances; `per_position` and positions that differ in number.
    """
    device = model.delta_sites.device
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for batch in batches:
        here = to_device(batch, device)
        values = importance_mask(model, here.inputs).double()
        mask = here.attention_mask
        weight = torch.ones_like(values[..., :1]) if mask is None or values.ndim != 3 else mask[..., None].double()
        dims = 0 if per_position else tuple(range(values.ndim - 1))
        if per_position and total.ndim and total.shape != values.shape[1:]:
            raise UserError(
                f"warm_start: batches have {total.shape[0]} and {values.shape[1]} positions; expected as many in all, "
                "for gates per position"
            )
        total = total + (values * weight).sum(dims)
        count = count + weight.sum(dims)
    return (total / count.clamp(min=1)).float()
