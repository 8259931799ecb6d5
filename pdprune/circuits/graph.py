"""A circuit as a directed graph, for networkx and what reads its formats."""

from __future__ import annotations

from collections.abc import Iterable

import networkx

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.node_table import rows_of

Edge = tuple[int, int, float]
"""From a kept node to another, by their indices in the model, and how strongly the one acts on the other."""


def graph_of(circuit: Circuit, edges: Iterable[Edge] = ()) -> networkx.DiGraph:
    """The kept nodes of a circuit, with what is known of each, and edges between them.

    Nodes are known by their index in the model. Their attributes are those of `NodeRow` but `kept`; edges have
    `strength`. What is not known is left out, as GraphML has no word for it. Attributes of the graph say what it is a
    circuit of.

    Args:
        circuit: gives the nodes.
        edges: as far as they are known; edges to nodes that are not kept are left out.
    """
    known = {
        "task": circuit.task,
        "target": circuit.target.name,
        "target_sha256": circuit.target.sha256,
        "decomposition": circuit.decomposition.name,
        "scheme": circuit.scheme,
        "reference": circuit.reference,
        "loss": circuit.loss,
        "target_loss": circuit.target_loss,
        "n_nodes": circuit.n_nodes,
        "n_kept": circuit.n_kept,
    }
    graph = networkx.DiGraph(**{name: value for name, value in known.items() if value is not None})
    for row in rows_of(circuit):
        of_node = {name: value for name, value in row.as_dict().items() if name not in ("node", "kept")}
        graph.add_node(row.node, **{name: value for name, value in of_node.items() if value is not None})
    for source, destination, strength in edges:
        if source in graph and destination in graph:
            graph.add_edge(source, destination, strength=strength)
    return graph
