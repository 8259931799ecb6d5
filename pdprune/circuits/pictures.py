"""A circuit and its losses as pictures, for experiment trackers. Needs matplotlib (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pdprune.circuits.findings import Audit
from pdprune.circuits.frontier_curve import Frontier
from pdprune.circuits.node_table import NodeRow
from pdprune.tracking import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMES = {"complete": "rest ablated", "stochastic": "rest at random", "adversarial": "rest by the adversary"}
COLOURS = {"complete": "#d08770", "stochastic": "#8a8f98", "adversarial": "#3b6ea5"}
ROLE_COLOURS = {"attention": "#d08770", "mlp": "#3b6ea5", "embedding": "#6a994e", "unembedding": "#6a994e"}
OTHER_COLOUR = "#8a8f98"
SCALE_OF_ZERO = 1e-3
"""Losses below this share of the largest are drawn on a linear scale, so that 0 has a place."""

Line = Sequence[tuple[float, float]]
"""Pairs of a size, in nodes, and a loss."""


def curve_picture(lines: Mapping[str, Line], audit: Audit) -> Picture:
    """Loss by number of nodes kept: dots for circuits on the way, discs for what the audit found for the chosen one.

    Args:
        lines: the dots, by scheme.
        audit: of the chosen circuit.
    """
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    found = {
        "complete": audit.complete_loss,
        "stochastic": audit.stochastic.mean,
        "adversarial": audit.adversarial.loss,
    }
    for scheme, words in SCHEMES.items():
        sizes, losses = zip(*line, strict=True) if (line := lines.get(scheme)) else ((), ())
        axes.plot(sizes, losses, ".", color=COLOURS[scheme], markersize=3, alpha=0.5)
        axes.plot([audit.n_kept], [found[scheme]], "o", color=COLOURS[scheme], label=f"{words}: {found[scheme]:.3g}")
    if audit.target_loss is not None:
        label = f"asked for: {audit.target_loss:.3g}"
        axes.axhline(audit.target_loss, color="black", linestyle=":", linewidth=1, label=label)
    largest = max([*found.values(), *(loss for line in lines.values() for _, loss in line)])
    _loss_by_size(axes, largest, audit.n_nodes, audit.loss)
    axes.legend(frameon=False, fontsize=8, title=f"audit of the chosen {audit.n_kept:,}", title_fontsize=8)
    return _pixels(figure)


def frontier_picture(frontier: Frontier) -> Picture:
    """Loss by number of nodes kept: a disc a level and scheme, by its audit."""
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    sizes = [point.n_kept for point in frontier.points]
    for scheme, words in SCHEMES.items():
        losses = [getattr(point, f"{scheme}_loss") for point in frontier.points]
        axes.plot(sizes, losses, "o-", color=COLOURS[scheme], linewidth=1, label=words)
    label = f"nothing ablated: {frontier.model_loss:.3g}"
    axes.axhline(frontier.model_loss, color="black", linestyle=":", linewidth=1, label=label)
    highest = (max(point.complete_loss, point.stochastic_loss, point.adversarial_loss) for point in frontier.points)
    _loss_by_size(axes, max(highest), frontier.n_nodes, frontier.loss)
    axes.legend(frameon=False, fontsize=8)
    return _pixels(figure)


def _loss_by_size(axes: Axes, largest: float, n_nodes: int, loss: str) -> None:
    """The axes of both."""
    axes.set_yscale("symlog", linthresh=max(largest, 1e-9) * SCALE_OF_ZERO)
    axes.set_ylim(0, 2 * max(largest, 1e-9))
    axes.set_xlabel(f"nodes kept, of {n_nodes:,}")
    axes.set_ylabel(f"loss ({loss})")
    axes.spines[["top", "right"]].set_visible(False)


def circuit_picture(rows: Sequence[NodeRow], n_nodes: int) -> Picture:
    """The kept nodes, a line a site, each at the place of its first component; more open gates are darker."""
    sites = list(dict.fromkeys(row.site for row in rows))
    figure = _figure(6.4, 1.0 + 0.28 * max(1, len(sites)))
    axes = figure.add_subplot()
    for row in rows:
        colour = ROLE_COLOURS.get(row.role, OTHER_COLOUR)
        first = int(row.component.replace("-", ",").replace(" ", ",").split(",")[0])
        opacity = 0.25 + 0.75 * min(1.0, max(0.0, row.gate))
        axes.plot(first, sites.index(row.site), "|", color=colour, alpha=opacity, markersize=12, markeredgewidth=1.5)
    counts = {site: sum(row.site == site for row in rows) for site in sites}
    axes.set_yticks(range(len(sites)), [f"{site}  {counts[site]}" for site in sites], fontsize=8)
    axes.set_ylim(len(sites) - 0.5 if sites else 0.5, -0.5)
    axes.set_xlabel("component")
    axes.set_title(f"{len(rows):,} of {n_nodes:,} nodes kept", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return _pixels(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _pixels(figure: Figure) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())
