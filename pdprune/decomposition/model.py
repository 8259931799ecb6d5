"""A target network as a sum of components, and its outputs under masks of them.

The formulas are those of Bushnaq et al. 2025 (SPD, arXiv 2506.20790) with a delta and a reference added:

    y = b + Σ_c ( m_c a_c + (1 - m_c) μ_c ) U[c] + Δ ( m_Δ x + (1 - m_Δ) x̄ ),   a_c = x·V[:, c],   μ_c = x̄·V[:, c]
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pdprune.decomposition.building import Node, build
from pdprune.decomposition.compiled import CompiledCall, has_hooks
from pdprune.decomposition.folding import SiteMask, fold, masked_per_token, terms_added
from pdprune.decomposition.norms import norms_frozen, norms_of, scale_of
from pdprune.decomposition.sites import EMBEDDING, Site, at_least_float32
from pdprune.decomposition.stacked import Stack, Stacks, changes_by_site, serves_all
from pdprune.errors import UserError
from pdprune.fingerprints import bytes_of

if TYPE_CHECKING:
    from pdprune.decomposition.importances import CausalImportances


NARROW_BELOW = 0.75
"""Components are left out of products where no more than this share of a site's can be taken away."""


class Observed(NamedTuple):
    """One unablated run of a target."""

    output: Any
    site_inputs: dict[str, Tensor]
    """What each site read: `[*lead, I]`, or ids `[*lead]` at an embedding."""


class Narrowed(NamedTuple):
    """A model's sites with only those components that a series of masks may take away: the others cost no products."""

    sites: list[Site]
    components: list[Int[Tensor, " open"] | None]
    """Which components each of the sites has left; None where they are all there."""


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
        recipe: how the components follow from the weights, where they do ("svd"); None if they were given. Last bits
            of a singular value decomposition differ between machines and numbers of threads, so the fingerprint is
            then that of the recipe and the weights.
        can_batch: whether several masks can run as one batch, as far as is known (see `adversary/together.py`).
        folds_together: whether small sites of one shape are folded by one product (`stacked.py`); None, as at first, is
            wherever the model is not on a CPU.
        importances: functions that say how much each component matters on an input, where they were learned.
    """

    delta_sites: Bool[Tensor, " n_sites"]
    _node_index: Int[Tensor, " all_components"]

    def __init__(self, target: nn.Module, sites: Sequence[Site], nodes: Sequence[Node]) -> None:
        """From parts that are known to fit; `from_components` checks them first."""
        super().__init__()
        self.target = target
        self.target_name = type(target).__name__
        self.recipe: str | None = None
        self.importances: CausalImportances | None = None
        self.can_batch = True
        self.folds_together: bool | None = None
        self._stacks: Stacks | None = None
        self._compiled: CompiledCall | None = None
        self.site_list = nn.ModuleList(sites)
        self.sites = {site.name: site for site in sites}
        self.site_names = list(self.sites)
        self.nodes = list(nodes)
        self.n_nodes = len(self.nodes)
        self.n_sites = len(self.sites)
        self._has_deltas = any(site.has_delta for site in sites)
        delta_sites = torch.tensor([site.has_delta for site in sites], device=sites[0].U.device)
        self.register_buffer("delta_sites", delta_sites, persistent=False)

        # Every component's node, site after site: one gather and one split hand a mask to all sites. Where each
        # component is a node of its own, the gather would change nothing and is left out.
        node_index = torch.cat([site.node_index for site in sites])
        self.register_buffer("_node_index", node_index, persistent=False)
        self._split_sizes = [site.n_components for site in sites]
        self._mask_is_by_component = torch.equal(node_index, torch.arange(self.n_nodes, device=node_index.device))

        # Each parameter once per module that owns it (a module under two paths counts once): tied weights stay apart.
        module_paths = {module: name for name, module in target.named_modules()}
        self._target_modules = list(module_paths)
        self._place_of = {
            _join(path, key): (module._parameters, key)
            for module, path in module_paths.items()
            for key in module._parameters
        }
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
            components: `(V, U)` by module path. `V=None` is the identity: one component per input column. What they
                leave over of the weight becomes the site's delta; less than float error counts as nothing.
            nodes: groups of `(site, component)`, each component in exactly one; by default each is a node of its own,
                in the order of sites as given, then components.
            labels: one per node, for people to read.

        Raises:
            UserError: a path that is no site, factors of the wrong shape, groups that do not partition the
                components, weights that are not finite.
        """
        sites, node_list = build(target, components, nodes, labels)
        return cls(target, sites, node_list)

    @property
    def node_signature(self) -> list[tuple[str, ...]]:
        """For each node, the sites it lives in: what a random circuit is matched by."""
        order = {name: i for i, name in enumerate(self.site_names)}
        return [tuple(sorted({name for name, _ in node.components}, key=order.__getitem__)) for node in self.nodes]

    @property
    def target_sha256(self) -> str:
        """A fingerprint of the target: the names and tensors of its state. Reads every tensor."""
        return fingerprint(self.target)

    @property
    def decomposition_sha256(self) -> str:
        """A fingerprint of the sites, their components and the nodes they form. Reads every tensor."""
        tensors: dict[str, Tensor] = {}
        for (name, site), module in zip(self.sites.items(), self._site_modules, strict=True):
            if self.recipe is not None:
                tensors[f"{name} {self.recipe} of"] = module.get_parameter("weight")
            else:
                tensors[f"{name} V"] = torch.empty(0) if site.reads_columns else site.V
                tensors[f"{name} U"] = site.U
            tensors[f"{name} nodes"] = site.node_index
        return _sha256(tensors)

    def train(self, mode: bool = True) -> DecomposedModel:
        """Nothing in a frozen target trains: the mode of its modules is not touched."""
        self.training = mode
        return self

    def compile(self, **options: Any) -> None:
        """Compile the target's pass, for wherever one mask serves all tokens, or there is none.

        The first pass of each kind (shapes of inputs, with gradients or without) takes from seconds to minutes, those
        after it less time than before. What is computed differs by rounding. Passes that need hooks on the target
        (masks by token, frozen norms, references by token), or find some there, are not compiled.

        Args:
            options: of `torch.compile`.

        Raises:
            UserError: nothing can be compiled here; or, from the first pass of a kind, the target cannot be.
        """
        self._compiled = CompiledCall(self.delta_sites.device, options)

    @property
    def compiled_with(self) -> dict[str, Any] | None:
        """The options that `compile` was given; None where nothing is compiled."""
        return None if self._compiled is None else dict(self._compiled.options)

    def forward(
        self,
        inputs: Any,
        mask: Tensor | None = None,
        delta_mask: Tensor | None = None,
        reference: Mapping[str, Tensor] | None = None,
        sites: Collection[str] | None = None,
        narrowed: Narrowed | None = None,
        norm_scales: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The target's own output, whatever its type, under masks. Gradients flow to `mask` and `delta_mask`.

        Args:
            inputs: a tensor, a tuple of arguments, or a dict of keyword arguments of the target.
            mask: 1 leaves a node alone, 0 ablates it; broadcasts against `[*lead, n_nodes]`, where `lead` are the
                leading dimensions of each site's input: `[n]`, `[T, n]`, `[B, 1, n]`, `[B, T, n]`, or `[B, n]` in
                networks without positions. None is all ones.
            delta_mask: the same for the deltas, `[*lead, n_sites]`. Entries of sites without a delta do nothing: where
                no site has one the output does not depend on it, and `torch.autograd.grad` wants `materialize_grads`.
            reference: by site, the input `x̄` that ablated components see instead of their own; None is zero.
                `[I]`: one for all tokens; `[T, I]`: one per position; `[B, T, I]`: one per token. At an embedding
                frequencies of the ids, `[vocab]` or `[T, vocab]`, or ids `[B, T]`.
            sites: only these are masked, whatever the masks say of the others; None is all of them.
            narrowed: from `narrowed_to`, for a shared mask that is 1 at all other nodes: saves their products.
            norm_scales: what the norms multiply by (`norm_scales`, of the same inputs); None leaves them live.

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
            fault = "lacks" if name in self.sites else "names an unknown"
            raise UserError(f"reference {fault} site {name!r}: expected one entry a site")
        shared = _is_shared(mask) and _is_shared(delta_mask)
        site_masks = self._site_masks(mask, delta_mask, reference, shared)
        if narrowed is not None and shared:
            site_masks = _narrow(site_masks, narrowed)
        if sites is not None:
            site_masks = [at for at in site_masks if at.site.name in sites]
        parameters = self._frozen_parameters()
        with self._at_rest(), self._norms_at(norm_scales):
            if not site_masks:
                return self._call(parameters, args, kwargs)
            if shared:
                # Autocast would fold in half precision, and leave what is kept not quite alone.
                with torch.autocast(site_masks[0].site.U.device.type, enabled=False):
                    folded = fold(site_masks, changes_by_site(self._stacked(), site_masks))
                parameters.update(folded.parameters)
                if not folded.added:
                    return self._call(parameters, args, kwargs)
                with terms_added(folded.added):
                    return self._call(parameters, args, kwargs)
            with masked_per_token(site_masks):
                return self._call(parameters, args, kwargs)

    def narrowed_to(self, nodes: Bool[Tensor, " n"], reference: Mapping[str, Tensor] | None = None) -> Narrowed:
        """What `forward` needs for masks that are 1 but for these nodes; made once, it serves any number of passes.

        Components are copied, so sites stay whole where that would save little, where reading costs no product, or
        where one product serves several sites, as it can under references that are the same for all tokens.

        Args:
            nodes: those that may be taken away.
            reference: what the passes are given as one.
        """
        together = reference is None or all(map(serves_all, reference.values()))
        stacked = {site for stack in self._stacked() for site in stack.sites} if together else set()
        open_components = nodes.to(self._node_index.device)[self._node_index].split(self._split_sizes)
        sites: list[Site] = []
        components: list[Tensor | None] = []
        for site, is_open in zip(self.sites.values(), open_components, strict=True):
            may_pay = not site.reads_columns and site not in stacked
            pays = may_pay and int(is_open.sum()) <= NARROW_BELOW * site.n_components
            left = is_open.nonzero().squeeze(-1) if pays else None
            components.append(left)
            sites.append(site if left is None else site.narrowed(left))
        return Narrowed(sites, components)

    def norm_scales(self, inputs: Any) -> dict[str, Tensor]:
        """What each norm of the target multiplies by on an unablated run: `[*lead, 1]` by module path, detached.

        Raises:
            UserError: a target without norms, with one of an unknown kind, or with one that it calls several times.
        """
        norms = norms_of(self.target)
        calls = self._recorded_run(inputs, norms)[1]
        for path, tensors in calls.items():
            if len(tensors) != 1:
                raise UserError(
                    f"norm_scales 'frozen': norm {path!r} is called {len(tensors)} times in a forward pass; expected "
                    "once: use norm_scales 'live'"
                )
        return {path: scale_of(norms[path], tensors[0]) for path, tensors in calls.items()}

    def site_calls(self, inputs: Any) -> dict[str, list[Tensor]]:
        """What each site reads on an unablated run, one tensor a call: `[*lead, I]`, or ids `[*lead]` at an embedding.

        Raises:
            UserError: a site that the target does not call.
        """
        return self._observed_run(inputs)[1]

    def site_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """What each site reads on an unablated run: `[*lead, I]`, or ids `[*lead]` at an embedding.

        Raises:
            UserError: a site that the target calls several times, or not at all.
        """
        return self.observe(inputs).site_inputs

    def observe(self, inputs: Any) -> Observed:
        """The target's output and what each site reads, from one unablated run, without gradients.

        Raises:
            UserError: a site that the target calls several times, or not at all.
        """
        output, calls = self._observed_run(inputs)
        for name, tensors in calls.items():
            if len(tensors) > 1:
                raise UserError(
                    f"site {name!r} is called {len(tensors)} times in a forward pass: it has no single input"
                )
        return Observed(output, {name: tensors[0] for name, tensors in calls.items()})

    def _observed_run(self, inputs: Any) -> tuple[Any, dict[str, list[Tensor]]]:
        """The output of an unablated run, and what each site reads in it, one tensor a call."""
        output, calls = self._recorded_run(inputs, dict(zip(self.sites, self._site_modules, strict=True)))
        for name, tensors in calls.items():
            if not tensors:
                raise UserError(f"site {name!r} is never called in a forward pass: what it reads cannot be seen")
        return output, calls

    def _recorded_run(self, inputs: Any, modules: Mapping[str, nn.Module]) -> tuple[Any, dict[str, list[Tensor]]]:
        """The output of an unablated run, and what some modules read in it, one tensor a call."""
        args, kwargs = _call_arguments(inputs)
        calls: dict[str, list[Tensor]] = {name: [] for name in modules}
        handles = []
        try:
            for name, module in modules.items():
                handles.append(module.register_forward_hook(_recorder(calls[name]), with_kwargs=True))
            with torch.no_grad(), self._at_rest():
                output = self.target(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return output, calls

    def _stacked(self) -> Sequence[Stack]:
        """The sites that are folded together, for as long as none is changed or moved."""
        together = self.delta_sites.device.type != "cpu" if self.folds_together is None else self.folds_together
        if not together:
            self._stacks = None
            return ()
        if self._stacks is None or not self._stacks.are_current():
            self._stacks = Stacks(list(self.sites.values()))
        return self._stacks.all

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own stacks."""
        return self.__dict__ | {"_stacks": None}

    def _norms_at(self, scales: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        return nullcontext() if scales is None else norms_frozen(self.target, scales)

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
        stand_ins = {}
        for name, (parameters, key) in self._place_of.items():
            parameter = parameters[key]
            if parameter is not None and parameter.requires_grad:
                stand_ins[name] = parameter.detach()
        return stand_ins

    def _call(self, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiled is not None and not has_hooks(self._target_modules):
            # All of them, whichever sites are masked: other names would be compiled anew.
            everything = {
                name: own[key].detach() for name, (own, key) in self._place_of.items() if own[key] is not None
            }
            return self._compiled(self.target, everything | parameters, args, kwargs)
        with self._standing_in(parameters):
            return self.target(*args, **kwargs)

    @contextmanager
    def _standing_in(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """The target with these tensors in place of its parameters, as `torch.func.functional_call` does it.

        That looks every name up in the network, twice a pass, which shows where a network is small.
        """
        places = [self._place_of[name] for name in parameters]
        before = [own[key] for own, key in places]
        try:
            for (own, key), tensor in zip(places, parameters.values(), strict=True):
                own[key] = tensor
            yield
        finally:
            for (own, key), tensor in zip(places, before, strict=True):
                own[key] = tensor

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The target in eval mode, with exact gradients into embedding weights; everything as it was afterwards."""
        in_training = [module for module in self._target_modules if module.training]
        # These change no output, only the gradient into the weight: padding rows would get none, for one.
        plain = {"padding_idx": None, "scale_grad_by_freq": False, "sparse": False}
        options = [
            (module, name, getattr(module, name))
            for module in self._embeddings
            for name in plain
            if getattr(module, name) is not plain[name]
        ]
        for module in in_training:
            module.training = False
        for module, name, _ in options:
            setattr(module, name, plain[name])
        try:
            yield
        finally:
            for module in in_training:
                module.training = True
            for module, name, value in options:
                setattr(module, name, value)


def _narrow(site_masks: Sequence[SiteMask], narrowed: Narrowed) -> list[SiteMask]:
    """The same masks on the sites that have only some of their components left."""
    left = {
        site.name: (site, at) for site, at in zip(narrowed.sites, narrowed.components, strict=True) if at is not None
    }
    found = []
    for site_mask in site_masks:
        if site_mask.k is not None and site_mask.site.name in left:
            site, components = left[site_mask.site.name]
            site_mask = site_mask._replace(site=site, k=site_mask.k.index_select(-1, components))
        found.append(site_mask)
    return found


def fingerprint(target: nn.Module) -> str:
    """SHA-256 of the names and tensors of a network's state."""
    return _sha256({name: value for name, value in target.state_dict().items() if isinstance(value, Tensor)})


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


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes, the same in every process."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()
