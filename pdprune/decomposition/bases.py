"""Components without training: singular vectors, neurons, attention heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.sites import EMBEDDING, kind_of, require_kind, weight_of
from pdprune.errors import UserError

Basis = Literal["svd", "neuron", "head"]

READ_BY_ALL_HEADS = frozenset({"q", "q_proj", "query", "k", "k_proj", "key", "v", "v_proj", "value"}) | frozenset(
    {"c_attn", "in_proj", "qkv", "qkv_proj", "query_key_value", "Wqkv"}
)
"""Last names of modules that make queries, keys or values, apart or fused."""


def decompose(
    target: nn.Module, sites: Sequence[str] | str, basis: Basis, n_heads: int | None = None
) -> DecomposedModel:
    """Decompose the sites of a target in a basis that needs no training.

    Args:
        target: any module.
        sites: patterns on module paths, such as `"*.mlp.down"` (`*` also crosses dots). The sites come in the
            target's order, each once.
        basis: `"svd"`: `min(I, O)` components a site, largest singular value first, a node each. `"neuron"`: a
            component and node for each input column of the site, that is for each neuron that the site reads.
            `"head"`: the same components, the columns of one attention head forming one node; for the output
            projections of attention (with grouped queries, a head is a query's). Other parts of a network whose names
            say what they are, and fused queries, keys and values, have no columns that belong to a head.
        n_heads: for `"head"`; by default from `target.config` (`n_heads`, `num_attention_heads` or `n_head`).

    Raises:
        UserError: a pattern that matches no site, an unknown basis, columns that do not divide into heads.
    """
    modules = matching_sites(target, [sites] if isinstance(sites, str) else sites)
    match basis:
        case "svd":
            svds = {name: singular_components(weight_of(m, require_kind(name, m))) for name, m in modules.items()}
            labels = [f"{name}:svd{c}" for name, (_, U) in svds.items() for c in range(U.shape[0])]
            model = DecomposedModel.from_components(target, svds, labels=labels)
            model.recipe = "svd"
            return model
        case "neuron":
            return DecomposedModel.from_components(target, _columns(modules))
        case "head":
            columns = _columns(modules)
            n_heads = n_heads if n_heads is not None else configured_heads(target)
            nodes, labels = [], []
            for name, (_, U) in columns.items():
                _require_output_of_heads(name, target)
                width = _head_width(name, modules[name], U.shape[0], n_heads)
                for head in range(n_heads):
                    nodes.append([(name, c) for c in range(head * width, (head + 1) * width)])
                    labels.append(f"{name}:head{head}")
            return DecomposedModel.from_components(target, columns, nodes, labels)
        case _:
            raise UserError(f"basis is {basis!r}: expected 'svd', 'neuron' or 'head'")


def matching_sites(target: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The sites of a target whose path matches any of the patterns, in the target's order.

    A module under two paths is one site, under its first path.

    Raises:
        UserError: no pattern at all, or one that matches no site.
    """
    paths = dict(target.named_modules(remove_duplicate=False))
    first_path: dict[nn.Module, str] = {}
    for path, module in paths.items():
        if kind_of(module) is not None:
            first_path.setdefault(module, path)
    if not patterns:
        raise UserError(f"no site pattern given: the target's sites are {_listed(first_path.values())}")
    matched: set[nn.Module] = set()
    for pattern in patterns:
        if pattern in paths:
            require_kind(pattern, paths[pattern])  # a module named outright gets the reason why it is no site
        hits = {paths[path] for path in paths if fnmatchcase(path, pattern)} & first_path.keys()
        if not hits:
            raise UserError(
                f"site pattern {pattern!r} matches nothing: the target's sites are {_listed(first_path.values())}"
            )
        matched |= hits
    return {path: module for module, path in first_path.items() if module in matched}


def singular_components(W: Float[Tensor, "O I"]) -> tuple[Float[Tensor, "I C"], Float[Tensor, "C O"]]:
    """`(V, U)` with `V U = Wᵀ` up to `W`'s precision, and `C = min(I, O)`.

    Columns of `V` are of unit length, so an activation is a coordinate of the input; `U` carries the singular values.
    Each column's largest entry is positive: the sign that a singular value decomposition leaves open.
    """
    left, values, right = torch.linalg.svd(W.double(), full_matrices=False)  # W = left · values · right
    at = right.abs().argmax(dim=1, keepdim=True)
    sign = right.gather(1, at).sign()
    return (right * sign).t().to(W.dtype), (left * values).t().mul(sign).to(W.dtype)


def _columns(modules: dict[str, nn.Module]) -> dict[str, tuple[None, Tensor]]:
    """One component per input column: `V` is the identity and `U` the transposed weight."""
    return {name: (None, weight_of(module, require_kind(name, module)).t()) for name, module in modules.items()}


def configured_heads(target: nn.Module) -> int:
    """The number of attention heads of a layer, as the target's config says.

    Raises:
        UserError: it does not.
    """
    config = getattr(target, "config", None)
    for key in ("n_heads", "num_attention_heads", "n_head"):
        n_heads = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
        if isinstance(n_heads, int):
            return n_heads
    raise UserError(
        "dividing into heads needs n_heads: the target has no config with n_heads, num_attention_heads or n_head"
    )


def _require_output_of_heads(name: str, target: nn.Module) -> None:
    """Refuse a site whose input columns are known to belong to no head: they would divide all the same."""
    *path, last = name.split(".")
    is_hugging_face = hasattr(getattr(target, "config", None), "model_type")
    if last in READ_BY_ALL_HEADS:
        reads = "the residual stream, as a whole for every head"
    elif "mlp" in path or (is_hugging_face and not any("att" in part for part in path)):
        reads = "something else than the outputs of attention"
    else:
        return
    raise UserError(
        f"site {name!r} reads {reads}: basis 'head' is for output projections of attention only; name those alone "
        "(such as '*.attn.c_proj', '*.o_proj', '*.attention.dense'), or take basis 'svd' or 'neuron'"
    )


def _head_width(name: str, module: nn.Module, n_columns: int, n_heads: int) -> int:
    if kind_of(module) is EMBEDDING:
        raise UserError(
            f"site {name!r} is an Embedding: basis 'head' groups the input columns of attention output projections"
        )
    if n_heads < 1 or n_columns % n_heads:
        raise UserError(f"site {name!r} reads {n_columns} columns, which do not divide into n_heads={n_heads} heads")
    return n_columns // n_heads


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(repr(path) for path in paths) or "none"
