"""A run's circuit for other tools: `python -m pdprune.export RUN [--out FOLDER]`.

    circuit.graphml           the kept nodes and the edges that the report draws, for graph tools (networkx, Gephi, ...)
    circuit.node_link.json    the same as networkx reads it: networkx.node_link_graph(json.load(file), edges="edges")
    nodes.csv, nodes.parquet  all nodes, kept or not: site, component, layer, role, gate, and the worst source found

Parquet needs pyarrow (extra `parquet`). The nodes that are not kept are looked up in the target that the run's
`config.yaml` names, and edges are traced in it; relative paths in it must hold from where the command is given.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import networkx

from pdprune.circuit_config import CircuitConfig
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.graph import Edge, graph_of
from pdprune.circuits.node_table import COLUMNS, NodeRow, rows_of
from pdprune.errors import UserError
from pdprune.files import write_atomically
from pdprune.progress import telling
from pdprune.report import AuditedRun
from pdprune.report.gather import strongest_edges

GRAPHML = "circuit.graphml"
NODE_LINK = "circuit.node_link.json"
CSV = "nodes.csv"
PARQUET = "nodes.parquet"


def write_export(
    circuit: Circuit, rows: Sequence[NodeRow], folder: Path, edges: Iterable[Edge] = ()
) -> tuple[list[Path], list[str]]:
    """Write a circuit in all forms.

    Args:
        circuit: gives the graph's nodes.
        rows: of the table.
        folder: where the files go; made if it is not there.
        edges: between kept nodes, as far as they are known.

    Returns:
        the files, and what has to be said about what is missing.

    Raises:
        UserError: they cannot be written.
    """
    graph = graph_of(circuit, edges)
    contents = {
        GRAPHML: "\n".join(networkx.generate_graphml(graph)).encode(),
        NODE_LINK: json.dumps(networkx.node_link_data(graph, edges="edges"), indent=1).encode(),
        CSV: _as_csv(rows),
    }
    notes = []
    try:
        contents[PARQUET] = _as_parquet(rows)
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        notes.append(f"no {PARQUET}: pyarrow is missing; pip install 'pdprune[parquet]'")
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents], notes


def all_rows(run: Path, circuit: Circuit) -> tuple[list[NodeRow], list[str]]:
    """The rows of all nodes of the model that a run's config describes; of the kept ones, if it cannot be had."""
    try:
        model = CircuitConfig.read(run / "config.yaml").decomposition.load()
        circuit.check_fits(model)
    except UserError as error:
        return rows_of(circuit), [f"the table has the kept nodes only: {error}"]
    return rows_of(circuit, dict(enumerate(model.nodes))), []


def edges_between(run: Path) -> tuple[list[Edge], list[str]]:
    """The edges that a run's report draws, and what has to be said about them; none of a run that was not audited."""
    try:
        return strongest_edges(AuditedRun.load(run))
    except UserError as error:
        return [], [f"the graph has no edges: {error}"]


def _as_csv(rows: Sequence[NodeRow]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return text.getvalue().encode()


def _as_parquet(rows: Sequence[NodeRow]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    types = {
        "node": pyarrow.int64(),
        "layer": pyarrow.int64(),
        "gate": pyarrow.float64(),
        "kept": pyarrow.bool_(),
        "worst_source": pyarrow.float64(),
    }
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in COLUMNS])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), sink)
    return sink.getvalue()


def main(args: list[str] | None = None) -> int:
    """Write the files and return the exit status: 2 for a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m pdprune.export", description="Write a circuit for other tools.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished fit, or of an audited circuit")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the files go; by default RUN/export")
    given = parser.parse_args(args)
    try:
        with telling("export") as tell:
            circuit = Circuit.load(given.run)
            tell("the nodes that are not kept")
            rows, missing = all_rows(given.run, circuit)
            tell("edges")
            edges, about_edges = edges_between(given.run)
            files, left_out = write_export(circuit, rows, given.out or given.run / "export", edges)
    except UserError as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    for note in (*missing, *about_edges, *left_out):
        print(f"pdprune: {' '.join(note.split())}", file=sys.stderr)
    print(f"Wrote {', '.join(path.name for path in files)} to {files[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
