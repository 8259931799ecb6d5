"""Losses under drawn sources: which sites they touch, and against slow sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decomposition.small_nets import SITES, VOCAB, small_lm

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.decomposition.attribution import TopK, attributions
from pdprune.decomposition.reconstruction import (
    at_all_sites,
    in_subsets,
    random_subsets,
    site_by_site,
    site_of_entry,
)
from pdprune.decomposition.trainable import trainable
from pdprune.errors import UserError
from pdprune.seeding import generator

ids = torch.randint(0, VOCAB, (3, 4), generator=torch.Generator().manual_seed(0))


def loss_of(seed: int, sites: tuple[str, ...] = SITES) -> MaskedLoss:
    model = trainable(small_lm(seed), dict.fromkeys(sites, 3), seed)
    model.requires_grad_(False)
    return MaskedLoss(model, as_batch({"inputs": ids}), "kl", observed=model.observe(ids))


def gates_of(loss: MaskedLoss, seed: int) -> torch.Tensor:
    return torch.rand(3, 4, loss.model.n_nodes, generator=generator(seed, "gates"), dtype=torch.double)


def test_observing_first_changes_nothing() -> None:
    loss = loss_of(0)
    again = MaskedLoss(loss.model, loss.batch, "kl")
    assert torch.equal(loss.target_output, again.target_output) and loss.leading_shape == again.leading_shape == (3, 4)


def test_site_by_site_leaves_the_others_alone() -> None:
    loss = loss_of(1)
    gates = gates_of(loss, 1)
    entries = torch.rand(3, 4, loss.model.n_nodes + loss.model.n_sites, generator=generator(1, "draw"))
    mask = gates + (1 - gates) * entries[..., : loss.model.n_nodes]
    at = site_of_entry(loss.model)
    expected = []
    for index in range(loss.model.n_sites):
        elsewhere = at != index
        node_mask = mask.masked_fill(elsewhere[: loss.model.n_nodes], 1)
        delta_mask = entries[..., loss.model.n_nodes :].masked_fill(elsewhere[loss.model.n_nodes :], 1)
        expected.append(float(loss.per_example(node_mask, delta_mask).mean()))
    found = float(site_by_site(loss, gates, generator(1, "draw")))
    assert found == pytest.approx(sum(expected) / len(expected))


def test_of_one_site_all_ways_are_one() -> None:
    loss = loss_of(2, sites=("mix",))
    gates = gates_of(loss, 2)
    everywhere = at_all_sites(loss, gates, generator(2, "draw"))
    assert float(site_by_site(loss, gates, generator(2, "draw"))) == pytest.approx(float(everywhere))
    subsets = torch.stack([in_subsets(loss, gates, generator(2, "draw", index)) for index in range(60)])
    always = torch.stack([at_all_sites(loss, gates, generator(2, "draw", index)) for index in range(60)])
    assert float(subsets.mean()) == pytest.approx(float(always.mean()), rel=0.15)


@pytest.mark.parametrize("way", [at_all_sites, site_by_site, in_subsets])
def test_deltas_are_left_to_chance_whatever_matters(way: Any) -> None:
    loss = loss_of(3)
    everything_matters = torch.ones(3, 4, loss.model.n_nodes, dtype=torch.double)
    assert float(way(loss, everything_matters, generator(3, "draw"))) > 1e-6


def test_subsets_are_never_empty_and_of_all_sizes_alike() -> None:
    masked = random_subsets((2000,), 4, generator(0, "subsets"))
    sizes = masked.sum(-1).bincount(minlength=5)
    assert sizes[0] == 0 and all(400 < int(size) < 600 for size in sizes[1:])
    assert all(0.55 < float(share) < 0.7 for share in masked.double().mean(0))  # (1 + 2 + 3 + 4) / 16


def test_every_entry_has_its_site() -> None:
    model = trainable(small_lm(0), {"mix": 2, "down": 3})
    assert site_of_entry(model).tolist() == [0, 0, 1, 1, 1, 0, 1]


# -- attributions ----------------------------------------------------------------------------------------------------


class Squeeze(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.outward(torch.tanh(self.inward(x))))


def squeeze_loss() -> MaskedLoss:
    model = trainable(Squeeze().requires_grad_(False), {"inward": 4, "outward": 6})
    return MaskedLoss(model, as_batch(torch.randn(7, 4)), "mse")


def test_attributions_are_gradients_along_the_components() -> None:
    loss = squeeze_loss()
    target = loss.model.target
    found = attributions(loss, 16, generator(0, "directions"))
    for example, x in enumerate(loss.batch.inputs):
        weights = {name: site.W.clone().requires_grad_() for name, site in loss.model.sites.items()}
        output = torch.func.functional_call(target, {f"{name}.weight": W for name, W in weights.items()}, x)
        expected = torch.zeros(loss.model.n_nodes)
        for value in output:
            gradients = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
            along = [
                torch.einsum("oi,ic,co->c", gradient, site.V, site.U)
                for gradient, site in zip(gradients, loss.model.sites.values(), strict=True)
            ]
            expected += torch.cat(along).detach().square()
        assert torch.allclose(found[example], expected, atol=1e-6)


def test_few_random_directions_estimate_many_outputs() -> None:
    loss = squeeze_loss()
    exact = attributions(loss, 5, generator(0, "directions"))
    estimates = [attributions(loss, 4, generator(0, "directions", index)) for index in range(100)]
    assert torch.allclose(torch.stack(estimates).mean(0), exact, rtol=0.35, atol=float(exact.mean()) / 10)


def test_the_most_attributed_of_the_batch_are_kept() -> None:
    loss = squeeze_loss()
    gates = TopK(active=1.5).gates(loss, generator(0, "directions"))
    squares = attributions(loss, 16, generator(0, "directions"))
    assert gates.sum() == round(1.5 * 7)
    assert squares[gates > 0].min() >= squares[gates == 0].max()
    with pytest.raises(UserError, match="active must be more than 0"):
        TopK(active=0)
