"""Norms held at the scale of the unablated run: linear then, and the target itself where nothing is ablated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.decomposition.norms import norms_of, scale_of
from pdprune.errors import UserError
from pdprune.targets.transformer import Transformer, TransformerConfig


class LlamaRMSNorm(nn.Module):
    """As in Hugging Face transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "layer without affine": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(6),
    "rms with eps": lambda: nn.RMSNorm(6, eps=0.1),
    "hugging face": lambda: LlamaRMSNorm(6),
}


def normed(kind: str) -> DecomposedModel:
    """A site that writes, a norm, and a site that reads; the nodes are what is written."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 6), NORMS[kind](), nn.Linear(6, 3)).double()
    for parameter in target[1].parameters():
        nn.init.normal_(parameter)
    return decompose(target, ["0"], "neuron")


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", NORMS)
def test_unablated_it_is_the_target(kind: str) -> None:
    model, x = normed(kind), drawn(5, 4)
    torch.testing.assert_close(model(x, norm_scales=model.norm_scales(x)), model.target(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_frozen_the_output_is_affine_in_the_mask_and_live_it_is_not(kind: str) -> None:
    model, x = normed(kind), drawn(5, 4)
    masks = drawn(2, 4)
    scales = model.norm_scales(x)
    for norm_scales, affine in ((scales, True), (None, False)):
        ends = [model(x, mask, norm_scales=norm_scales) for mask in masks]
        middle = model(x, masks.mean(0), norm_scales=norm_scales)
        assert torch.allclose(middle, sum(ends) / 2, rtol=1e-9, atol=1e-12) == affine


def test_by_hand() -> None:
    """Under an RMSNorm without weights the unablated [3, 4] has scale 1/√12.5; without its first half it stays so."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2, eps=0.0, elementwise_affine=False))
    with torch.no_grad():
        target[0].weight.copy_(torch.eye(2))
    model, x = decompose(target, ["0"], "neuron"), torch.tensor([[3.0, 4.0]])
    mask = torch.tensor([0.0, 1.0])
    frozen = model(x, mask, norm_scales=model.norm_scales(x))
    torch.testing.assert_close(frozen, torch.tensor([[0.0, 4 / 12.5**0.5]]))
    torch.testing.assert_close(model(x, mask), torch.tensor([[0.0, 2**0.5]]))


def test_both_routes_agree_in_a_transformer() -> None:
    torch.manual_seed(0)
    target = Transformer(TransformerConfig(vocab_size=11, max_length=8, n_layers=2, n_heads=2, d_model=8, d_mlp=16))
    model = decompose(target.double(), ["*.mlp.down", "*.attn.out"], "neuron")
    ids = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    scales = model.norm_scales(ids)
    assert scales.keys() == norms_of(target).keys() and len(scales) == 5
    assert all(scale.shape == (3, 8, 1) and not scale.requires_grad for scale in scales.values())
    mask = drawn(model.n_nodes)
    shared, per_token = (model(ids, m, norm_scales=scales) for m in (mask, mask.expand(3, 8, -1)))
    torch.testing.assert_close(shared, per_token, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(shared, model(ids, mask))
    torch.testing.assert_close(model(ids), target(ids))  # no hook stays behind


def test_half_precision_is_summed_in_float32() -> None:
    norm = nn.LayerNorm(6)
    assert scale_of(norm, drawn(5, 6).bfloat16()).dtype == torch.float32
    model = normed("layer")
    model.target.bfloat16()
    x = drawn(5, 4).bfloat16()
    assert model(x, norm_scales=model.norm_scales(x)).dtype == torch.bfloat16


class GemmaRMSNorm(nn.RMSNorm):
    """One whose weight is something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "has no norm"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), GemmaRMSNorm(4)), "'2' is a GemmaRMSNorm"),
        (nn.Sequential(nn.Linear(4, 4), *([nn.LayerNorm(4)] * 2)), "'1' is called 2 times"),
    ],
    ids=["none", "unknown", "twice"],
)
def test_what_cannot_be_frozen_is_refused(target: nn.Module, says: str) -> None:
    with pytest.raises(UserError, match=says):
        decompose(target, ["0"], "neuron").norm_scales(torch.ones(1, 4))
