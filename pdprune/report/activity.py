"""Where nodes are active: the held-out contexts in which each one is furthest from its reference.

A node of one component has its activation, with its sign. A node of several has the length of what it writes, if its
components wrote at right angles: `sqrt(Σ_c (a_c ‖U_c‖)²)`. Both are measured from the reference, since that is what
ablation puts in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pdprune.batches import Batch, to_device
from pdprune.circuits.edges import components_by_site
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.references import from_reference
from pdprune.decomposition.sites import at_least_float32
from pdprune.report.examples import token_mask

VALUES_AT_ONCE = 2**24
"""Activations held at a time: examples are read in parts."""
WINDOW = 64
"""Tokens of a context that are shown, around the one where the node is most active."""


@dataclass(frozen=True)
class Peak:
    """A context in which a node is active.

    Attributes:
        example: over all batches.
        position: of the token where the node is most active, in its batch; 0 where there are no positions.
        start: the position of the first of `values`.
        values: the activation at the tokens around it.
    """

    example: int
    position: int
    start: int
    values: list[float]


def peaks_of(
    model: DecomposedModel,
    nodes: Sequence[int],
    batches: Sequence[Batch],
    reference: Mapping[str, Tensor] | None,
    contexts: int,
) -> list[list[Peak]]:
    """For each node the examples where it is most active, the strongest first; none where it never leaves its
    reference.

    Raises:
        UserError: a site that the target calls several times, or never.
    """
    heights = torch.cat(
        [
            values.abs().reshape(len(values), -1, len(nodes)).amax(1)
            for _, values, _ in _parts(model, nodes, batches, reference)
        ]
    )
    best = heights.argsort(dim=0, descending=True, stable=True)[:contexts]  # [contexts, k]
    peaks: list[list[Peak | None]] = [[None] * len(best) for _ in nodes]
    for first, values, mask in _parts(model, nodes, batches, reference):
        for rank, node in ((best >= first) & (best < first + len(values))).nonzero().tolist():
            row = int(best[rank, node]) - first
            if heights[first + row, node] > 0:
                peaks[node][rank] = _window(first + row, values[row, ..., node], mask[row])
    return [[peak for peak in of_node if peak is not None] for of_node in peaks]


def _parts(
    model: DecomposedModel, nodes: Sequence[int], batches: Sequence[Batch], reference: Mapping[str, Tensor] | None
) -> Iterator[tuple[int, Float[Tensor, "b *T k"], Bool[Tensor, " b *T"]]]:
    """Activations on some examples after others, with the number of the first of them, and where tokens count."""
    first = 0
    by_site = components_by_site(model, nodes)
    for batch in batches:
        here = to_device(batch, model.delta_sites.device)
        rows = torch.arange(batch.size)
        n_tokens = max(x.shape[1] if x.ndim > 1 else 1 for x in _read(model, here.select(rows[:1])).values())
        for part in rows.split(max(1, VALUES_AT_ONCE // (n_tokens * len(nodes)))):
            chosen = here.select(part.to(model.delta_sites.device))
            values = _activities(model, nodes, by_site, _read(model, chosen), reference).cpu()
            mask = token_mask(batch.select(part), tuple(values.shape[:-1]))
            yield first, values * mask[..., None], mask
            first += len(part)


def _read(model: DecomposedModel, batch: Batch) -> dict[str, Tensor]:
    return model.site_inputs(batch.inputs)


def _activities(
    model: DecomposedModel,
    nodes: Sequence[int],
    by_site: Mapping[str, tuple[Int[Tensor, " c"], Int[Tensor, " c"]]],
    read: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
) -> Float[Tensor, "b *T k"]:
    signed, square = None, None
    for name, (components, owner) in by_site.items():
        site = model.sites[name]
        values = from_reference(site, read[name], None if reference is None else reference[name], components)
        if signed is None or square is None:
            signed = values.new_zeros(*values.shape[:-1], len(nodes))
            square = torch.zeros_like(signed)
        signed = signed.index_add(-1, owner, values.to(signed.dtype))
        lengths = at_least_float32(site.U[components]).norm(dim=-1)
        square = square.index_add(-1, owner, (values * lengths).square().to(square.dtype))
    assert signed is not None and square is not None
    is_single = torch.tensor([len(model.nodes[node].components) == 1 for node in nodes], device=signed.device)
    return torch.where(is_single, signed, square.sqrt())


def _window(example: int, values: Float[Tensor, "*T"], mask: Bool[Tensor, "*T"]) -> Peak:
    if values.ndim == 0:
        return Peak(example, 0, 0, [float(values)])
    position = int(values.abs().argmax())
    tokens = mask.nonzero().squeeze(-1)
    first, last = int(tokens[0]), int(tokens[-1]) + 1
    start = max(first, min(position - WINDOW // 2, last - WINDOW))
    return Peak(example, position, start, values[start : min(last, start + WINDOW)].tolist())
