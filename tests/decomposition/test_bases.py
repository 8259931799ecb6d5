"""Bases that need no training, and what a decomposition is made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from decomposition.small_nets import Conv1D, matrix, small_lm
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.decomposition.bases import singular_components


@pytest.mark.parametrize("basis", ["svd", "neuron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_sum_to_the_weight(basis: str, dtype: torch.dtype) -> None:
    target = small_lm(0).to(dtype)
    model = decompose(target, "*", basis)  # type: ignore[arg-type]
    assert model.site_names == ["embed", "mix", "up", "down", "unembed"]
    assert not model.delta_sites.any()
    for name, site in model.sites.items():
        W = matrix(target.get_submodule(name))
        torch.testing.assert_close((site.V @ site.U).t(), W)
        assert site.n_components == (min(W.shape) if basis == "svd" else W.shape[1])
        assert (site.d_in, site.d_out) == (W.shape[1], W.shape[0])
        assert site.delta.shape == W.shape and not site.delta.any()


def test_labels_and_nodes() -> None:
    target = small_lm(0)
    assert [node.label for node in decompose(target, "down", "svd").nodes] == ["down:svd0", "down:svd1", "down:svd2"]
    neuron = decompose(target, ["down", "mix"], "neuron").nodes
    assert [node.label for node in neuron] == ["mix:0", "mix:1", "mix:2", "mix:3", "down:0", "down:1", "down:2"]
    assert neuron[5].components == (("down", 1),)
    head = decompose(target, "mix", "head", n_heads=2)
    assert [node.label for node in head.nodes] == ["mix:head0", "mix:head1"]
    assert head.nodes[1].components == (("mix", 2), ("mix", 3))
    assert head.node_signature == [("mix",), ("mix",)]


def test_singular_components() -> None:
    W = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    V, U = singular_components(W)
    torch.testing.assert_close(V.t() @ V, torch.eye(3))
    assert (U.norm(dim=1).diff() <= 0).all()
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(singular_components(torch.zeros(2, 3))[1], torch.zeros(2, 2))


@pytest.mark.parametrize("config", [SimpleNamespace(n_heads=2), {"n_head": 2}, SimpleNamespace(num_attention_heads=2)])
def test_heads_from_the_targets_config(config: object) -> None:
    target = small_lm(0)
    target.config = config  # type: ignore[assignment]
    assert decompose(target, "mix", "head").n_nodes == 2


def test_patterns() -> None:
    target = nn.ModuleDict({"a": small_lm(0), "b": small_lm(1)})
    assert decompose(target, "*.down", "neuron").site_names == ["a.down", "b.down"]
    assert decompose(target, ["b.*", "*.down", "a.down"], "neuron").site_names[0] == "a.down"
    assert len(decompose(target, ["*", "*.down"], "neuron").site_names) == 10


def test_given_components_are_copied_and_leave_a_delta() -> None:
    target = nn.Linear(3, 2)
    V, U = torch.eye(3)[:, :2].contiguous(), target.weight.detach().t()[:2].clone()
    model = DecomposedModel.from_components(target, {"": (V, U)})
    U.zero_()
    assert model.delta_sites.tolist() == [True]
    expected = target.weight.detach().clone()
    expected[:, :2] = 0
    assert torch.equal(model.sites[""].delta, expected)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x, torch.zeros(2)), x @ expected.t() + target.bias)
    torch.testing.assert_close(model(x, torch.zeros(2), torch.zeros(1)), target.bias.expand(4, 2))
    assert torch.equal(model(x, torch.ones(2), torch.ones(1)), target(x))


def test_components_that_cancel_leave_no_delta() -> None:
    """Float error is measured against the components' own size: two of 1e4 that cancel sum to W only so far."""
    target = nn.Linear(3, 3, bias=False)
    W = target.weight.detach()
    big = 1e4 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    V = torch.cat([torch.eye(3), torch.eye(3)], 1)
    model = DecomposedModel.from_components(target, {"": (V, torch.cat([W.t() + big, -big]))})
    assert not model.delta_sites.any()


def test_an_identity_is_never_built() -> None:
    model = decompose(nn.Embedding(50_000, 4), "", "neuron")
    assert model.n_nodes == 50_000
    mask = torch.ones(2, 3, 50_000)
    mask[0, 0, 7] = 0
    output = model(torch.tensor([[7, 7, 8], [7, 7, 8]]), mask)
    assert not output[0, 0].any() and output[0, 1].any() and output[1, 0].any()


def test_node_groups_across_sites() -> None:
    target = small_lm(0)
    svd = decompose(target, ["mix", "down"], "svd")
    groups = [[("down", 0), ("mix", 1)], [("mix", 0)], [("mix", 2), ("mix", 3), ("down", 1), ("down", 2)]]
    model = DecomposedModel.from_components(target, {n: (s.V, s.U) for n, s in svd.sites.items()}, groups)
    assert model.node_signature == [("mix", "down"), ("mix",), ("mix", "down")]
    assert [node.label for node in model.nodes] == ["down:0 and 1 more", "mix:0", "mix:2 and 3 more"]


class Plain(nn.Linear):
    """A subclass that changes nothing is a Linear."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_can_be_a_site() -> None:
    target = nn.ModuleList([Plain(2, 2), Doubled(2, 2), nn.LayerNorm(2), Conv1D(2, 2), nn.Embedding(2, 2)])
    assert decompose(target, "*", "neuron").site_names == ["0", "3", "4"]
