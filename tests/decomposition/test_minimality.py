"""The price of importances, against sums written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pdprune.decomposition.minimality import Minimality
from pdprune.errors import UserError

G = torch.tensor([[[0.0, 1.0], [0.5, 1.2]], [[0.25, 0.0], [0.0, 0.0]]])
"""Two examples of two tokens, two components."""


@pytest.mark.parametrize("p", [0.4, 1.0, 2.0])
def test_powers_are_summed_over_components_and_sites_and_averaged_over_tokens(p: float) -> None:
    price = Minimality(start=p)([G, 2 * G[..., :1]], progress=0.0)
    expected = (1 + 0.5**p + 1.2**p + 0.25**p + 1 + 0.5**p) / 4
    assert float(price) == pytest.approx(expected, abs=1e-4)


def test_smooth_l0_counts_what_is_well_above_gamma() -> None:
    price = Minimality(kind="smooth_l0", start=0.1)([G], 0.0)
    expected = sum(g**2 / (g**2 + 0.01) for g in (1, 0.5, 1.2, 0.25)) / 4
    assert float(price) == pytest.approx(expected)


def test_the_frequency_term_is_slightly_more_than_proportional() -> None:
    beta, often = 0.5, torch.tensor([0.75, 2.2]) / 4
    expected = sum(f + beta * f * math.log2(1 + 4 * f) for f in often.tolist())
    assert float(Minimality(frequency=beta)([G], 0.0)) == pytest.approx(expected)
    rare, common = (Minimality(frequency=beta)([torch.full((100, 1), g)], 0.0) for g in (0.1, 0.2))
    assert 2 * rare < common < 3 * rare


def test_padding_does_not_count() -> None:
    counts = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    padded = G.clone()
    padded[1, 1] = 7
    minimality = Minimality(start=2.0, frequency=0.3)
    assert float(minimality([padded], 0.0, counts)) == pytest.approx(float(minimality([G.flatten(0, 1)[:3]], 0.0)))


def test_a_site_that_reads_the_same_for_all_examples_counts_for_each() -> None:
    alike = G[:1]
    minimality = Minimality(frequency=0.3)
    assert torch.equal(minimality([alike], 0.0, torch.ones(2, 2)), minimality([alike.expand(2, 2, 2)], 0.0))


def test_annealing_is_linear_between_its_ends() -> None:
    minimality = Minimality(start=2.0, end=0.4, anneal_from=0.25, anneal_until=0.75)
    shapes = [minimality.shape_at(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert shapes == pytest.approx([2.0, 2.0, 1.2, 0.4, 0.4])
    assert Minimality(start=2.0).shape_at(0.9) == 2.0


def test_the_gradient_is_finite_where_nothing_matters() -> None:
    g = torch.zeros(3, 2, requires_grad=True)
    Minimality(start=0.4, frequency=1.0)([g], 0.0).backward()
    assert g.grad is not None and torch.isfinite(g.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "l1"}, "kind is 'l1'; expected lp or smooth_l0"),
        ({"start": 0.0}, "start is 0.0; expected more than 0"),
        ({"coefficient": -1.0}, "coefficient is -1.0; expected 0 or more"),
        ({"anneal_from": 0.5, "anneal_until": 0.2}, "expected 0 <= anneal_from <= anneal_until <= 1"),
    ],
)
def test_settings_without_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Minimality(**change)
