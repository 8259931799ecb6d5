"""Given components, checked and turned into the sites and nodes of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdprune.decomposition.sites import Site, kind_of, require_kind, weight_of
from pdprune.errors import UserError


class Node(NamedTuple):
    """The unit that a circuit keeps or not."""

    components: tuple[tuple[str, int], ...]
    """`(site, index)` of each component of the group."""
    label: str
    """For people to read: `"blocks.0.mlp.down:12"`."""


def build(
    target: nn.Module,
    components: Mapping[str, tuple[Float[Tensor, "I C"] | None, Float[Tensor, "C O"]]],
    nodes: Sequence[Sequence[tuple[str, int]]] | None,
    labels: Sequence[str] | None,
) -> tuple[list[Site], list[Node]]:
    """The sites and nodes of `DecomposedModel.from_components`, whose arguments these are.

    Raises:
        UserError: as told there.
    """
    if not components:
        raise UserError("no components given: expected {module path: (V, U)} with at least one site")
    _require_finite_parameters(target)
    modules = _site_modules(target, list(components))
    factors = {name: _checked_factors(name, modules[name], *components[name]) for name in components}
    sizes = {name: U.shape[0] for name, (_, U) in factors.items()}
    node_list = _nodes(sizes, nodes, labels)
    node_index = {name: [-1] * size for name, size in sizes.items()}
    for index, node in enumerate(node_list):
        for name, component in node.components:
            node_index[name][component] = index
    sites = []
    for name, (V, U) in factors.items():
        kind = require_kind(name, modules[name])
        delta = _delta(weight_of(modules[name], kind), V, U)
        sites.append(Site(name, kind, V, U, delta, torch.tensor(node_index[name], device=U.device)))
    return sites, node_list


def _require_finite_parameters(target: nn.Module) -> None:
    for name, parameter in target.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"parameter {name!r} of the target is not initialised yet: run the target once first")
        if not torch.isfinite(parameter.detach()).all():
            raise UserError(f"parameter {name!r} of the target holds NaN or infinite values: expected finite weights")


def _site_modules(target: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules at these paths, each of a kind that can be a site and none twice."""
    by_path = dict(target.named_modules(remove_duplicate=False))
    found: dict[nn.Module, str] = {}
    for name in names:
        if name not in by_path:
            available = [path for path, module in by_path.items() if kind_of(module) is not None]
            sites = ", ".join(map(repr, available)) or "none"
            raise UserError(f"the target has no module {name!r}: its sites are {sites}")
        require_kind(name, by_path[name])
        if by_path[name] in found:
            raise UserError(f"sites {found[by_path[name]]!r} and {name!r} are one and the same module: name it once")
        found[by_path[name]] = name
    return {name: module for module, name in found.items()}


def _checked_factors(name: str, module: nn.Module, V: Tensor | None, U: Tensor) -> tuple[Tensor | None, Tensor]:
    """Copies of a site's factors, beside its weight and in its precision or float32. An identity `V` becomes None."""
    W = weight_of(module, require_kind(name, module))
    d_out, d_in = W.shape
    n_components = d_in if V is None else V.shape[-1] if V.ndim else 0
    for factor, letter, expected in ((V, "V", [d_in, n_components]), (U, "U", [n_components, d_out])):
        if factor is None:
            continue
        if list(factor.shape) != expected or n_components == 0:
            raise UserError(
                f"{letter} of site {name!r} has shape {list(factor.shape)}, expected {expected}: "
                f"V [{d_in}, C] and U [C, {d_out}] for a weight that maps {d_in} to {d_out}"
            )
        if not torch.isfinite(factor).all():
            raise UserError(f"{letter} of site {name!r} holds NaN or infinite values: expected finite components")
    if V is not None and _is_identity(V):
        V = None
    return (None if V is None else V.detach().to(W, copy=True)), U.detach().to(W, copy=True)


def _is_identity(V: Tensor) -> bool:
    return V.shape[0] == V.shape[1] and bool((V.diagonal() == 1).all()) and int(V.count_nonzero()) == V.shape[0]


def _delta(W: Float[Tensor, "O I"], V: Float[Tensor, "I C"] | None, U: Float[Tensor, "C O"]) -> Tensor | None:
    """`W - (V U)ᵀ`, or None if that is no more than float error.

    The error of a sum grows with its terms, not with the sum: components that cancel are measured by their own size.
    """
    W64, U64 = W.double(), U.double()
    if V is None:
        total, terms = U64.t(), U64.abs().t()
    else:
        total, terms = (V.double() @ U64).t(), (V.double().abs() @ U64.abs()).t()
    delta = W64 - total
    float_error = 32 * torch.finfo(W.dtype).eps * (W64.norm() + terms.norm())
    return None if delta.norm() <= float_error else delta.to(W.dtype)


def _nodes(
    sizes: Mapping[str, int], groups: Sequence[Sequence[tuple[str, int]]] | None, labels: Sequence[str] | None
) -> list[Node]:
    """Nodes from groups of components, which must hold each of the components exactly once."""
    if groups is None:
        groups = [[(name, c)] for name, size in sizes.items() for c in range(size)]
    if labels is not None and len(labels) != len(groups):
        raise UserError(f"{len(labels)} labels for {len(groups)} nodes: expected one each")
    owner: dict[tuple[str, int], int] = {}
    for index, group in enumerate(groups):
        if not group:
            raise UserError(f"node {index} has no components: expected at least one")
        for name, c in group:
            if name not in sizes:
                raise UserError(
                    f"node {index} names site {name!r}, which has no components: expected one of {', '.join(sizes)}"
                )
            if not 0 <= c < sizes[name]:
                raise UserError(f"node {index} names component {c} of site {name!r}: expected 0 to {sizes[name] - 1}")
            if (name, c) in owner:
                raise UserError(
                    f"component {c} of site {name!r} is in node {owner[name, c]} and in node {index}: expected one node"
                )
            owner[name, c] = index
    if len(owner) < sum(sizes.values()):
        name, c = next((name, c) for name, size in sizes.items() for c in range(size) if (name, c) not in owner)
        raise UserError(f"component {c} of site {name!r} is in no node: every component belongs to exactly one")
    if labels is None:
        labels = [default_label(group) for group in groups]
    return [
        Node(tuple((name, int(c)) for name, c in group), label) for group, label in zip(groups, labels, strict=True)
    ]


def default_label(group: Sequence[tuple[str, int]]) -> str:
    """What a node of these components is called unless it is given a name."""
    name, c = group[0]
    return f"{name}:{c}" if len(group) == 1 else f"{name}:{c} and {len(group) - 1} more"
