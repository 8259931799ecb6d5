"""Claim 3's table: rankings of one task and seed compared."""

from __future__ import annotations

import pytest

from pdprune.claims.experiment import Result
from pdprune.claims.subsets import EXPERIMENT

ALIKE = {"goal": "nodes", "target_share": 0.25, "target_loss": 0.15, "shares": [0.1]}


def test_schemes_are_compared_within_a_task_and_seed() -> None:
    """An adversarial ranking that loses half of what the complete one does, whatever the task and seed."""
    loses = {"complete": 1.0, "adversarial": 0.5}
    results = [
        Result(
            {"task": task, "scheme": scheme, "seed": seed, **ALIKE},
            {"curve": [{"worst_ce": hard * factor, "complete_ce": 0.0}]},
            1.0,
        )
        for task, hard in (("easy", 1.0), ("hard", 7.0))
        for seed in range(3)
        for scheme, factor in loses.items()
    ]
    unpaired = Result({"task": "hard", "scheme": "adversarial", "seed": 9, **ALIKE}, results[0].figures, 1.0)
    table = EXPERIMENT.table([*results, unpaired])
    assert "| adversarial over complete (6 pairs) | 0.50; 6/6 |" in table
    assert "stochastic" not in table


@pytest.mark.parametrize("goal", ["nodes", "loss"])
def test_a_ranking_learned_for_either_goal_is_audited_at_every_size(goal: str) -> None:
    first, *_ = EXPERIMENT.cells(EXPERIMENT.set_up(True, {"goals": (goal,)}))
    assert first["goal"] == goal
    found = EXPERIMENT.run(**first)
    assert [point["kept"] for point in found["curve"]] == [96, 672]
    assert all(point["worst_ce"] >= found["model_ce"] for point in found["curve"])
