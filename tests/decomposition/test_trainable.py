"""Components that are parameters: the same sums as given ones, with gradients, and a delta that follows them."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from decomposition.small_nets import SITES, VOCAB, Case, slow_forward, small_lm
from hypothesis import given, settings
from torch import Tensor

from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.trainable import faithfulness, settled, trainable
from pdprune.errors import UserError

COUNTS = dict(zip(SITES, (3, 6, 2, 4, 1), strict=True))
SHAPES = {"shared": (), "by position": (4,), "by example": (3, 1), "by token": (3, 4)}


def model_of(seed: int) -> DecomposedModel:
    return trainable(small_lm(seed), COUNTS, seed)


def ids_of(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, 4), generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10**6),
    mask_shape=st.sampled_from(sorted(SHAPES)),
    delta_shape=st.sampled_from(sorted(SHAPES)),
    given_parts=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
)
@settings(max_examples=25, deadline=None)
def test_outputs_and_gradients_are_the_formulas(
    seed: int, mask_shape: str, delta_shape: str, given_parts: tuple[bool, bool]
) -> None:
    model, ids = model_of(seed), ids_of(seed)
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(*SHAPES[mask_shape], model.n_nodes, generator=rng, dtype=torch.double)
    delta_mask = torch.rand(*SHAPES[delta_shape], model.n_sites, generator=rng, dtype=torch.double)
    parts = [
        part.requires_grad_() if is_given else None
        for part, is_given in zip((mask, delta_mask), given_parts, strict=True)
    ]
    output = model(ids, *parts)
    expected = slow_forward(model, ids, Case(*parts, None))
    assert torch.allclose(output, expected, atol=1e-12)
    if not any(given_parts):
        return
    leaves = [part for part in parts if part is not None] + list(model.site_list.parameters())
    weights = torch.randn(output.shape, generator=rng, dtype=torch.double)
    got, want = (
        torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (output, expected)
    )
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_settled_it_is_the_same_model(seed: int) -> None:
    model, ids = model_of(seed), ids_of(seed)
    fixed = settled(model)
    rng = torch.Generator().manual_seed(seed)
    mask, delta_mask = (torch.rand(3, 4, n, generator=rng, dtype=torch.double) for n in (model.n_nodes, model.n_sites))
    assert torch.allclose(fixed(ids, mask, delta_mask), model(ids, mask, delta_mask), atol=1e-12)
    assert fixed.nodes == model.nodes
    assert not any(parameter.requires_grad for parameter in fixed.site_list.parameters())


def test_left_alone_the_target_answers_whatever_the_components_are() -> None:
    model, ids = model_of(0), ids_of(0)
    ones, both = torch.ones(3, 4, model.n_nodes), torch.ones(model.n_sites)
    assert torch.equal(model(ids, ones, both), model.target(ids))


def test_the_target_is_left_alone() -> None:
    target = small_lm(3)
    before = copy.deepcopy(target.state_dict())
    model = trainable(target, COUNTS)
    model(ids_of(3), torch.rand(model.n_nodes), torch.rand(model.n_sites)).sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in target.parameters())
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.site_list.parameters())


def test_faithfulness_is_the_mean_square_of_what_is_left_over() -> None:
    model = model_of(5).requires_grad_(False)
    left_over = torch.cat([(site.W - (site.V @ site.U).t()).flatten() for site in model.sites.values()])
    assert float(faithfulness(model)) == pytest.approx(float(left_over.square().mean()))
    for site in model.sites.values():
        site.V.zero_()
    everything = torch.cat([site.W.flatten() for site in model.sites.values()])
    assert float(faithfulness(model)) == pytest.approx(float(everything.square().mean()))


def test_the_seed_decides_and_the_scale_is_the_weights() -> None:
    target = small_lm(1, width=40, hidden=30)
    before = torch.get_rng_state()
    a, b, other = (trainable(target, dict.fromkeys(SITES, 100), seed).requires_grad_(False) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, site in a.sites.items():
        assert torch.equal(site.V, b.sites[name].V) and not torch.equal(site.U, other.sites[name].U)
        assert 0.6 < float((site.V @ site.U).norm() / site.W.norm()) < 1.6


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"mix": 0}, "site 'mix': 0 components; expected at least 1"),
        ({"mixed": 3}, "no module 'mixed'"),
        ({"norm": 3}, "site 'norm' is a LayerNorm"),
        ({}, "no components given"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(counts: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainable(small_lm(0), counts)
