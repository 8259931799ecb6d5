"""What ablated components see instead of their own input: the reference input `x̄` of each site.

The reference value of a component is `μ_c = x̄·V[:, c]`, so one vector per site serves all its components and its
delta. Zero needs no reference; means and resampled inputs are made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pdprune.batches import as_batch, to_device
from pdprune.decomposition.importances import activations
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.sites import Site, at_least_float32
from pdprune.errors import UserError


def mean_reference(model: DecomposedModel, batches: Iterable[Any], per_position: bool = False) -> dict[str, Tensor]:
    """The mean input of every site of the unablated target, padding left out. Reads one batch at a time.

    Args:
        model: its sites are averaged at.
        batches: as a DataLoader yields them; padding is where a dict of inputs has `attention_mask` 0. A site whose
            leading dimensions are not those of the attention mask is averaged over all it reads.
        per_position: a mean for every position, as long as the longest batch. A position that is only ever
            padding gets the mean over all positions.

    Returns:
        `[I]` by site, or `[T, I]` per position. At an embedding: frequencies of the ids, `[vocab]` or `[T, vocab]`.

    Raises:
        UserError: no batches, nothing but padding, or no positions to take means for.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for raw in batches:
        batch = to_device(as_batch(raw), model.delta_sites.device)
        for name, calls in model.site_calls(batch.inputs).items():
            site = model.sites[name]
            for x in calls:
                total, count = _sum_by_position(site, x, batch.attention_mask, per_position)
                sums[name] = _add_padded(sums[name], total) if name in sums else total
                counts[name] = _add_padded(counts[name], count) if name in counts else count
    if not sums:
        raise UserError("mean reference: no batches given, expected at least one")
    return {name: _mean(name, sums[name], counts[name], per_position).to(model.sites[name].U.dtype) for name in sums}


def resample_reference(model: DecomposedModel, inputs: Any, partner_inputs: Any) -> dict[str, Tensor]:
    """What every site reads on other inputs, token by token: `[B, T, I]` by site, ids `[B, T]` at an embedding.

    Args:
        model: its sites are read.
        inputs: the inputs that are to be run under masks, for their shapes alone.
        partner_inputs: a counterfactual, or another example of the batch, for every example of `inputs`.

    Raises:
        UserError: the two differ in shape, or a site is not called exactly once.
    """
    shapes, partner_shapes = _shapes(inputs), _shapes(partner_inputs)
    if shapes != partner_shapes:
        raise UserError(
            f"resample reference: inputs of shapes {shapes} and partners of shapes {partner_shapes}, expected the same"
        )
    return model.site_inputs(partner_inputs)


def from_reference(
    site: Site, x: Tensor, reference: Tensor | None, components: Int[Tensor, " k"]
) -> Float[Tensor, "*lead k"]:
    """Activations of some components less their reference values: what ablating them takes away.

    Args:
        site: where the components are.
        x: what it reads, `[*lead, I]`, or ids `[*lead]` at an embedding.
        reference: its reference input, as means and resampling give it; None is zero.
        components: by index.
    """
    values = activations(site, x, components)
    if reference is None:
        return values
    if site.kind.reads_ids and reference.is_floating_point():  # frequencies of the ids
        means = (
            reference[..., components] if site.reads_columns else reference @ at_least_float32(site.V[:, components])
        )
    else:
        means = activations(site, reference, components)
    by_position = means.ndim == 2 and values.ndim == 3
    return values - (means[: values.shape[1]] if by_position else means)


def _sum_by_position(
    site: Site, x: Tensor, attention_mask: Bool[Tensor, "B T"] | None, per_position: bool
) -> tuple[Float[Tensor, "P I"], Float[Tensor, "P 1"]]:
    """Sum and number of the tokens that a site read, `P` being positions if asked for and 1 if not. In float64."""
    lead = x.shape if site.kind.reads_ids else x.shape[:-1]
    if per_position and len(lead) < 2:
        raise UserError(
            f"site {site.name!r} reads leading dimensions {list(lead)}, which hold no positions to take means for"
        )
    if attention_mask is not None and len(lead) == 2 and lead[0] == 1:
        x, lead = (
            x.expand(*attention_mask.shape, *x.shape[2:]),
            attention_mask.shape,
        )  # position ids, alike for all examples
    weight = attention_mask if attention_mask is not None and attention_mask.shape == lead else x.new_ones(lead)
    n_positions = lead[-1] if per_position else 1
    weight = weight.double().reshape(-1, n_positions)
    if site.kind.reads_ids:
        cells = x.reshape(-1, n_positions) + site.d_in * torch.arange(n_positions, device=x.device)
        total = torch.bincount(cells.flatten(), weight.flatten(), minlength=n_positions * site.d_in).reshape(
            n_positions, -1
        )
    else:
        total = torch.einsum("bp,bpi->pi", weight, x.double().reshape(-1, n_positions, site.d_in))
    return total, weight.sum(0).unsqueeze(-1)


def _add_padded(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two tensors of which one may have fewer rows: those count as zeros."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    longer = longer.clone()
    longer[: len(shorter)] += shorter
    return longer


def _mean(name: str, total: Tensor, count: Tensor, per_position: bool) -> Tensor:
    if count.sum() == 0:
        raise UserError(f"mean reference: site {name!r} reads nothing but padding in these batches")
    overall = total.sum(0) / count.sum()
    return torch.where(count > 0, total / count.clamp(min=1), overall) if per_position else overall


def _shapes(inputs: Any) -> list[list[int]]:
    """Shapes of the tensors among a target's arguments."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else (inputs,)
    )
    return [list(value.shape) for value in values if isinstance(value, Tensor)]
