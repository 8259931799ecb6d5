"""Which outputs a node raises and lowers by what it writes, without the help of any later layer.

A node's write direction is followed to the outputs by forward-mode differentiation of the target, with every other
weight matrix held at what it gives: what is left is the residual stream, the last norm and the unembedding, whatever
the architecture calls them. This is the logit lens (nostalgebraist 2020) taken as a derivative, so that the last norm
is the real one at that token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdprune.batches import Batch, output_of, to_device
from pdprune.circuits.edges import components_by_site
from pdprune.decomposition import DecomposedModel, Site
from pdprune.decomposition.references import from_reference
from pdprune.decomposition.sites import at_least_float32, kind_of

OUTPUTS_AT_ONCE = 2**24
"""Outputs held at a time: nodes are followed in parts."""


def written_to_outputs(
    model: DecomposedModel,
    nodes: Sequence[int],
    batch: Batch,
    positions: Sequence[int],
    reference: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "k V"] | None:
    """What each node adds to every output, at one token of its own.

    Args:
        model: the decomposed target.
        nodes: one for each example.
        batch: the example in which each node is looked at.
        positions: and at which token; 0 where there are no positions.
        reference: what its activation is measured from.

    Returns:
        to first order, `[k, V]`; zeros for a node that reaches the outputs through other matrices only. None for a
        target with operations that cannot be differentiated forwards.
    """
    here = to_device(batch, model.delta_sites.device)
    readout = _readout(model, here.select(torch.tensor([0], device=model.delta_sites.device)))
    with torch.no_grad():
        one = output_of(model(here.select(torch.tensor([0], device=model.delta_sites.device)).inputs))
    found = []
    for rows in torch.arange(here.size).split(max(1, OUTPUTS_AT_ONCE // max(1, one.numel()))):
        chosen = here.select(rows.to(model.delta_sites.device))
        some, at = [nodes[int(row)] for row in rows], torch.tensor([positions[int(row)] for row in rows])
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            sdpa_kernel(SDPBackend.MATH),  # the fused ones have no forward derivative
            _only_writing(model, some, at, reference, readout),
        ):
            try:
                tangent = forward_ad.unpack_dual(output_of(model(chosen.inputs))).tangent
            except (NotImplementedError, RuntimeError) as error:
                if "forward AD" not in str(error) and "jvp" not in str(error):
                    raise
                return None
            if tangent is None:
                found.append(torch.zeros(len(rows), one.shape[-1]))
            else:
                of_row = tangent if tangent.ndim == 2 else tangent[torch.arange(len(rows)), at.to(tangent.device)]
                found.append(of_row.float().cpu())
    return torch.cat(found)


@contextmanager
def _only_writing(
    model: DecomposedModel,
    nodes: Sequence[int],
    positions: Tensor,
    reference: Mapping[str, Tensor] | None,
    readout: nn.Module | None,
) -> Iterator[None]:
    """While this lasts, the tangent of row `i` of a run is what node `i` writes, carried on by no weight but the
    readout's."""
    by_site = components_by_site(model, nodes)
    writers = {model.target.get_submodule(name): model.sites[name] for name in by_site}
    rows = torch.arange(len(nodes), device=model.delta_sites.device)
    at = positions.to(rows.device)

    def written(site: Site, x: Tensor, output: Tensor) -> Tensor:
        components, owner = by_site[site.name]
        read = from_reference(site, x, None if reference is None else reference[site.name], components)
        own = read * (owner == rows.reshape(-1, *[1] * (read.ndim - 1)))
        if own.ndim == 3:
            here = torch.zeros(own.shape[:2], dtype=own.dtype, device=own.device)
            here[rows, at] = 1
            own = own * here[..., None]
        return (own @ at_least_float32(site.U[components])).to(output.dtype)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(output)
        kept = tangent if module is readout else None
        if module in writers:
            x = forward_ad.unpack_dual(args[0] if args else next(iter(kwargs.values()))).primal
            new = written(writers[module], x, primal)
            kept = new if kept is None else kept + new
        return primal if kept is None else forward_ad.make_dual(primal, kept)

    matrices = [module for module in model.target.modules() if kind_of(module) is not None]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readout(model: DecomposedModel, batch: Batch) -> nn.Module | None:
    """The weight matrix whose output is the target's, if there is one: the unembedding of a language model."""
    last: list[tuple[nn.Module, Tensor]] = []
    matrices = [module for module in model.target.modules() if kind_of(module) is not None]
    handles = [
        module.register_forward_hook(lambda module, _, output: last.append((module, output))) for module in matrices
    ]
    try:
        with torch.no_grad():
            output = output_of(model(batch.inputs))
    finally:
        for handle in handles:
            handle.remove()
    return next((module for module, made in last if made.data_ptr() == output.data_ptr()), None)
