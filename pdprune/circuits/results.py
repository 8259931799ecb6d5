"""What the run of a circuit shows in an experiment tracker."""

from __future__ import annotations

from pathlib import Path

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.node_table import COLUMNS, rows_of
from pdprune.tracking import Results, Table


def circuit_results(folder: Path) -> Results:
    """The summary, and the kept nodes as a table, from the files of a run folder; its report draws the pictures.

    Raises:
        UserError: the folder lacks a circuit or its audit.
    """
    circuit, audit = Circuit.load(folder), Audit.load(folder)
    kept = Table(COLUMNS, [list(row.as_dict().values()) for row in rows_of(circuit)])
    return Results(summary_of(audit), {"circuit/kept_nodes": kept})


def summary_of(audit: Audit) -> dict[str, float | bool | None]:
    """An audit in six values: how many nodes, the loss under each scheme, `gap` and `faithful`.

    The gap is how much more the adversary costs than ablating all the rest, which is what the usual check looks at.
    """
    return {
        "kept": audit.n_kept,
        "complete": audit.complete_loss,
        "stochastic": audit.stochastic.mean,
        "adversarial": audit.adversarial.loss,
        "gap": audit.adversarial.loss - audit.complete_loss,
        "faithful": audit.faithful,
    }
