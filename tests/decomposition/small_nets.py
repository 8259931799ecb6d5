"""Small targets, decompositions of them drawn at random, and a slow, obvious way to run them under masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel

VOCAB = 5


class Conv1D(nn.Module):
    """As in Hugging Face transformers: a linear map that stores its weight as `[I, O]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class SmallLM(nn.Module):
    """A causal model `Int[B, T] -> [B, T, VOCAB]` with a site of each kind; positions talk through a running mean."""

    def __init__(self, width: int = 4, hidden: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = Conv1D(hidden, width)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(hidden, width)
        self.unembed = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        seen = torch.arange(1, x.shape[1] + 1).unsqueeze(-1)
        x = x + self.mix(self.norm(x)).cumsum(1) / seen
        x = x + self.down(self.dropout(torch.tanh(self.up(x))))
        return self.unembed(x)


SITES = ("embed", "mix", "up", "down", "unembed")


def small_lm(seed: int, width: int = 4, hidden: int = 3) -> SmallLM:
    """In float64, so that tests can be exact to twelve digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallLM(width, hidden).double().eval()


def matrix(module: nn.Module) -> Tensor:
    """`W: [O, I]` of a site."""
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def random_decomposition(
    target: SmallLM, generator: torch.Generator, with_delta: bool, n_nodes: int | None
) -> DecomposedModel:
    """Every site split in some random way; with `n_nodes`, into random groups within and across sites."""
    components = {}
    for i, name in enumerate(SITES):
        W = matrix(target.get_submodule(name))
        d_out, d_in = W.shape
        kind = int(torch.randint(0, 2 + with_delta, (), generator=generator))
        if kind == 0:  # neurons
            components[name] = (torch.eye(d_in, dtype=W.dtype) if i % 2 else None, W.t().clone())
            continue
        n_components = d_in + 2 if kind == 1 else 2
        V = torch.randn(d_in, n_components, generator=generator, dtype=W.dtype)
        if kind == 1:  # more components than inputs, summing to the weight
            components[name] = (V, torch.linalg.pinv(V) @ W.t())
        else:  # two components, and a delta
            components[name] = (V, torch.randn(n_components, d_out, generator=generator, dtype=W.dtype))
    nodes = None
    if n_nodes is not None:
        everything = [(name, c) for name, (_, U) in components.items() for c in range(U.shape[0])]
        order = torch.randperm(len(everything), generator=generator).tolist()
        nodes = [[everything[i] for i in order[start::n_nodes]] for start in range(n_nodes)]
    return DecomposedModel.from_components(target, components, nodes)


@dataclass
class Case:
    """What one run is given besides its inputs."""

    mask: Tensor | None
    delta_mask: Tensor | None
    reference: Mapping[str, Tensor] | None


class SlowSite(nn.Module):
    """One site under masks, by the formula: a loop over components, then the delta."""

    def __init__(self, model: DecomposedModel, name: str, case: Case) -> None:
        super().__init__()
        module = model.target.get_submodule(name)
        site = model.sites[name]
        self.bias = getattr(module, "bias", None)
        self.vocabulary = VOCAB if isinstance(module, nn.Embedding) else None
        self.V, self.U = site.V, site.U
        self.delta = matrix(module) - (site.V @ site.U).t()
        self.reference = None if case.reference is None else case.reference[name]
        node_of = {component: i for i, node in enumerate(model.nodes) for component in node.components}
        n_components = self.U.shape[0]
        one = torch.ones((), dtype=torch.double)
        self.masks = [one if case.mask is None else case.mask[..., node_of[name, c]] for c in range(n_components)]
        self.delta_mask = one if case.delta_mask is None else case.delta_mask[..., model.site_names.index(name)]

    def vectors(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else F.one_hot(x, self.vocabulary or -1).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.vectors(x)
        x_ref = torch.zeros_like(x) if self.reference is None else self.vectors(self.reference).expand_as(x)
        y = torch.zeros(*x.shape[:-1], self.U.shape[1], dtype=x.dtype)
        if self.bias is not None:
            y = y + self.bias.detach()
        for c, m in enumerate(self.masks):
            a, mu = x @ self.V[:, c], x_ref @ self.V[:, c]
            y = y + (m * a + (1 - m) * mu).unsqueeze(-1) * self.U[c]
        m = self.delta_mask.unsqueeze(-1)
        return y + (m * x + (1 - m) * x_ref) @ self.delta.t()


def slow_forward(model: DecomposedModel, inputs: Tensor, case: Case) -> Tensor:
    """The target with every site replaced by the formula."""
    target = copy.deepcopy(model.target).requires_grad_(False)
    for name in model.site_names:
        setattr(target, name, SlowSite(model, name, case))
    return target(inputs)
