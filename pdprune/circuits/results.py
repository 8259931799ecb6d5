"""What the run of a circuit shows in an experiment tracker."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.frontier_curve import Frontier, FrontierPoint
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


def frontier_results(frontier: Frontier) -> Results:
    """The levels as a table, the smallest and the largest circuit; the frontier's page draws the curve."""
    rows = [asdict(point) for point in frontier.points]
    sizes = [point.n_kept for point in frontier.points]
    summary = {
        "levels": len(rows),
        "least_kept": min(sizes),
        "most_kept": max(sizes),
        "faithful_levels": sum(point.faithful is True for point in frontier.points),
    }
    table = Table([field.name for field in fields(FrontierPoint)], [list(row.values()) for row in rows])
    return Results(summary, {"frontier/levels": table})


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
