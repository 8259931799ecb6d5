"""What is told of a circuit that was audited, and how it stands in a table."""

from __future__ import annotations

from collections.abc import Sequence

from pdprune.circuits.findings import Audit
from pdprune.claims.experiment import Figures
from pdprune.claims.intervals import over_seeds

HEAD = ["nodes", "model's CE", "CE, rest ablated", "at random", "by the adversary", "faithful"]
"""Of `columns`."""


def audit_figures(found: Audit) -> Figures:
    """Of an audit with the task's cross-entropy as its loss, in nats."""
    assert found.loss == "ce" and found.task is not None
    return {
        "n_nodes": found.n_nodes,
        "kept": found.n_kept,
        "model_ce": found.task.model.ce,
        "complete_ce": found.task.complete.ce,
        "complete_accuracy": found.task.complete.accuracy,
        "stochastic_ce": found.task.stochastic.ce,
        "worst_ce": found.adversarial.loss,
        "worst_accuracy": found.task.adversarial.accuracy,
        "beats_model": found.beats_model,
        "faithful": found.faithful,
    }


def columns(of_it: Sequence[Figures]) -> list[str]:
    """The figures of some seeds as cells of a table, under `HEAD`."""
    return [
        f"{over_seeds([one['kept'] for one in of_it]).show(0)} of {of_it[0]['n_nodes']:,}",
        *(shown(of_it, what) for what in ("model_ce", "complete_ce", "stochastic_ce", "worst_ce")),
        f"{sum(bool(one['faithful']) for one in of_it)} of {len(of_it)}",
    ]


def shown(of_it: Sequence[Figures], what: str) -> str:
    """The mean of one figure over seeds, with its interval."""
    return over_seeds([one[what] for one in of_it]).show()
