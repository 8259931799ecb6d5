"""A frontier as what its page shows."""

from __future__ import annotations

from pdprune.circuits.frontier_curve import Frontier
from pdprune.report.figures import FrontierFigures
from pdprune.report.verdict import SCHEMES, loss_title


def frontier_figures(frontier: Frontier, name: str) -> FrontierFigures:
    """What is shown of a frontier.

    Args:
        frontier: what a run came to.
        name: of the run.
    """
    sizes = [point.n_kept for point in frontier.points]
    faithful = [point.faithful for point in frontier.points if point.faithful is not None]
    judged = f"; {sum(faithful)} of {len(faithful)} faithful under attack" if faithful else ""
    return FrontierFigures(
        name=name,
        headline=f"{len(sizes)} circuits of {min(sizes):,} to {max(sizes):,} nodes{judged}",
        task=frontier.task or "",
        target=frontier.target,
        loss=loss_title(frontier.loss),
        n_nodes=frontier.n_nodes,
        model_loss=frontier.model_loss,
        points=frontier.points,
        note=(
            f"Discs: circuits pruned {SCHEMES.get(frontier.scheme, frontier.scheme)}, each learned, chosen and audited "
            f"by itself, on {frontier.n_examples:,} held-out examples. The adversary's are lower bounds."
        ),
    )
