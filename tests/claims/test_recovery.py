"""Precision, recall, F1 and AUROC by hand, intervals against known ones."""

from __future__ import annotations

import pytest
import torch

from pdprune.claims.intervals import bootstrap, markdown, over_seeds
from pdprune.claims.recovery import auroc, recovery, top


def test_recovery_by_hand() -> None:
    assert recovery({1, 2, 3, 4}, {3, 4, 5}) == pytest.approx((0.5, 2 / 3, 4 / 7))
    assert recovery({1}, {1}) == (1, 1, 1)
    assert recovery(set(), {1}) == (0, 0, 0)
    assert recovery({2}, {1}).f1 == 0


def test_auroc_counts_pairs_and_ties_half() -> None:
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    assert auroc(scores, {0}) == 1
    assert auroc(scores, {3}) == 0
    assert auroc(scores, {1}) == pytest.approx((1 + 0.5) / 3)
    assert auroc(scores, {0, 1, 2, 3}) is None
    assert top(scores, 2) == {0, 1}


def test_students_interval_of_five_seeds() -> None:
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.high - found.mean == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    many = over_seeds([float(value) for value in range(16)])
    assert many.high - many.mean == pytest.approx(2.131 * (68 / 3 / 16) ** 0.5, rel=0.01)  # beyond the table
    assert over_seeds([0.25]) == (0.25, 0.25, 0.25, 1)
    assert over_seeds([0.25]).show() == "0.25" and over_seeds([1.0, 1.0]).show() == "1.00"
    assert found.show(1) == "3.0 [1.0, 5.0]"
    assert over_seeds([0.5, 1.0]).within(0, 1).show() == "0.75 [0.00, 1.00]"


def test_the_bootstrap_is_near_the_normal_interval_of_many() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = bootstrap(values)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert found == bootstrap(values)


def test_a_markdown_table() -> None:
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
