"""What nodes raise and lower, against masks of the last layer and against the logit lens by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decomposition.small_nets import SITES, small_lm
from torch import nn

import pdprune
from pdprune.batches import as_batch
from pdprune.decomposition import DecomposedModel, mean_reference
from pdprune.report.writing import written_to_outputs
from pdprune.targets.transformer import Transformer, TransformerConfig


def transformer() -> Transformer:
    torch.manual_seed(0)
    target = Transformer(TransformerConfig(vocab_size=11, max_length=6, n_layers=2, n_heads=2, d_model=8, d_mlp=8))
    for parameter in target.parameters():
        parameter.data.mul_(10)
    return target.eval()


def by_masks(model: DecomposedModel, node: int, inputs: torch.Tensor, position: int, reference: Any) -> torch.Tensor:
    def output(mask: torch.Tensor) -> torch.Tensor:
        return model(inputs, mask, reference=reference)[0, position]

    return torch.autograd.functional.jacobian(output, torch.ones(model.n_nodes))[:, node]


@pytest.mark.parametrize("with_reference", [False, True])
def test_in_the_last_layer_it_is_what_masks_do(with_reference: bool) -> None:
    model = pdprune.decompose(transformer(), sites=["blocks.1.mlp.down", "blocks.1.attn.out"], basis="neuron")
    inputs = torch.randint(0, 11, (5, 6))
    reference = mean_reference(model, [inputs]) if with_reference else None
    nodes, positions = [8, 10, 11, 13, 15], [5, 0, 2, 3, 5]
    assert [model.nodes[node].components[0][0] for node in nodes] == ["blocks.1.mlp.down"] * 5
    written = written_to_outputs(model, nodes, as_batch(inputs), positions, reference)
    assert written is not None
    for row, (node, position) in enumerate(zip(nodes, positions, strict=True)):
        expected = by_masks(model, node, inputs[row : row + 1], position, reference)
        assert torch.allclose(written[row], expected, atol=1e-4)


def test_in_earlier_layers_it_is_the_residual_stream_alone() -> None:
    target = transformer()
    model = pdprune.decompose(target, sites=["blocks.0.attn.out", "blocks.0.attn.q", "embed"], basis="neuron")
    inputs = torch.randint(1, 11, (1, 6))
    by_site = {site: index for index, node in enumerate(model.nodes) for site, component in node.components[:1]}
    token = int(inputs[0, 2])
    embed = next(i for i, node in enumerate(model.nodes) if node.components == (("embed", token),))
    written = written_to_outputs(model, [embed], as_batch(inputs), [2])
    assert written is not None
    seen: list[torch.Tensor] = []
    handle = target.norm.register_forward_hook(lambda _, args, __: seen.append(args[0][0, 2]))
    target(inputs)
    handle.remove()
    _, tangent = torch.func.jvp(lambda x: target.unembed(target.norm(x)), (seen[0],), (target.embed.weight[token],))
    assert torch.allclose(written[0], tangent, atol=1e-4)
    q = by_site["blocks.0.attn.q"]
    by_query = written_to_outputs(model, [q], as_batch(inputs), [2])
    assert by_query is not None and not by_query.any(), "a query writes to no output"


def test_networks_without_positions_and_their_last_matrix() -> None:
    torch.manual_seed(1)
    target = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = pdprune.decompose(target, sites=["0", "2"], basis="neuron")
    x = torch.randn(2, 3)
    written = written_to_outputs(model, [0, 4], as_batch(x), [0, 0])
    assert written is not None
    hidden = target[0](x)
    added = (hidden[0] > 0) * target[0].weight[:, 0] * x[0, 0]
    assert torch.allclose(written[0], target[2].weight @ added, atol=1e-6), "the last matrix is the readout"
    assert torch.allclose(written[1], hidden[1].relu()[1] * target[2].weight[:, 1], atol=1e-6)


def test_every_kind_of_site_and_nothing_left_behind() -> None:
    target = small_lm(2).float()
    model = pdprune.decompose(target, sites=list(SITES), basis="svd")
    inputs = torch.randint(0, 5, (model.n_nodes, 4))
    nodes = list(range(model.n_nodes))
    written = written_to_outputs(model, nodes, as_batch({"inputs": {"input_ids": inputs}}), [3] * len(nodes))
    assert written is not None and written.shape == (model.n_nodes, 5)
    reaches = {model.nodes[node].components[0][0] for node in nodes if bool(written[node].any())}
    assert reaches == {"embed", "mix", "down", "unembed"}
    assert not any(module._forward_hooks for module in target.modules())
