"""Edges of a circuit against what can be worked out by hand, and against gradients of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decomposition.small_nets import SITES, small_lm
from torch import Tensor, nn

import pdprune
from pdprune.batches import as_batch
from pdprune.circuits.edges import Edges, answer_score, edges_of
from pdprune.decomposition import DecomposedModel, mean_reference
from pdprune.targets.transformer import Transformer, TransformerConfig


def trace(model: DecomposedModel, nodes: Sequence[int], raw: Any, classes: bool = True, **options: Any) -> Edges:
    return edges_of(model, nodes, as_batch(raw), classes=classes, **options)


def effect_by_masks(model: DecomposedModel, raw: Any, classes: bool = True, reference: Any = None) -> Tensor:
    """How the mean answer score changes with every node's mask: another way to each node's effect."""
    batch = as_batch(raw)
    mask = torch.ones(model.n_nodes, requires_grad=True)
    score = answer_score(model(batch.inputs, mask, reference=reference), batch, classes).mean()
    (gradient,) = torch.autograd.grad(score, mask)
    return gradient.float()


def two_layers() -> tuple[nn.Sequential, DecomposedModel]:
    torch.manual_seed(3)
    target = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return target, pdprune.decompose(target, sites=["0", "2"], basis="neuron")


def test_a_network_of_two_layers_by_hand() -> None:
    target, model = two_layers()
    x = torch.randn(5, 3)
    edges = trace(model, range(7), x, classes=False)
    with torch.no_grad():
        hidden = target[0](x)
        direction = nn.functional.normalize(target(x), dim=-1)
        slope = (hidden > 0) * (direction @ target[2].weight)
        expected = torch.einsum("bi,ji,bj->ij", x, target[0].weight, slope) / 5
    assert torch.allclose(edges.strength[:3, 3:], expected, atol=1e-6)
    assert edges.strength[3:].abs().max() == 0 and edges.strength[:, :3].abs().max() == 0
    assert torch.allclose(edges.direct[3:], (hidden.relu() * (direction @ target[2].weight)).mean(0), atol=1e-6)
    assert edges.direct[:3].abs().max() == 0, "all paths from the first layer meet the second"


def test_paths_through_nodes_that_are_not_kept_count_as_direct() -> None:
    _, model = two_layers()
    x = torch.randn(5, 3)
    whole, part = trace(model, range(7), x, classes=False), trace(model, [0, 1, 2, 4], x, classes=False)
    assert torch.allclose(part.strength[:3, 3], whole.strength[:3, 4])
    through_others = whole.strength[:3, [3, 5, 6]].sum(1)
    assert torch.allclose(part.direct[:3], through_others, atol=1e-6)
    assert torch.allclose(part.effect, whole.effect[[0, 1, 2, 4]], atol=1e-6)


@pytest.mark.parametrize("basis", ["neuron", "svd"])
def test_what_goes_out_of_a_node_sums_to_its_effect_and_that_is_the_gradient_of_its_mask(basis: Any) -> None:
    target = small_lm(1).float()
    model = pdprune.decompose(target, sites=list(SITES), basis=basis)
    raw = {
        "inputs": {"input_ids": torch.randint(0, 5, (6, 4))},
        "positions": torch.tensor([3, 2, 3, 1, 3, 3]),
        "choices": torch.tensor([[0, 1, -1], [2, 3, 4], [0, 4, 2], [1, 3, -1], [3, 2, 0], [1, 0, 2]]),
        "labels": torch.tensor([0, 2, 4, 1, 3, 1]),
    }
    reference = mean_reference(model, [raw])
    for given in (None, reference):
        edges = trace(model, range(model.n_nodes), raw, reference=given)
        assert torch.allclose(edges.effect, effect_by_masks(model, raw, reference=given), atol=1e-5)
        assert torch.allclose(edges.effect, edges.direct + edges.strength.sum(1), atol=1e-5)
        assert edges.strength.abs().max() > 0


def test_attention_carries_across_positions_and_heads_are_nodes() -> None:
    torch.manual_seed(0)
    target = Transformer(TransformerConfig(vocab_size=11, max_length=6, n_layers=2, n_heads=2, d_model=8, d_mlp=8))
    for parameter in target.parameters():
        parameter.data.mul_(10)
    model = pdprune.decompose(target.eval(), sites=["*.attn.out"], basis="head")
    raw = {"inputs": torch.randint(0, 11, (4, 6)), "positions": torch.full((4,), 5)}
    edges = trace(model, range(4), raw)
    assert torch.allclose(edges.effect, effect_by_masks(model, raw), atol=1e-5)
    assert (edges.strength[:2, 2:].abs() > 1e-6).all(), "the first layer's heads act on the second's, at any position"
    assert edges.strength[2:].abs().max() == 0 and edges.strength[:2, :2].abs().max() == 0


def test_the_target_is_left_as_it_was() -> None:
    target, model = two_layers()
    trace(model, [0, 3], torch.randn(2, 3), classes=False)
    assert not any(module._forward_hooks for module in target.modules())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_site_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    model = pdprune.decompose(Twice(), sites=["inner"], basis="neuron")
    with pytest.raises(pdprune.UserError, match="called several times"):
        trace(model, [0], torch.randn(2, 3), classes=False)
