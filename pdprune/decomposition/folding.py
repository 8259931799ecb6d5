"""Two ways to run a target under a mask, equal in values and gradients.

Folded: one mask for all tokens becomes part of the weights, and the target runs at its own speed. The cost beyond the
target's own training step is `C·I·O` per site, however many tokens there are.

Per token: masks that differ between examples or positions are applied to each site's output by forward hooks.

Both take masks as `k = m - 1`, split by site, with None where nothing is taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdprune.decomposition.sites import Site
from pdprune.errors import UserError


class SiteMask(NamedTuple):
    """One site, where it lives in the target, and what is taken away from it."""

    site: Site
    module: nn.Module
    prefix: str
    """Of the module's parameters in the target: `"blocks.0.mlp.down."`."""
    k: Float[Tensor, "*#lead C"] | None
    """Node mask minus one, per component."""
    k_delta: Float[Tensor, "*#lead 1"] | None
    """Delta mask minus one; of shape `[]` in the folded route."""
    reference: Tensor | None
    """The reference input `x̄`; None is zero."""


class Folded(NamedTuple):
    """A target under one shared mask: what to call it with in place of its own parameters, and what to add."""

    parameters: dict[str, Tensor]
    added: list[tuple[SiteMask, Float[Tensor, "*#lead O"]]]
    """Output terms of references that differ between tokens: no bias can hold them."""


def fold(site_masks: Sequence[SiteMask]) -> Folded:
    """Fold one mask for all tokens into weights and biases.

    `W(m) = W + D`, `b(m) = b - D x̄` with the change `D = -(V·diag(1-m)·U)ᵀ - (1-m_Δ)·Δ`. Summed in float32 or better,
    then cast to the parameter's type.
    """
    parameters: dict[str, Tensor] = {}
    added: list[tuple[SiteMask, Tensor]] = []
    for site_mask in site_masks:
        site, module, prefix, k, k_delta, reference = site_mask
        change = site.weight_change(k, k_delta)
        if change is None:
            continue
        weight = module._parameters["weight"].detach()  # type: ignore[union-attr]
        folded = weight + change
        if reference is not None:
            term = -site.through(change, reference)
            if term.ndim > 1:
                added.append((site_mask, term))
            elif site.kind.reads_ids:
                folded = folded + term  # an embedding has no bias: every row of it carries the term instead
            else:
                bias = module._parameters["bias"]
                # A Linear without bias accepts one here: its parameters hold the key, with None.
                parameters[prefix + "bias"] = (term if bias is None else bias.detach() + term).to(weight.dtype)
        parameters[prefix + "weight"] = folded.to(weight.dtype)
    return Folded(parameters, added)


def terms_added(
    added: Sequence[tuple[SiteMask, Float[Tensor, "*#lead O"]]], mask_shape: Sequence[int]
) -> AbstractContextManager[None]:
    """A context in which each of the sites' modules adds its term to its output."""

    def adds(site: Site, term: Tensor) -> OutputRule:
        def rule(x: Tensor, output: Tensor) -> Tensor:
            return output + _fit_reference(site, term, term.shape[:-1], output.shape[:-1]).to(output.dtype)

        return rule

    return _output_rules([(where.site.name, where.module, adds(where.site, term)) for where, term in added], mask_shape)


def masked_per_token(site_masks: Sequence[SiteMask], mask_shape: Sequence[int]) -> AbstractContextManager[None]:
    """A context in which each site answers under its own mask for every token.

    Raises (from the target's call, inside the context):
        UserError: at some site the mask or the reference does not fit the leading dimensions of the input.
    """
    first_lead: list[tuple[str, torch.Size]] = []

    def masks(site_mask: SiteMask) -> OutputRule:
        site, _, _, k, k_delta, reference = site_mask

        def rule(x: Tensor, output: Tensor) -> Tensor:
            lead = output.shape[:-1]
            if not first_lead:
                first_lead.append((site.name, lead))
            _require_same_rank(site, lead, *first_lead[0], mask_shape)
            for part in (k, k_delta):
                if part is not None:
                    _require_broadcast(site, part.shape[:-1], lead, mask_shape)
            if reference is None:
                fitted = None
            else:
                ids = not reference.is_floating_point()
                fitted = _fit_reference(site, reference, reference.shape if ids else reference.shape[:-1], lead)
            change = site.output_change(x, fitted, k, k_delta)
            return output if change is None else output + change.to(output.dtype)

        return rule

    return _output_rules([(where.site.name, where.module, masks(where)) for where in site_masks], mask_shape)


OutputRule = Callable[[Tensor, Tensor], Tensor]
"""From a module's input and its output to the output it gives instead."""


@contextmanager
def _output_rules(rules: Sequence[tuple[str, nn.Module, OutputRule]], mask_shape: Sequence[int]) -> Iterator[None]:
    """Forward hooks on the target while it runs, removed whatever happens.

    Some modules read the weight of a child without ever calling it (the output projection of `nn.MultiheadAttention`),
    and a hook there would silently do nothing: that is refused once the target has run.
    """
    uncalled = {name for name, _, _ in rules}

    def hook_for(name: str, rule: OutputRule) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            uncalled.discard(name)
            return rule(args[0] if args else next(iter(kwargs.values())), output)

        return hook

    handles = []
    try:
        for name, module, rule in rules:
            handles.append(module.register_forward_hook(hook_for(name, rule), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if uncalled:
        raise UserError(
            f"site {min(uncalled)!r} is never called in a forward pass (its weight may be read directly, or not at all): "
            f"only a mask and a reference shared by all tokens reach it, not a mask of shape {list(mask_shape)} with this reference"
        )


def _require_same_rank(
    site: Site, lead: torch.Size, first_name: str, first_lead: torch.Size, mask_shape: Sequence[int]
) -> None:
    """`[L, n]` means positions where inputs are `[B, T, I]` and examples where they are `[B, I]`: sites must agree which."""
    if len(lead) != len(first_lead):
        raise UserError(
            f"site {site.name!r} reads leading dimensions {list(lead)} where site {first_name!r} reads {list(first_lead)}: "
            f"a mask of shape {list(mask_shape)} cannot mean the same at both; use a mask [n] or leave one site out"
        )


def _require_broadcast(site: Site, shape: torch.Size, lead: torch.Size, mask_shape: Sequence[int]) -> None:
    if not _broadcasts(shape, lead):
        raise UserError(
            f"mask of shape {list(mask_shape)} at site {site.name!r}: its leading dimensions {list(shape)} do not broadcast "
            f"against {list(lead)}, the leading dimensions of what the site reads"
        )


def _fit_reference(site: Site, value: Tensor, shape: torch.Size, lead: torch.Size) -> Tensor:
    """`value` with leading dimensions `shape`, for a site that reads leading dimensions `lead`.

    A reference per position is cut to a shorter input: position `t` has the reference of position `t`.
    """
    if len(shape) == 1 < len(lead) and shape[0] > lead[-1]:
        return value[: lead[-1]]
    if not _broadcasts(shape, lead):
        raise UserError(
            f"reference at site {site.name!r} has leading dimensions {list(shape)}, which do not broadcast against "
            f"{list(lead)}, the leading dimensions of what the site reads"
        )
    return value


def _broadcasts(shape: torch.Size, lead: torch.Size) -> bool:
    """Whether `shape` broadcasts against `lead` without making it larger."""
    return len(shape) <= len(lead) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(lead), strict=False)
    )
