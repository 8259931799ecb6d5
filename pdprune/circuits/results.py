"""What the run of a circuit shows in an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.frontier_curve import Frontier, FrontierPoint
from pdprune.circuits.node_table import COLUMNS, rows_of
from pdprune.circuits.pictures import Line, circuit_picture, curve_picture, frontier_picture
from pdprune.loggers import read_metrics
from pdprune.run_folder import METRICS_FILE
from pdprune.tracking import Picture, Results, Table


def circuit_results(folder: Path, scheme: str) -> Results:
    """The summary, the kept nodes as a table, and two pictures, from the files of a run folder.

    Args:
        folder: with a circuit and its audit.
        scheme: what the circuit was pruned with, whose loss was logged while it was learned.

    Raises:
        UserError: the folder lacks one of them.
    """
    circuit, audit = Circuit.load(folder), Audit.load(folder)
    rows = rows_of(circuit)

    def draw() -> dict[str, Picture]:
        return {
            "circuit/curve": curve_picture(lines_while_learning(folder / METRICS_FILE, scheme), audit),
            "circuit/nodes": circuit_picture(rows, circuit.n_nodes),
        }

    kept = Table(COLUMNS, [list(row.as_dict().values()) for row in rows])
    return Results(summary_of(audit), {"circuit/kept_nodes": kept}, draw)


def frontier_results(frontier: Frontier) -> Results:
    """The levels as a table, the smallest and the largest circuit, and the curve."""
    rows = [asdict(point) for point in frontier.points]
    sizes = [point.n_kept for point in frontier.points]
    summary = {
        "levels": len(rows),
        "least_kept": min(sizes),
        "most_kept": max(sizes),
        "faithful_levels": sum(point.faithful is True for point in frontier.points),
    }
    table = Table([field.name for field in fields(FrontierPoint)], [list(row.values()) for row in rows])
    return Results(summary, {"frontier/levels": table}, lambda: {"frontier/curve": frontier_picture(frontier)})


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


def lines_while_learning(path: Path, scheme: str) -> Mapping[str, Line]:
    """The losses that were logged as the gates closed, by nodes then open; empty without a `metrics.csv`."""
    logged = read_metrics(path)
    sizes = logged.get("kept", [])
    columns = {"complete": "complete", "stochastic": "stochastic", scheme: "loss"}
    return {
        name: [
            (size, loss)
            for size, loss in zip(sizes, logged[column], strict=True)
            if size is not None and loss is not None
        ]
        for name, column in columns.items()
        if column in logged
    }
