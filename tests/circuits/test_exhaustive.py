"""Exact search against brute force over all circuits, and for each over all sources."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.circuits.exhaustive import can_be_exhaustive, select_exhaustively
from pdprune.circuits.schemes import Draws
from pdprune.circuits.selection import MARGIN
from pdprune.claims.planted.handmade import by_neuron, cancelling_sets
from pdprune.decomposition import DecomposedModel
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.seeding import generator

BERNOULLI = Draws("bernoulli", p=0.3)


def random_losses(seed: int, n: int = 4, n_deltas: int = 1) -> list[MaskedLoss]:
    """Two sites with `n` nodes together, of which the first `n_deltas` have a delta; two batches of unequal size."""
    rng = generator(seed, "exhaustive")
    first = n // 2
    target = nn.Sequential(nn.Linear(first, n - first), nn.Tanh(), nn.Linear(n - first, 3))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=rng))
    share = [0.8 if site < n_deltas else 1.0 for site in range(2)]
    components = {
        name: (torch.eye(target[int(name)].in_features), part * target[int(name)].weight.detach().T)
        for name, part in zip("02", share, strict=True)
    }
    model = DecomposedModel.from_components(target, components)
    batches = [torch.randn(size, first, generator=rng) for size in (5, 9)]
    return [MaskedLoss(model, as_batch(batch)) for batch in batches]


def binary(size: int) -> list[Tensor]:
    return [torch.tensor(bits) for bits in itertools.product((0.0, 1.0), repeat=size)]


def brute_force(
    losses: list[MaskedLoss], scheme: str, scope: str = "batch", max_ablated: int | None = None, p: float = 0.3
) -> dict[tuple[float, ...], float]:
    """The loss of every circuit, the slow way: every circuit against every source."""
    model = losses[0].model
    n, has_delta = model.n_nodes, model.delta_sites
    found = {}
    for keep in binary(n):
        answers: list[list[Tensor]] = [[] for _ in losses]
        chances = []
        for source in binary(n):
            ablated = int(((1 - keep) * (1 - source)).sum())
            for delta in binary(model.n_sites):
                if bool((delta[~has_delta] == 0).any()):
                    continue
                if scheme == "complete" and (source.any() or delta[has_delta].any()):
                    continue
                if scheme == "adversarial" and max_ablated is not None and ablated > max_ablated:
                    continue
                free = torch.cat([source, delta[has_delta]])
                chances.append(float(torch.where(free > 0, p, 1 - p).prod()))
                for loss, values in zip(losses, answers, strict=True):
                    with torch.no_grad():
                        values.append(loss.per_example(keep + (1 - keep) * source, delta))
        tables = [torch.stack(values).double() for values in answers]  # [sources, B]
        weights = [loss.size / sum(loss.size for loss in losses) for loss in losses]
        if scheme == "stochastic":
            chance = torch.tensor(chances, dtype=torch.float64)
            value = sum(w * float((chance @ table).mean()) for w, table in zip(weights, tables, strict=True))
        elif scope == "example":
            value = sum(w * float(table.amax(0).mean()) for w, table in zip(weights, tables, strict=True))
        elif scope == "universal":
            value = float(sum(w * table.mean(1) for w, table in zip(weights, tables, strict=True)).max())
        else:
            value = sum(w * float(table.mean(1).max()) for w, table in zip(weights, tables, strict=True))
        found[tuple(keep.tolist())] = value
    return found


def search(losses: list[MaskedLoss], **options: Any) -> Any:
    settings = {
        "scheme": "adversarial", "scope": "batch", "draws": BERNOULLI, "max_ablated": None,
        "target_loss": None, "target_nodes": None, "coefficient": None,
    } | options  # fmt: skip
    return select_exhaustively(losses, **settings)


CASES = [
    ("complete", "batch", None),
    ("stochastic", "batch", None),
    ("adversarial", "batch", None),
    ("adversarial", "universal", None),
    ("adversarial", "example", None),
    ("adversarial", "batch", 0),
    ("adversarial", "batch", 2),
]


@pytest.mark.parametrize(("scheme", "scope", "max_ablated"), CASES)
@given(seed=st.integers(0, 10**6), n_deltas=st.integers(0, 2))
@settings(max_examples=2, deadline=None)
def test_the_circuit_is_the_best_of_all(
    scheme: str, scope: str, max_ablated: int | None, seed: int, n_deltas: int
) -> None:
    losses = random_losses(seed, n_deltas=n_deltas)
    table = brute_force(losses, scheme, scope, max_ablated)
    how = {"scheme": scheme, "scope": scope, "max_ablated": max_ablated}
    n = losses[0].model.n_nodes

    for size in range(n + 1):
        of_size = search(losses, target_nodes=size, **how)
        assert int(of_size.keep.sum()) == size and of_size.reached is None
        best = min(value for keep, value in table.items() if sum(keep) == size)
        assert of_size.loss == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert table[tuple(of_size.keep.float().tolist())] == pytest.approx(best, rel=1e-4, abs=1e-6)

    for price in (0.0, 0.3, 100.0):
        at_price = search(losses, coefficient=price, **how)
        cost = min(value + price * sum(keep) / n for keep, value in table.items())
        assert at_price.loss + price * int(at_price.keep.sum()) / n == pytest.approx(cost, rel=1e-4, abs=1e-6)

    floor, empty = table[(1.0,) * n], table[(0.0,) * n]
    target = floor + 0.4 * abs(empty - floor) + 1e-3
    within = search(losses, target_loss=target, **how)
    threshold = max(MARGIN * target, min(floor, target))
    good = [keep for keep, value in table.items() if value <= threshold]
    assert within.reached is True
    assert int(within.keep.sum()) == min(sum(keep) for keep in good)
    assert within.loss == pytest.approx(table[tuple(within.keep.float().tolist())], rel=1e-4, abs=1e-6)
    assert within.loss <= threshold + 1e-6


def test_an_unreachable_target_returns_all_nodes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    losses = random_losses(0, n_deltas=2)
    with caplog.at_level(logging.WARNING):
        found = search(losses, target_loss=1e-6)
    assert found.reached is False and bool(found.keep.all())
    (record,) = caplog.records
    assert "cannot be reached" in record.getMessage() and "\n" not in record.getMessage()


def test_without_an_adversary_small_circuits_are_searched_for_anyway(caplog: pytest.LogCaptureFixture) -> None:
    """The deltas alone break the full circuit; a smaller one may do better than it."""
    losses = random_losses(3, n_deltas=2)
    table = brute_force(losses, "complete")
    floor = table[(1.0,) * 4]
    best = min(table.values())
    found = search(losses, scheme="complete", target_loss=max(best * 1.2, floor * 0.9))
    assert found.reached is (best <= max(best * 1.2, floor * 0.9)) is True
    assert search(losses, scheme="complete", target_loss=best / 2).reached is False
    assert not caplog.records


def test_exact_search_is_automatic_for_small_graphs_with_exact_answers() -> None:
    small, large = random_losses(0, n=12, n_deltas=2), random_losses(0, n=13)
    draws = Draws()
    assert can_be_exhaustive(small, "adversarial", "batch", draws)
    assert can_be_exhaustive(small, "complete", "universal", draws)
    assert can_be_exhaustive(small, "stochastic", "batch", BERNOULLI)
    assert not can_be_exhaustive(small, "stochastic", "batch", draws)
    assert not can_be_exhaustive(small, "adversarial", "example_position", draws)
    assert not can_be_exhaustive(large, "adversarial", "batch", draws)


def test_large_graphs_and_scopes_with_positions_are_refused() -> None:
    puzzle = cancelling_sets(9)
    many = [MaskedLoss(puzzle.model, as_batch(puzzle.batch))]
    with pytest.raises(UserError, match="19 nodes and deltas; expected at most 16"):
        search(many, target_nodes=1)
    with pytest.raises(UserError, match="scope 'position' has too many free entries"):
        search(random_losses(0), target_nodes=1, scope="position")


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.read.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] / self.read(x)


@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_a_loss_that_is_not_finite_ends_the_search(scheme: str) -> None:
    losses = [MaskedLoss(by_neuron(Divides(), ["read"]), as_batch(torch.ones(4, 3)), "mse")]
    with pytest.raises(NonFiniteLossError, match="NaN or infinite with nodes ablated"):
        search(losses, scheme=scheme, target_nodes=1)
