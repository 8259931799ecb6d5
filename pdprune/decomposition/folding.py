"""Two ways to run a target under a mask, equal in values and gradients.

Folded: one mask for all tokens becomes part of the weights, and the target runs at its own speed. The cost beyond
the target's own training step is `C·I·O` per site, however many tokens there are.

Per token: masks that differ between examples or positions are applied to each site's output by forward hooks.

Both take masks as `k = m - 1`, split by site, with None where nothing is taken away. Shape letters as in `sites.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
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


class Change(NamedTuple):
    """What a shared mask changes at one site."""

    weight: Float[Tensor, "..."]
    """Added to the target's parameter, and laid out as that is."""
    term: Float[Tensor, "*#lead O"] | None
    """What the reference adds to the output; None without one."""


class Folded(NamedTuple):
    """A target under one shared mask: what it runs with in place of its own parameters, and what to add."""

    parameters: dict[str, Tensor]
    added: list[tuple[SiteMask, Float[Tensor, "*#lead O"]]]
    """Output terms of references that differ between tokens: no bias can hold them."""


def fold(site_masks: Sequence[SiteMask], known: Mapping[str, Change] = MappingProxyType({})) -> Folded:
    """Fold one mask for all tokens into weights and biases.

    `W(m) = W + D` and `b(m) = b - D x̄`, with the change `D = -(V·diag(1-m)·U)ᵀ - (1-m_Δ)·Δ`. Summed in float32 or
    better, then cast to the parameter's type.

    Args:
        site_masks: the mask.
        known: changes that are worked out already, by site.
    """
    parameters: dict[str, Tensor] = {}
    added: list[tuple[SiteMask, Tensor]] = []
    for site_mask in site_masks:
        site, module, prefix, *_ = site_mask
        change = known[site.name] if site.name in known else _change(site_mask)
        if change is None:
            continue
        weight = module._parameters["weight"].detach()  # type: ignore[union-attr]
        folded = weight + change.weight
        if (term := change.term) is not None:
            if term.ndim > 1:
                added.append((site_mask, term))
            elif site.kind.reads_ids:
                folded = folded + term  # an embedding has no bias: every row of it carries the term instead
            else:
                bias = module._parameters["bias"]
                # A Linear without bias accepts one here: its parameters hold the key, with None.
                folded_bias = term if bias is None else bias.detach() + term
                parameters[prefix + "bias"] = folded_bias.to(weight.dtype)
        parameters[prefix + "weight"] = folded.to(weight.dtype)
    return Folded(parameters, added)


def _change(site_mask: SiteMask) -> Change | None:
    site, reference = site_mask.site, site_mask.reference
    weight = site.weight_change(site_mask.k, site_mask.k_delta)
    if weight is None:
        return None
    return Change(weight, None if reference is None else -site.through(weight, reference))


def terms_added(added: Sequence[tuple[SiteMask, Float[Tensor, "*#lead O"]]]) -> AbstractContextManager[None]:
    """A context in which each of the sites' modules adds its term to its output."""

    def adds(site: Site, term: Tensor) -> OutputRule:
        def rule(x: Tensor, output: Tensor) -> Tensor:
            fitted = _fit_reference(site, term, term.shape[:-1], output.shape[:-1])
            return output + fitted.to(output.dtype)

        return rule

    return output_rules([(at.site.name, at.module, adds(at.site, term)) for at, term in added])


def masked_per_token(site_masks: Sequence[SiteMask]) -> AbstractContextManager[None]:
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
            _require_same_rank(site, lead, *first_lead[0])
            for what, part in (("mask", k), ("delta_mask", k_delta)):
                if part is not None:
                    _require_broadcast(what, site, part.shape[:-1], lead)
            fitted = None
            if reference is not None:
                per_token = reference.shape[:-1] if reference.is_floating_point() else reference.shape
                fitted = _fit_reference(site, reference, per_token, lead)
            change = site.output_change(x, fitted, k, k_delta)
            return output if change is None else output + change.to(output.dtype)

        return rule

    return output_rules([(at.site.name, at.module, masks(at)) for at in site_masks])


OutputRule = Callable[[Tensor, Tensor], Tensor]
"""From a module's input and its output to the output it gives instead."""


@contextmanager
def output_rules(rules: Sequence[tuple[str, nn.Module, OutputRule]]) -> Iterator[None]:
    """Forward hooks on the target while it runs, removed whatever happens.

    Some modules read the weight of a child without ever calling it (`nn.MultiheadAttention` and its output
    projection), and a hook there would silently do nothing: that is refused once the target has run.
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
            f"site {min(uncalled)!r} is never called in a forward pass (its weight may be read directly, or not at "
            "all): only a mask and a reference shared by all tokens can reach it, not ones that differ between them"
        )


def _require_same_rank(site: Site, lead: torch.Size, first_name: str, first_lead: torch.Size) -> None:
    """A mask `[L, n]` means positions where sites read `[B, T, I]`, examples where they read `[B, I]`: not both."""
    if len(lead) != len(first_lead):
        raise UserError(
            f"site {site.name!r} reads leading dimensions {list(lead)} where site {first_name!r} reads "
            f"{list(first_lead)}: only a mask [n] means the same at both; use one, or leave one of the sites out"
        )


def _require_broadcast(what: str, site: Site, shape: torch.Size, lead: torch.Size) -> None:
    if not _broadcasts(shape, lead):
        raise UserError(
            f"{what} at site {site.name!r} has leading dimensions {list(shape)}, which do not broadcast against "
            f"{list(lead)}, the leading dimensions of what the site reads"
        )


def _fit_reference(site: Site, value: Tensor, shape: torch.Size, lead: torch.Size) -> Tensor:
    """`value` with leading dimensions `shape`, for a site that reads leading dimensions `lead`.

    A reference per position is cut to a shorter input: position `t` has the reference of position `t`.
    """
    if len(shape) == 1 < len(lead) and shape[0] > lead[-1]:
        return value[: lead[-1]]
    _require_broadcast("reference", site, shape, lead)
    return value


def _broadcasts(shape: torch.Size, lead: torch.Size) -> bool:
    """Whether `shape` broadcasts against `lead` without making it larger."""
    aligned = zip(reversed(shape), reversed(lead), strict=False)
    return len(shape) <= len(lead) and all(size in (1, full) for size, full in aligned)
