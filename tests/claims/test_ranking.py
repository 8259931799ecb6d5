"""Rankings, and the smallest top of one that is good enough."""

from __future__ import annotations

import torch

from pdprune.claims.ranking import smallest_top

RANKING = torch.tensor([0.1, 0.9, 0.5, 0.7])


def test_the_smallest_top_that_is_good_enough() -> None:
    assert smallest_top(RANKING, lambda keep: {1, 3} <= keep) == {1, 3}
    assert smallest_top(RANKING, lambda keep: True) == set()
    assert smallest_top(RANKING, lambda keep: False) == {0, 1, 2, 3}


def test_it_asks_about_as_often_as_halving_needs() -> None:
    asked: list[int] = []

    def is_good(keep: set[int]) -> bool:
        asked.append(len(keep))
        return len(keep) >= 700

    assert len(smallest_top(torch.rand(1000), is_good)) == 700
    assert len(asked) <= 11
