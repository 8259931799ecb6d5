"""From a ranking to a circuit, with scorers whose answers are known."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdprune.circuits.selection import (
    CONFIRMATIONS,
    MARGIN,
    Selected,
    Selection,
    select_for_loss,
    select_for_size,
    select_open_gates,
)
from pdprune.seeding import generator

quick = settings(max_examples=25, deadline=None)


@dataclass
class Judge:
    """A scorer that is a plain function of the kept nodes."""

    loss: Callable[[set[int]], float]
    slope: Callable[[Tensor], Tensor] = torch.zeros_like
    asked: list[set[int]] = field(default_factory=list)

    def score(self, keep: Tensor, stop_above: float | None = None) -> float:
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
        self.asked.append(set(keep.flatten().nonzero().squeeze(-1).tolist()))
        return self.loss(self.asked[-1])

    def promise(self, keep: Tensor) -> Tensor:
        return self.slope(keep)


def kept(selected: Selected) -> set[int]:
    assert selected.keep.dtype == torch.bool
    return set(selected.keep.flatten().nonzero().squeeze(-1).tolist())


def select(judge: Judge, ranking: list[float], target_loss: float, scheme: Any = "adversarial", **how: Any) -> Selected:
    return select_for_loss(
        torch.tensor(ranking), judge, target_loss, scheme=scheme, selection=how.pop("selection", Selection()), **how
    )


NO_DROPS = Selection(drop_scores=0)


@given(n=st.integers(1, 60), needed=st.integers(0, 60))
@quick
def test_bisection_finds_the_fewest_top_ranked_nodes(n: int, needed: int) -> None:
    needed = min(needed, n)
    judge = Judge(lambda keep: 0.0 if set(range(needed)) <= keep else 1.0)
    found = select(judge, [float(n - i) for i in range(n)], 0.5, selection=NO_DROPS)
    assert kept(found) == set(range(needed)) and found.reached is True and found.loss == 0
    assert len(judge.asked) <= 2 + n.bit_length() + 1 + CONFIRMATIONS


@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), size=st.integers(0, 8))
@quick
def test_dropping_leaves_just_the_nodes_that_are_needed(n: int, seed: int, size: int) -> None:
    """Whatever the ranking, where nodes are needed or not each by itself."""
    rng = generator(seed)
    needed = set(torch.randperm(n, generator=rng)[:size].tolist())
    judge = Judge(lambda keep: 1.0 * len(needed - keep))
    found = select(judge, torch.rand(n, generator=rng).tolist(), 0.5)
    assert kept(found) == needed and found.reached is True


@given(seed=st.integers(0, 10**6), budget=st.integers(0, 40))
@quick
def test_dropping_stays_within_its_budget(seed: int, budget: int) -> None:
    rng = generator(seed)
    values = torch.rand(50, generator=rng)
    judge = Judge(lambda keep: float(values.sum() - values[list(keep)].sum()))
    ranking = torch.rand(50, generator=rng).tolist()
    plain = select(Judge(judge.loss), ranking, 5.0, selection=NO_DROPS)
    before = len(judge.asked)
    found = select(judge, ranking, 5.0, selection=Selection(drop_scores=budget))
    bisecting = 8
    assert len(judge.asked) - before <= bisecting + budget + CONFIRMATIONS
    assert len(kept(found)) <= len(kept(plain)) and found.loss <= MARGIN * 5.0


def test_a_circuit_whose_attack_was_unlucky_is_found_out() -> None:
    """An attack that misses what circuits of fewer than 5 nodes are open to, but the third time it is asked."""
    tries: Counter[frozenset[int]] = Counter()

    def sometimes(keep: set[int]) -> float:
        tries[frozenset(keep)] += 1
        return 1.0 if not {0, 1} <= keep or (len(keep) < 5 and tries[frozenset(keep)] % 3 == 0) else 0.0

    found = select(Judge(sometimes), [float(10 - i) for i in range(10)], 0.5)
    assert len(kept(found)) >= 5 and found.reached is True


def test_all_nodes_of_small_circuits_are_tried_by_default() -> None:
    assert Selection().budget(300) >= 300 and Selection().budget(10**4) <= 800
    assert Selection(drop_scores=7).budget(300) == 7


def test_room_is_left_below_the_target() -> None:
    judge = Judge(lambda keep: 1.0 - 0.1 * len(keep))
    found = select(judge, [float(i) for i in range(10)], 0.5)
    assert len(kept(found)) == 6 and found.loss == pytest.approx(0.4)


def test_without_room_the_floor_is_good_enough() -> None:
    """A target just above what keeping everything costs is reached with what costs no more."""
    judge = Judge(lambda keep: 0.48 if {0, 1} <= keep else 1.0)
    found = select(judge, [3.0, 2.0, 1.0], 0.5)
    assert kept(found) == {0, 1} and found.reached is True


def test_an_unreachable_target_returns_all_nodes_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge(lambda keep: 0.7)
    with caplog.at_level(logging.WARNING):
        found = select(judge, [3.0, 2.0, 1.0], 0.5)
    assert kept(found) == {0, 1, 2} and found.reached is False and found.loss == 0.7
    assert len(judge.asked) == 1, "adding nodes cannot help: nothing else is tried"
    (record,) = caplog.records
    assert "0.5 cannot be reached" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("scheme", ["complete", "stochastic"])
def test_without_an_adversary_a_smaller_circuit_may_beat_the_model(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Judge(lambda keep: 0.1 if keep == {1, 2} else 0.7)
    found = select(judge, [0.0, 3.0, 2.0, 1.0], 0.5, scheme)
    assert kept(found) == {1, 2} and found.reached is True and not caplog.records


@pytest.mark.parametrize("scheme", ["complete", "stochastic"])
def test_without_an_adversary_what_cannot_be_reached_is_said_after_the_search(scheme: str) -> None:
    judge = Judge(lambda keep: 0.7)
    found = select(judge, [0.0, 3.0, 2.0, 1.0], 0.5, scheme)
    assert found.reached is False and len(judge.asked) > 4


def test_without_an_adversary_two_that_cancel_are_dropped_together() -> None:
    """Neither of nodes 1 and 2 can go alone, and the ranking puts node 0 last."""

    def loss(keep: set[int]) -> float:
        return 0.0 if 0 in keep and (1 in keep) == (2 in keep) else 1.0

    assert kept(select(Judge(loss), [1.0, 3.0, 2.0], 0.5, "complete")) == {0}
    assert kept(select(Judge(lambda keep: loss(keep)), [1.0, 3.0, 2.0], 0.5, "complete")) == {0}


def test_without_an_adversary_large_sets_that_cancel_never_come_in() -> None:
    """Dropping gets nowhere: any part of nodes 1 to 40 hurts. Growing from nothing does."""

    def loss(keep: set[int]) -> float:
        return 1.0 - (0 in keep) + 0.5 * (0 < len(keep - {0}) < 40)

    def slope(keep: Tensor) -> Tensor:
        return (torch.arange(41) == 0).float() + torch.linspace(0, 0.1, 41)

    judge = Judge(loss, slope)
    found = select(judge, [0.0] + [1.0] * 40, 0.4, "complete")
    assert kept(found) == {0} and found.reached is True


@given(seed=st.integers(0, 10**6))
@quick
def test_scanning_takes_the_least_good_size_wherever_it_is(seed: int) -> None:
    size = seed % 30
    judge = Judge(lambda keep: 0.0 if keep == set(range(size)) or len(keep) == 30 else 1.0)
    found = select(judge, [float(30 - i) for i in range(30)], 0.5, "complete", selection=NO_DROPS)
    assert kept(found) == set(range(size))


def test_a_choice_that_fails_its_last_look_takes_nodes_back() -> None:
    """The scorer has seen more attacks since: it now finds node 3 needed."""
    judge = Judge(lambda keep: 0.0)
    told: list[tuple[str, int, int]] = []

    def loss(keep: set[int]) -> float:
        late = len(judge.asked) > 12
        return 0.0 if {0} | ({3} if late else set()) <= keep else 1.0

    judge.loss = loss
    found = select(
        judge, [9.0, 8.0, 7.0, 6.0, 5.0], 0.5, report=lambda doing, scored, size: told.append((doing, scored, size))
    )
    assert found.reached is True and found.loss == 0
    assert {doing for doing, _, _ in told} == {"bisecting", "dropping"}
    assert [scored for _, scored, _ in told] == list(range(1, len(told) + 1))


def test_a_size_is_the_top_of_the_ranking() -> None:
    ranking = torch.tensor([0.3, 0.9, 0.9, 0.1])
    judge = Judge(lambda keep: 1.0 * len(keep))
    for size, expected in ((0, set()), (1, {1}), (2, {1, 2}), (4, {0, 1, 2, 3})):
        found = select_for_size(ranking, judge, size)
        assert kept(found) == expected and found.loss == size and found.reached is None


@given(seed=st.integers(0, 10**6))
@quick
def test_nodes_are_swapped_where_that_lowers_the_loss(seed: int) -> None:
    """Whatever the ranking, the best of a size is found where each node counts by itself."""
    rng = generator(seed)
    values = torch.rand(8, generator=rng)
    judge = Judge(lambda keep: float(values.sum() - values[list(keep)].sum()))
    ranking = torch.rand(8, generator=rng)
    found = select_for_size(ranking, judge, 3)
    best = float(values.sum() - values.topk(3).values.sum())
    assert len(kept(found)) == 3 and found.loss == judge.loss(kept(found)) <= 1.05 * best
    few = Judge(judge.loss)
    assert select_for_size(ranking, few, 3, selection=Selection(swap_scores=2)).loss >= found.loss
    assert len(few.asked) <= 3


def test_open_gates_are_kept() -> None:
    found = select_open_gates(torch.tensor([0.2, 0.51, 0.5, 1.0]), Judge(lambda keep: 0.5))
    assert kept(found) == {1, 3} and found.loss == 0.5 and found.reached is None


def test_circuits_by_position_are_selected_position_by_position() -> None:
    ranking = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
    judge = Judge(lambda keep: 0.0 if {0, 3} <= keep else 1.0)
    found = select_for_loss(ranking, judge, 0.5, scheme="adversarial", selection=Selection())
    assert found.keep.tolist() == [[True, False], [False, True]]
    assert select_for_size(ranking, judge, 2).keep.tolist() == [[True, False], [False, True]]
