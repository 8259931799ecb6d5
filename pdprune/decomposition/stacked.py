"""Small sites of one shape folded by one product, for devices that are waiting for the next operator.

A GPU computes a product of small matrices faster than it can be asked for the next one. A CPU does not: there, and for
large matrices, sites are folded one by one, and nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.decomposition.folding import Change, SiteMask
from pdprune.decomposition.sites import Site, at_least_float32

MOST_ENTRIES = 2**18
"""Of a site's largest matrix; with more, a product takes longer than it takes to ask for it."""


class Stack:
    """Sites of one shape, their matrices in one tensor each.

    Args:
        sites: two or more of the same `shape_of`.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        first = sites[0]
        self.sites = list(sites)
        self._stores_out_in = first.kind.stores_out_in
        # Not as inference tensors, which no later pass could go backward through.
        with torch.inference_mode(False), torch.no_grad():
            self._V = None if first.reads_columns else _stack([site.V for site in sites])
            # As the parameters lie: [S, O, C] or [S, C, O].
            self._U = _stack([site.U.t() if site.kind.stores_out_in else site.U for site in sites])
            deltas = [site.delta if site.kind.stores_out_in else site.delta.t() for site in sites]
            self._delta = _stack(deltas) if first.has_delta else None

    def changes(
        self,
        k: Sequence[Float[Tensor, " C"]],
        k_delta: Sequence[Float[Tensor, ""]] = (),
        reference: Sequence[Float[Tensor, " I"]] = (),
    ) -> dict[str, Change]:
        """What `Site.weight_change` and `Site.through` say of each site, from a mask and a reference each."""
        of_component = torch.stack([*k]).unsqueeze(-1 if self._V is None and not self._stores_out_in else -2)
        if self._V is None:
            change = self._U * of_component
        elif self._stores_out_in:
            change = self._U @ (self._V * of_component).mT
        else:
            change = (self._V * of_component) @ self._U
        if k_delta and self._delta is not None:
            change = torch.addcmul(change, self._delta, torch.stack([*k_delta])[:, None, None])
        terms: Sequence[Tensor | None] = [None] * len(self.sites)
        if reference:
            x = torch.stack([*reference]).to(change.dtype).unsqueeze(-1)
            terms = (-((change if self._stores_out_in else change.mT) @ x).squeeze(-1)).unbind()
        names = [site.name for site in self.sites]
        return dict(zip(names, map(Change, change.unbind(), terms), strict=True))


class Stacks:
    """The small sites of a network, those of each shape together.

    Args:
        sites: all of them.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        by_shape: dict[object, list[Site]] = {}
        for site in sites:
            if is_small(site):
                by_shape.setdefault(shape_of(site), []).append(site)
        alike = [group for group in by_shape.values() if len(group) > 1]
        self.all = [Stack(group) for group in alike]
        stacked = [site for group in alike for site in group]
        self._made_of = [(site, *held, _version(held[1])) for site in stacked for held in site.named_buffers()]

    def are_current(self) -> bool:
        """Whether the sites hold the tensors that they held, unchanged as far as PyTorch tells."""
        return all(
            site._buffers[name] is tensor and _version(tensor) == version
            for site, name, tensor, version in self._made_of
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_small(site: Site) -> bool:
    """Whether a site's product is over before the next one can be asked for; sites that are learned change too often
    to be stored twice."""
    V = site.n_components * (0 if site.reads_columns else site.d_in)
    return type(site) is Site and max(V, site.U.numel(), site.d_in * site.d_out) <= MOST_ENTRIES


def shape_of(site: Site) -> tuple[object, ...]:
    """What sites must have in common."""
    V = None if site.reads_columns else site.V.shape
    return site.kind.stores_out_in, V, site.U.shape, site.has_delta, site.U.dtype, site.U.device


def changes_by_site(stacks: Sequence[Stack], site_masks: Sequence[SiteMask]) -> dict[str, Change]:
    """What a shared mask changes at the stacked sites; those of a stack that is not masked as a whole are left out."""
    by_site = {at.site: at for at in site_masks}
    found: dict[str, Change] = {}
    for stack in stacks:
        own = [by_site[site] for site in stack.sites if site in by_site]
        k = [at.k for at in own if at.k is not None]
        k_delta = [at.k_delta for at in own if at.k_delta is not None]
        references = [at.reference for at in own if at.reference is not None]
        alike = len(k) == len(stack.sites) and {len(k_delta), len(references)} <= {0, len(k)}
        if alike and all(serves_all(reference) for reference in references):
            found |= stack.changes(k, k_delta, references)
    return found


def serves_all(reference: Tensor) -> bool:
    """Whether a reference is the same for all tokens, so that it can be a term of the bias."""
    return reference.ndim == 1 and reference.is_floating_point()


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack([at_least_float32(matrix) for matrix in matrices])
