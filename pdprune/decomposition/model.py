"""A target network as a sum of components, and its outputs under masks of them.

The formulas are those of Bushnaq et al. 2025 (SPD, arXiv 2506.20790) with a delta and a reference added:

    y = b + Σ_c ( m_c a_c + (1 - m_c) μ_c ) U[c] + Δ ( m_Δ x + (1 - m_Δ) x̄ ),   a_c = x·V[:, c],   μ_c = x̄·V[:, c]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pdprune.decomposition.folding import SiteMask, fold, masked_per_token, terms_added
from pdprune.decomposition.sites import EMBEDDING, Site, at_least_float32, kind_of, require_kind, weight_of
from pdprune.errors import UserError


class Node(NamedTuple):
    """The unit that a circuit keeps or not."""

    components: tuple[tuple[str, int], ...]
    """`(site, index)` of each component of the group."""
    label: str
    """For people to read: `"blocks.0.mlp.down:12"`."""


class DecomposedModel(nn.Module):
    """A frozen target whose components can be masked, node by node.

    The target is left as it was found: its mode, its parameters and their `requires_grad`, its hooks. It runs in eval
    mode and its parameters get no gradients; `train()` on this module or on one that holds it does not reach it.

    Attributes:
        target: the network; its parameters move with `.to()` and are part of `state_dict()`.
        target_name: what to call it in results; the name of its class unless set.
        sites: by module path, in the order given.
        site_names: their names, in that order.
        nodes: what can be kept or not, one entry of a mask each.
        n_nodes, n_sites: how many.
        delta_sites: `Bool[n_sites]`, where the components do not sum to the weight.
    """

    delta_sites: Bool[Tensor, " n_sites"]
    _node_index: Int[Tensor, " all_components"]

    def __init__(self, target: nn.Module, sites: Sequence[Site], nodes: Sequence[Node]) -> None:
        """From parts that are known to fit; `from_components` checks them first."""
        super().__init__()
        self.target = target
        self.target_name = type(target).__name__
        self.site_list = nn.ModuleList(sites)
        self.sites = {site.name: site for site in sites}
        self.site_names = list(self.sites)
        self.nodes = list(nodes)
        self.n_nodes = len(self.nodes)
        self.n_sites = len(self.sites)
        self._has_deltas = any(site.has_delta for site in sites)
        self.register_buffer("delta_sites", torch.tensor([site.has_delta for site in sites]), persistent=False)

        # Every component's node, site after site: one gather and one split hand a mask to all sites. Where each
        # component is a node of its own, the gather would change nothing and is left out.
        node_index = torch.cat([site.node_index for site in sites])
        self.register_buffer("_node_index", node_index, persistent=False)
        self._split_sizes = [site.n_components for site in sites]
        self._mask_is_by_component = torch.equal(node_index, torch.arange(self.n_nodes, device=node_index.device))

        # Each parameter once per module that owns it (a module under two paths counts once): tied weights stay apart.
        module_paths = {module: name for name, module in target.named_modules()}
        self._target_modules = list(module_paths)
        self._target_parameters = [
            (_join(path, key), module._parameters, key)
            for module, path in module_paths.items()
            for key in module._parameters
        ]
        self._site_modules = [target.get_submodule(site.name) for site in sites]
        self._site_prefixes = [_join(module_paths[module], "") for module in self._site_modules]
        self._embeddings = [
            module for site, module in zip(sites, self._site_modules, strict=True) if site.kind is EMBEDDING
        ]

    @classmethod
    def from_components(
        cls,
        target: nn.Module,
        components: Mapping[str, tuple[Float[Tensor, "I C"] | None, Float[Tensor, "C O"]]],
        nodes: Sequence[Sequence[tuple[str, int]]] | None = None,
        labels: Sequence[str] | None = None,
    ) -> DecomposedModel:
        """Decompose a target into given components.

        Args:
            target: any module; its sites are `nn.Linear`, `nn.Embedding` and Hugging Face `Conv1D` modules in it.
            components: `(V, U)` by module path. `V=None` is the identity: one component per input column. What they leave
                over of the weight becomes the site's delta; less than float error counts as nothing.
            nodes: groups of `(site, component)`, each component in exactly one; by default each is a node of its own, in the
                order of sites as given, then components.
            labels: one per node, for people to read.

        Raises:
            UserError: a path that is no site, factors of the wrong shape, groups that do not partition the
                components, weights that are not finite.
        """
        if not components:
            raise UserError("no components given: expected {module path: (V, U)} with at least one site")
        _require_finite_parameters(target)
        modules = _site_modules(target, list(components))
        factors = {name: _checked_factors(name, modules[name], *components[name]) for name in components}
        sizes = {name: U.shape[0] for name, (_, U) in factors.items()}
        node_list = _nodes(sizes, nodes, labels)
        node_index = {name: torch.empty(size, dtype=torch.long) for name, size in sizes.items()}
        for index, node in enumerate(node_list):
            for name, component in node.components:
                node_index[name][component] = index
        sites = []
        for name, (V, U) in factors.items():
            kind = require_kind(name, modules[name])
            delta = _delta(weight_of(modules[name], kind), V, U)
            sites.append(Site(name, kind, V, U, delta, node_index[name].to(U.device)))
        return cls(target, sites, node_list)

    @property
    def node_signature(self) -> list[tuple[str, ...]]:
        """For each node, the sites it lives in: what a random circuit is matched by."""
        order = {name: i for i, name in enumerate(self.site_names)}
        return [tuple(sorted({name for name, _ in node.components}, key=order.__getitem__)) for node in self.nodes]

    @property
    def target_sha256(self) -> str:
        """A fingerprint of the target: the names and tensors of its state. Reads every tensor."""
        return _sha256({name: value for name, value in self.target.state_dict().items() if isinstance(value, Tensor)})

    @property
    def decomposition_sha256(self) -> str:
        """A fingerprint of the sites, their components and the nodes they form. Reads every tensor."""
        tensors = {}
        for name, site in self.sites.items():
            tensors[f"{name} V"] = torch.empty(0) if site.has_identity_V else site.V
            tensors[f"{name} U"] = site.U
            tensors[f"{name} nodes"] = site.node_index
        return _sha256(tensors)

    def train(self, mode: bool = True) -> DecomposedModel:
        """Nothing in a frozen target trains: the mode of its modules is not touched."""
        self.training = mode
        return self

    def forward(
        self,
        inputs: Any,
        mask: Tensor | None = None,
        delta_mask: Tensor | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The target's own output, whatever its type, under masks. Gradients flow to `mask` and `delta_mask`.

        Args:
            inputs: a tensor, a tuple of arguments, or a dict of keyword arguments of the target.
            mask: 1 leaves a node alone, 0 ablates it; broadcasts against `[*lead, n_nodes]`, where `lead` are the leading
                dimensions of each site's input: `[n]`, `[T, n]`, `[B, 1, n]`, `[B, T, n]`, or `[B, n]` in networks without
                positions. None is all ones.
            delta_mask: the same for the deltas, `[*lead, n_sites]`. Entries of sites without a delta do nothing.
            reference: by site, the input `x̄` that ablated components see instead of their own; None is zero.
                `[I]`: one for all tokens; `[T, I]`: one per position; `[B, T, I]`: one per token. At an embedding
                frequencies of the ids, `[vocab]` or `[T, vocab]`, or ids `[B, T]`.

        Raises:
            UserError: a mask or reference that does not fit the nodes or some site's input.
        """
        args, kwargs = _call_arguments(inputs)
        if mask is not None:
            _require_width(mask, self.n_nodes, "mask", "nodes")
        if delta_mask is not None:
            _require_width(delta_mask, self.n_sites, "delta_mask", "sites")
            if not self._has_deltas:
                delta_mask = None
        if reference is not None and reference.keys() != self.sites.keys():
            name = min(reference.keys() ^ self.sites.keys())
            raise UserError(
                f"reference {'lacks' if name in self.sites else 'names an unknown'} site {name!r}: expected one entry a site"
            )
        shared = _is_shared(mask) and _is_shared(delta_mask)
        site_masks = self._site_masks(mask, delta_mask, reference, shared)
        parameters = self._frozen_parameters()
        with self._at_rest():
            if not site_masks:
                return self._call(parameters, args, kwargs)
            if shared:
                # Autocast would fold in half precision, and leave what is kept not quite alone.
                with torch.autocast(site_masks[0].site.U.device.type, enabled=False):
                    folded = fold(site_masks)
                parameters.update(folded.parameters)
                if not folded.added:
                    return self._call(parameters, args, kwargs)
                with terms_added(folded.added):
                    return self._call(parameters, args, kwargs)
            with masked_per_token(site_masks):
                return self._call(parameters, args, kwargs)

    def site_calls(self, inputs: Any) -> dict[str, list[Tensor]]:
        """What each site reads on an unablated run, one tensor a call: `[*lead, I]`, or ids `[*lead]` at an embedding.

        Raises:
            UserError: a site that the target does not call.
        """
        args, kwargs = _call_arguments(inputs)
        calls: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        handles = []
        try:
            for name, module in zip(self.sites, self._site_modules, strict=True):
                handles.append(module.register_forward_hook(_recorder(calls[name]), with_kwargs=True))
            with torch.no_grad(), self._at_rest():
                self.target(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, tensors in calls.items():
            if not tensors:
                raise UserError(f"site {name!r} is never called in a forward pass: what it reads cannot be seen")
        return calls

    def site_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """What each site reads on an unablated run: `[*lead, I]`, or ids `[*lead]` at an embedding.

        Raises:
            UserError: a site that the target calls several times, or not at all.
        """
        calls = self.site_calls(inputs)
        for name, tensors in calls.items():
            if len(tensors) > 1:
                raise UserError(
                    f"site {name!r} is called {len(tensors)} times in a forward pass: it has no single input"
                )
        return {name: tensors[0] for name, tensors in calls.items()}

    def _site_masks(
        self, mask: Tensor | None, delta_mask: Tensor | None, reference: Mapping[str, Tensor] | None, shared: bool
    ) -> list[SiteMask]:
        """The masks split by site, as what they take away; only sites where a mask was given to take anything."""
        U = self.sites[self.site_names[0]].U
        ks: Sequence[Tensor | None] = [None] * self.n_sites
        k_deltas: Sequence[Tensor | None] = ks
        if mask is not None:
            k = _taken_away(mask, U, shared)
            if not self._mask_is_by_component:
                k = k.index_select(-1, self._node_index)
            ks = k.split(self._split_sizes, -1)
        if delta_mask is not None:
            k_delta = _taken_away(delta_mask, U, shared)
            k_deltas = k_delta.unbind() if shared else k_delta.split(1, -1)
        return [
            SiteMask(site, module, prefix, k, k_delta, None if reference is None else reference[name])
            for (name, site), module, prefix, k, k_delta in zip(
                self.sites.items(), self._site_modules, self._site_prefixes, ks, k_deltas, strict=True
            )
            if k is not None or (k_delta is not None and site.has_delta)
        ]

    def _frozen_parameters(self) -> dict[str, Tensor]:
        """Stand-ins for the parameters that would otherwise get gradients."""
        return {
            name: parameter.detach()
            for name, parameters, key in self._target_parameters
            if (parameter := parameters[key]) is not None and parameter.requires_grad
        }

    def _call(self, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not parameters:
            return self.target(*args, **kwargs)
        return torch.func.functional_call(self.target, parameters, args, kwargs, tie_weights=False)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The target in eval mode, with exact gradients into embedding weights; everything as it was afterwards."""
        in_training = [module for module in self._target_modules if module.training]
        # These change no output, only the gradient into the weight: padding rows would get none, for one.
        options = [
            (module, name, value, plain)
            for module in self._embeddings
            for name, plain in (("padding_idx", None), ("scale_grad_by_freq", False), ("sparse", False))
            if (value := getattr(module, name)) is not plain
        ]
        for module in in_training:
            module.training = False
        for module, name, _, plain in options:
            setattr(module, name, plain)
        try:
            yield
        finally:
            for module in in_training:
                module.training = True
            for module, name, value, _ in options:
                setattr(module, name, value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match inputs:
        case Mapping():
            return (), dict(inputs)
        case tuple() | list():
            return tuple(inputs), {}
        case _:
            return (inputs,), {}


def _recorder(calls: list[Tensor]) -> Any:
    """A forward hook that keeps what a module reads."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0] if args else next(iter(kwargs.values()))).detach())

    return hook


def _require_width(mask: Tensor, width: int, what: str, unit: str) -> None:
    if mask.ndim == 0 or mask.shape[-1] != width:
        raise UserError(
            f"{what} has shape {list(mask.shape)}, expected [..., {width}]: one entry for each of the {width} {unit}"
        )


def _is_shared(mask: Tensor | None) -> bool:
    """Whether all tokens are under one mask."""
    return mask is None or mask.ndim == 1 or mask.numel() == mask.shape[-1]


def _taken_away(mask: Tensor, like: Tensor, shared: bool) -> Tensor:
    """A mask minus one, where and as the components are; `[n]` if shared."""
    k = at_least_float32(mask.to(like)) - 1
    return k.reshape(-1) if shared else k


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
            raise UserError(
                f"the target has no module {name!r}: its sites are {', '.join(map(repr, available)) or 'none'}"
            )
        require_kind(name, by_path[name])
        if by_path[name] in found:
            raise UserError(f"sites {found[by_path[name]]!r} and {name!r} are one and the same module: name it once")
        found[by_path[name]] = name
    return {name: module for module, name in found.items()}


def _checked_factors(name: str, module: nn.Module, V: Tensor | None, U: Tensor) -> tuple[Tensor | None, Tensor]:
    """Copies of a site's factors, beside its weight and in its precision or float32; V is None if it is the identity."""
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
        labels = [_label(group) for group in groups]
    return [
        Node(tuple((name, int(c)) for name, c in group), label) for group, label in zip(groups, labels, strict=True)
    ]


def _label(group: Sequence[tuple[str, int]]) -> str:
    name, c = group[0]
    return f"{name}:{c}" if len(group) == 1 else f"{name}:{c} and {len(group) - 1} more"


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes, the same in every process."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
