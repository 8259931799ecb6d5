"""How much each component matters on an input: learned functions from what the sites read to one number a component.

They are those of SPD (Bushnaq et al. 2025, arXiv 2506.20790) and VPD (Bushnaq et al. 2026), in the same layout of
parameters, so that a checkpoint of theirs can be read. Values come out before the hard sigmoid; two versions of it
differ in where a gradient leaks: `lower_leaky` makes masks, `upper_leaky` is what sparsity is asked of.

Shape letters: C component, I what a function reads, H hidden; "lead" are the leading dimensions of what a site reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.sites import Site, at_least_float32
from pdprune.errors import UserError
from pdprune.seeding import generator

ImportanceKind = Literal["component_mlp", "site_mlp", "shared_mlp", "transformer"]
Sigmoid = Literal["hard", "normal", "swish_hard"]

LEAK = 0.01


@dataclass(frozen=True)
class ImportanceSettings:
    """Which function says how much a component matters.

    Attributes:
        kind: `component_mlp`: for each component an MLP of its own, on its activation `x·V[:, c]`; `site_mlp`: the same
            on all that the site reads; `shared_mlp`: one MLP a site, from what it reads to all its components;
            `transformer`: one bidirectional transformer that sees what all sites read, at all positions.
        hidden: widths of the hidden layers; in the transformer those of each block's MLP (none: 4 · `d_model`).
        d_model: width of the transformer.
        n_blocks: its blocks.
        n_heads: its attention heads; a head's width must be even.
        rope_base: how slowly its rotary positions turn.
        sigmoid: what takes values into [0,1] before the hard sigmoid does: `hard`, nothing; `normal`, the logistic
            function; `swish_hard`, a smooth form of the hard one. For reading what others learned with them.
    """

    kind: ImportanceKind = "shared_mlp"
    hidden: list[int] = field(default_factory=lambda: [16])
    d_model: int = 64
    n_blocks: int = 2
    n_heads: int = 4
    rope_base: float = 10_000.0
    sigmoid: Sigmoid = "hard"

    def __post_init__(self) -> None:
        if self.kind not in get_args(ImportanceKind):
            raise UserError(
                f"importances: kind is {self.kind!r}; expected one of {', '.join(get_args(ImportanceKind))}"
            )
        if self.sigmoid not in get_args(Sigmoid):
            raise UserError(f"importances: sigmoid is {self.sigmoid!r}; expected one of {', '.join(get_args(Sigmoid))}")
        sizes = {"d_model": self.d_model, "n_blocks": self.n_blocks, "n_heads": self.n_heads}
        sizes |= {f"hidden[{index}]": width for index, width in enumerate(self.hidden)}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"importances: {name} is {size}; expected at least 1")
        if self.kind == "transformer" and self.d_model % (2 * self.n_heads):
            raise UserError(
                f"importances: d_model is {self.d_model}; expected a multiple of {2 * self.n_heads}, "
                f"so that each of {self.n_heads} heads is of an even width"
            )


class CausalImportances(nn.Module):
    """A function a site, or one for all of them, that says how much each component matters on an input.

    At an embedding functions read the activations of its components, the rows of `V`, whatever their kind.

    Args:
        sites: by module path; held, but no part of `state_dict()`.
        settings: which function.
        seed: decides the initial parameters.
    """

    def __init__(self, sites: Mapping[str, Site], settings: ImportanceSettings, seed: int = 0) -> None:
        super().__init__()
        self._sites = dict(sites)  # not registered: their parameters belong to the model
        self.settings = settings
        self.functions = nn.ModuleDict()
        self.transformer: ImportanceTransformer | None = None
        if settings.kind == "transformer":
            widths = {name: (self._width(site), site.n_components) for name, site in sites.items()}
            self.transformer = ImportanceTransformer(widths, settings, generator(seed, "importances"))
        else:
            for name, site in sites.items():
                self.functions[dashed(name)] = self._function(site, generator(seed, "importances", name))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*lead C"]]:
        """Importances before the hard sigmoid, by site.

        Args:
            inputs: what each site reads, `[*lead, I]`, or ids `[*lead]` at an embedding: `model.site_inputs(...)`.
        """
        read = {name: self._reads(site, inputs[name]) for name, site in self._sites.items()}
        if self.transformer is not None:
            values = self.transformer(read)
        else:
            values = {name: self.functions[dashed(name)](x) for name, x in read.items()}
        return {name: squashed(at_least_float32(value), self.settings.sigmoid) for name, value in values.items()}

    def _function(self, site: Site, rng: torch.Generator) -> Mlp:
        n_components, hidden = site.n_components, self.settings.hidden
        match self.settings.kind:
            case "component_mlp":
                return Mlp([1, *hidden, 1], n_components, rng)
            case "site_mlp":
                return Mlp([self._width(site), *hidden, 1], n_components, rng)
            case _:
                return Mlp([self._width(site), *hidden, n_components], None, rng)

    @staticmethod
    def _width(site: Site) -> int:
        return site.n_components if site.kind.reads_ids else site.d_in

    def _reads(self, site: Site, x: Tensor) -> Float[Tensor, "*lead I"]:
        """What the site's function reads."""
        if site.kind.reads_ids or self.settings.kind == "component_mlp":
            x = activations(site, x)
        match self.settings.kind:
            case "component_mlp":
                return x.unsqueeze(-1)
            case "site_mlp":
                return x.unsqueeze(-2)
            case _:
                return x


class Mlp(nn.Module):
    """Linear maps with GELUs between: one MLP, or one for each of C components.

    Args:
        widths: of the input, the hidden layers and the output.
        n_parallel: C, for an MLP each: `[*lead, C, I]`, or `[*lead, 1, I]` for all, gives `[*lead, C]`. None for one
            that gives `[*lead, C]` from `[*lead, I]`.
        rng: decides the initial weights.
    """

    def __init__(self, widths: list[int], n_parallel: int | None, rng: torch.Generator) -> None:
        super().__init__()
        self.n_parallel = n_parallel
        self.layers = _layers(widths, n_parallel, rng)

    def forward(self, x: Float[Tensor, "*lead I"]) -> Float[Tensor, "*lead C"]:
        """Values before the hard sigmoid."""
        y = self.layers(x)
        return y if self.n_parallel is None else y.squeeze(-1)


class Affine(nn.Module):
    """`x W + b`, or C of them at once: `W: [I, O]` or `[C, I, O]`. Initial entries are normal, He et al. 2015."""

    def __init__(self, d_in: int, d_out: int, n_parallel: int | None, gain: float, rng: torch.Generator) -> None:
        super().__init__()
        lead = () if n_parallel is None else (n_parallel,)
        self.W = nn.Parameter(torch.randn(*lead, d_in, d_out, generator=rng) * (gain / math.sqrt(d_in)))
        self.b = nn.Parameter(torch.zeros(*lead, d_out))

    def forward(self, x: Float[Tensor, "*lead I"]) -> Float[Tensor, "*lead O"]:
        """The map of each row."""
        if self.W.ndim == 2:
            return torch.addmm(self.b, x.flatten(0, -2), self.W).unflatten(0, x.shape[:-1])
        # One number in or out: products, no matrices. They leave the memory's order alone, which makes the GELU between
        # them, most of the cost, several times faster.
        if self.W.shape[1] == 1:
            return x * self.W.squeeze(1) + self.b
        if self.W.shape[2] == 1:
            return (x * self.W.squeeze(2)).sum(-1, keepdim=True) + self.b
        return torch.einsum("...ci,cio->...co", x, self.W) + self.b


class ImportanceTransformer(nn.Module):
    """What all sites read, each normalised, projected to one stream; blocks; a head for all components.

    Args:
        widths: by site, what its part of the input is wide, and its number of components.
        settings: sizes.
        rng: decides the initial weights.
    """

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], settings: ImportanceSettings, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.order = sorted(widths)  # as in VPD, whatever the order of the sites
        self.sizes = [widths[name][1] for name in self.order]
        d_model = settings.d_model
        hidden = settings.hidden or [4 * d_model]
        self.projector = Affine(sum(d_in for d_in, _ in widths.values()), d_model, None, math.sqrt(2), rng)
        self.blocks = nn.ModuleList(Block(settings, hidden, rng) for _ in range(settings.n_blocks))
        self.head = Affine(d_model, sum(self.sizes), None, 1.0, rng)

    def forward(self, read: Mapping[str, Float[Tensor, "*lead I"]]) -> dict[str, Float[Tensor, "*lead C"]]:
        """Values before the hard sigmoid. Where sites read no positions, there is one."""
        normalised = [F.rms_norm(read[name], read[name].shape[-1:]) for name in self.order]
        x = self.projector(torch.cat(_of_one_lead(normalised), dim=-1))
        has_positions = x.ndim > 2
        x = x if has_positions else x.unsqueeze(-2)
        for block in self.blocks:
            x = block(x)
        values = self.head(x if has_positions else x.squeeze(-2))
        return dict(zip(self.order, values.split(self.sizes, dim=-1), strict=True))


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised stream and adds to it."""

    def __init__(self, settings: ImportanceSettings, hidden: list[int], rng: torch.Generator) -> None:
        super().__init__()
        self.attn = Attention(settings.d_model, settings.n_heads, settings.rope_base, rng)
        self.mlp = _layers([settings.d_model, *hidden, settings.d_model], None, rng)

    def forward(self, x: Float[Tensor, "*lead T D"]) -> Float[Tensor, "*lead T D"]:
        """The stream after this block."""
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with rotary positions (halves rotated; Su et al. 2021)."""

    def __init__(self, d_model: int, n_heads: int, rope_base: float, rng: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.rope_base = rope_base
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_projection(d_model, rng) for _ in range(4))

    def forward(self, x: Float[Tensor, "*lead T D"]) -> Float[Tensor, "*lead T D"]:
        """What the heads together add to the stream."""
        q, k, v = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(_rotated(q, self.rope_base), _rotated(k, self.rope_base), v)
        return self.out_proj(y.transpose(-3, -2).flatten(-2))


def lower_leaky(x: Float[Tensor, "*shape"], leak: float = LEAK) -> Float[Tensor, "*shape"]:
    """`clamp(x, 0, 1)`; below 0 it lets through `leak` of those gradients that would raise the value (SPD)."""
    clamped: Tensor = _LowerLeaky.apply(x, leak)
    return clamped


def upper_leaky(x: Float[Tensor, "*shape"], leak: float = LEAK) -> Float[Tensor, "*shape"]:
    """`clamp(x, 0, 1)`, with slope `leak` above 1 (SPD)."""
    return torch.where(x > 1, 1 + leak * (x - 1), x.clamp(min=0))


def squashed(x: Float[Tensor, "*shape"], sigmoid: Sigmoid) -> Float[Tensor, "*shape"]:
    """Values on which the hard sigmoid does what another one does to `x`."""
    match sigmoid:
        case "hard":
            return x
        case "normal":
            return torch.sigmoid(x)
        case "swish_hard":  # SPD's, of steepness 10; a hard sigmoid with swishes for its two corners
            return 1 - x + x * torch.sigmoid(10 * x) - (1 - x) * torch.sigmoid(10 * (1 - x))


def node_importances(
    by_site: Mapping[str, Float[Tensor, "*lead C"]], model: DecomposedModel
) -> Float[Tensor, "*lead n"]:
    """Importances in [0,1] of the nodes of a model, as a mask for it: of a node's components, the highest.

    Args:
        by_site: values before the hard sigmoid, as `CausalImportances` gives them.
        model: the decomposed model; its nodes may be in any order and group components of several sites.
    """
    values = torch.cat(_of_one_lead([lower_leaky(by_site[name]) for name in model.site_names]), dim=-1)
    index = torch.cat([site.node_index for site in model.sites.values()])
    if torch.equal(index, torch.arange(model.n_nodes, device=index.device)):
        return values
    none = values.new_zeros(*values.shape[:-1], model.n_nodes)
    return none.scatter_reduce(-1, index.expand_as(values), values, "amax")


def importance_mask(model: DecomposedModel, inputs: Any) -> Float[Tensor, "*lead n"]:
    """The importances of a model's nodes on some inputs: a mask for it, `[B, T, n]`, or `[B, n]` without positions.

    Raises:
        UserError: the model has no causal importances.
    """
    if model.importances is None:
        raise UserError("decomposition: it has no causal importances; load or learn one that has")
    with torch.no_grad():
        return node_importances(model.importances(model.site_inputs(inputs)), model)


def activations(
    site: Site, x: Tensor, components: Int[Tensor, " k"] | None = None
) -> Float[Tensor, "*lead C"] | Float[Tensor, "*lead k"]:
    """`x·V[:, c]` of each component, or of some, where `x` is `[*lead, I]`, or ids `[*lead]` at an embedding."""
    if site.reads_columns and components is not None:  # no identity as large as a vocabulary is built for a few of them
        return (x[..., None] == components).to(site.U.dtype) if site.kind.reads_ids else x[..., components]
    V = at_least_float32(site.V if components is None else site.V[:, components])
    return F.embedding(x, V) if site.kind.reads_ids else x.to(V.dtype) @ V


def dashed(name: str) -> str:
    """A site's path as a key: dots would be taken for levels."""
    return name.replace(".", "-")


def _layers(widths: list[int], n_parallel: int | None, rng: torch.Generator) -> nn.Sequential:
    """Affine maps with GELUs between: maps at the even places."""
    layers = nn.Sequential()
    for index, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        is_last = index == len(widths) - 2
        layers.append(Affine(d_in, d_out, n_parallel, 1.0 if is_last else math.sqrt(2), rng))
        if not is_last:
            layers.append(nn.GELU())
    return layers


def _projection(d_model: int, rng: torch.Generator) -> nn.Linear:
    """PyTorch's linear map without bias, and its initial weights, drawn without the global generator."""
    projection: nn.Linear = nn.utils.skip_init(nn.Linear, d_model, d_model, bias=False)
    nn.init.uniform_(projection.weight, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model), generator=rng)
    return projection


def _rotated(x: Float[Tensor, "*lead T K"], base: float) -> Float[Tensor, "*lead T K"]:
    """Each pair `(x[i], x[i + K/2])` turned by its position times a frequency of its own."""
    length, width = x.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angle = torch.outer(torch.arange(length, device=x.device).float(), frequency)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _of_one_lead(parts: list[Tensor]) -> list[Tensor]:
    """The tensors with one shape but for the last dimension: some sites read the same for all examples."""
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return [part.expand(*lead, part.shape[-1]) for part in parts]


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.leak = leak  # type: ignore[attr-defined]
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        below = ctx.leak * grad.clamp(max=0)  # type: ignore[attr-defined]
        return torch.where(x < 0, below, torch.where(x > 1, 0, grad)), None
