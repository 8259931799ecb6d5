"""Group the nodes of a run that matter together: `python -m pdprune.cluster CONFIG OUT.json`.

CONFIG is what `fit --config` takes, or the `config.yaml` of a run; the groups come from its training prompts. With
`--model.decomposition.nodes OUT.json` a run has them as its nodes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from pdprune.circuit_config import CircuitConfig
from pdprune.decomposition import Node, co_important, write_clusters
from pdprune.errors import UserError
from pdprune.progress import telling


def clusters_of(config: Path, on_above: float, together: float) -> tuple[list[Node], int]:
    """The groups of a config's nodes on its training split, and how many nodes there are.

    Raises:
        UserError: a config that can't be read or describes no circuit.
    """
    described = CircuitConfig.read(config)
    model = replace(described.decomposition, nodes=None).load()
    batches = described.make_data().train_batches()
    return co_important(model, batches, on_above, together), model.n_nodes


def main(args: list[str] | None = None) -> int:
    """Write the groups and return the exit status: 2 for a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m pdprune.cluster", description="Group nodes that matter together.")
    parser.add_argument("config", type=Path, help="what fit --config takes")
    parser.add_argument("out", type=Path, help="the file to write, for --model.decomposition.nodes")
    parser.add_argument(
        "--on_above",
        type=float,
        default=0.1,
        help="a node is on where its importance, or else the share of its largest activation, is above this",
    )
    parser.add_argument(
        "--together",
        type=float,
        default=0.5,
        help="groups are joined while they are this similar (Jaccard, on average)",
    )
    given = parser.parse_args(args)
    try:
        with telling("grouping nodes"):
            clusters, n_nodes = clusters_of(given.config, given.on_above, given.together)
        write_clusters(given.out, clusters)
    except UserError as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    grouped = sum(len(cluster.components) for cluster in clusters)
    print(
        f"Wrote {len(clusters)} groups, of {grouped} components, to {given.out}; there are {n_nodes} nodes without them"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
