"""Small networks for the tests of circuits: random ones, and ones whose right answers are known by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator


@dataclass(frozen=True)
class RandomNetwork:
    """A multilayer perceptron with random weights, some of its hidden units free, and inputs.

    The nodes are the hidden units, layer after layer. With a delta, the first components make up 0.9 of their weight.
    """

    model: DecomposedModel
    inputs: Tensor
    keep: Tensor
    activation: nn.Module
    has_delta: bool

    @property
    def free(self) -> list[int]:
        return (self.keep == 0).nonzero().squeeze(-1).tolist()

    def all_losses(self) -> Tensor:
        """KL under every binary mask of the free nodes and the delta, `[2^k]`, by plain matrix products."""
        entries = len(self.free) + int(self.has_delta)
        bits = (torch.arange(2**entries)[:, None] >> torch.arange(entries) & 1).float()
        masks = self.keep.expand(2**entries, -1).clone()
        masks[:, self.free] = bits[:, : len(self.free)]
        delta_mask = bits[:, -1] if self.has_delta else torch.ones(len(bits))
        target = self.model.target(self.inputs).detach()
        outputs = self.outputs(masks, delta_mask)
        log_p, log_q = F.log_softmax(target, -1), F.log_softmax(outputs, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)

    @torch.no_grad()
    def outputs(self, masks: Tensor, delta_mask: Tensor) -> Tensor:
        """`[K, B, V]` for K masks."""
        first, *rest = [module for module in self.model.target if isinstance(module, nn.Linear)]
        hidden = self.activation(first(self.inputs)).expand(len(masks), -1, -1)
        start = 0
        for index, layer in enumerate(rest):
            if index:
                hidden = self.activation(hidden)
            mask = masks[:, None, start : start + layer.in_features]
            start += layer.in_features
            if index == 0 and self.has_delta:
                mask = 0.9 * mask + 0.1 * delta_mask[:, None, None]
            hidden = (hidden * mask) @ layer.weight.T + layer.bias
        return hidden


def random_network(seed: int, most_free: int = 12) -> RandomNetwork:
    """One or two hidden layers, four activations, weights of three scales, 2 to `most_free` free entries."""
    rng = generator(seed, "random network")

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    n_nodes, has_delta = draw(6, 14), bool(draw(0, 1))
    widths = [n_nodes] if draw(0, 1) else [n_nodes // 2, n_nodes - n_nodes // 2]
    scale = (1.0, 2.0, 4.0)[draw(0, 2)]
    activation = (nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Identity())[draw(0, 3)]
    layers: list[nn.Module] = []
    for d_in, d_out in zip([draw(2, 6), *widths], [*widths, draw(2, 5)], strict=True):
        layer = nn.Linear(d_in, d_out)
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn(d_out, d_in, generator=rng) / d_in**0.5)
            layer.bias.copy_(0.3 * torch.randn(d_out, generator=rng))
        layers += [layer, activation]
    target = nn.Sequential(*layers[:-1])
    keep = torch.ones(n_nodes)
    n_free = min(draw(2, most_free - has_delta), n_nodes)
    keep[torch.randperm(n_nodes, generator=rng)[:n_free]] = 0
    inputs = torch.randn(draw(8, 32), layers[0].in_features, generator=rng)
    return RandomNetwork(
        _by_neuron(target, list(range(2, len(layers), 2)), has_delta), inputs, keep, activation, has_delta
    )


def _by_neuron(target: nn.Sequential, sites: list[int], has_delta: bool = False) -> DecomposedModel:
    """Each input column of these layers is a node."""
    components = {}
    for index, site in enumerate(sites):
        W = target[site].weight.detach()
        components[str(site)] = (torch.eye(W.shape[1]), W.T * (0.9 if has_delta and index == 0 else 1.0))
    return DecomposedModel.from_components(target, components)


class Known(NamedTuple):
    """A network with known answers: `small` seems to be a circuit, `honest` is the smallest one that holds."""

    model: DecomposedModel
    batch: object
    small: set[int]
    honest: set[int]


def linear_model(weight: Tensor) -> DecomposedModel:
    """A target that is one matrix `[d_out, d_in]`, each input a node."""
    target = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        target[0].weight.copy_(weight)
    return _by_neuron(target, [0])


def cancelling_pairs(n_pairs: int, size: float = 1.0) -> Known:
    """Node 0 tells the answer; nodes 1, 2 cancel, nodes 3, 4 cancel, ... whatever the input.

    Ablating all pairs changes nothing; ablating the first half of each moves the logit by `size`.
    """
    signal = torch.linspace(-2, 2, 24)
    ones = torch.ones(24, 2 * n_pairs)
    push = size / n_pairs * torch.tensor([1.0, -1.0]).repeat(n_pairs)
    weight = torch.stack([torch.cat([torch.ones(1), push]), torch.zeros(1 + 2 * n_pairs)])
    inputs = torch.cat([signal[:, None], ones], dim=1)
    return Known(linear_model(weight), inputs, {0}, set(range(1 + 2 * n_pairs)))


def small_contributions(n_idle: int, n_examples: int = 256, size: float = 0.02) -> Known:
    """Node 0 tells the answer; every other adds `± size` to the logit, with a sign of its own for each example.

    One choice for all examples can line up few of them (`size · √n` a logit); a choice for each lines up half
    (`size · n / 2`).
    """
    rng = generator(0, "small contributions")
    signs = torch.randint(0, 2, (n_examples, n_idle), generator=rng) * 2.0 - 1
    signal = torch.randn(n_examples, 1, generator=rng).sign() * 2
    weight = torch.stack([torch.cat([torch.ones(1), torch.full((n_idle,), size)]), torch.zeros(1 + n_idle)])
    return Known(linear_model(weight), torch.cat([signal, signs], dim=1), {0}, {0})


def correlated_shortcut() -> Known:
    """Three features that are equal on the data: node 0 the real path, node 1 a shortcut, node 2 what holds it down.

    The shortcut alone does as well as the model, and so does the real path alone.
    """
    feature = torch.linspace(-1, 1, 24)[:, None]
    return Known(linear_model(torch.tensor([[3.0, 3.0, -3.0], [0, 0, 0]])), feature.expand(-1, 3), {1}, {0, 1, 2})


class _NormGain(nn.Module):
    """Writes a stream, normalises it, reads its first dimension."""

    def __init__(self, n_loud: int) -> None:
        super().__init__()
        self.write = nn.Linear(1 + n_loud, 2, bias=False)
        with torch.no_grad():
            self.write.weight.copy_(torch.stack([F.one_hot(torch.tensor(0), 1 + n_loud), torch.ones(1 + n_loud)]))
            self.write.weight[1, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        stream = self.write(x)
        normed = 3 * stream / (stream.square().mean(-1, keepdim=True) + 0.1).sqrt()
        return torch.stack([normed[..., 0], torch.zeros_like(normed[..., 0])], dim=-1)


def norm_gain(n_loud: int) -> Known:
    """Node 0 tells the answer; the others write only where nobody reads, but they are what the norm divides by.

    Without them the answers stay and the model grows more certain of them: cross-entropy falls.
    """
    signal = torch.linspace(-1, 1, 24)[:, None]
    inputs = torch.cat([signal, torch.full((24, n_loud), 4 / n_loud)], dim=1)
    model = DecomposedModel.from_components(
        target := _NormGain(n_loud), {"write": (torch.eye(1 + n_loud), target.write.weight.detach().T)}
    )
    labels = (signal[:, 0] < 0).long()
    return Known(model, (inputs, labels), {0}, set(range(1 + n_loud)))


class _Attention(nn.Module):
    """One query; reads from `x: [B, T, 2]` (the value of a token, and whether it is the odd one) what it attends to."""

    def __init__(self, n_pairs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2 * n_pairs, bias=False)
        self.key = nn.Linear(2 * n_pairs, 1, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[0.0, 1.0]]).expand(2 * n_pairs, -1))
            self.key.weight.copy_(8 / n_pairs * torch.tensor([[1.0, -1.0]]).repeat(1, n_pairs))

    def forward(self, x: Tensor) -> Tensor:
        pattern = self.key(self.hidden(x)).softmax(dim=1)
        seen = (pattern * x[..., :1]).sum(dim=1)
        return torch.cat([seen, torch.zeros_like(seen)], dim=-1)


def bypassed_attention(n_pairs: int) -> Known:
    """Nodes are parts of an attention score that cancel, so that attention is even and seems not to be needed.

    Every token but one has the answer as its value, so that the even mean is right. Parts of one sign alone make
    attention look at the odd token and the answer wrong.
    """
    answer = torch.linspace(-1, 1, 24).sign()[:, None]
    value = answer.repeat(1, 8) * 3
    value[:, 5] = -value[:, 5]
    odd = torch.zeros_like(value)
    odd[:, 5] = 1
    target = _Attention(n_pairs)
    model = DecomposedModel.from_components(target, {"key": (torch.eye(2 * n_pairs), target.key.weight.detach().T)})
    return Known(model, torch.stack([value, odd], dim=-1), set(), set(range(2 * n_pairs)))
