"""What a report draws, as pictures for experiment trackers. Needs matplotlib (extra `report`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pdprune.report.figures import Curve, Figures, FrontierFigures, Graph, Site
from pdprune.tracking import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {
    "complete": ("the rest ablated", "#2f6fc4", ":"),
    "stochastic": ("at random", "#0b8a68", "--"),
    "adversarial": ("by the adversary", "#c8450c", "-"),
    "random": ("random circuits, by the adversary", "#9a4fa8", "-."),
}
PLUS, MINUS = "#c8450c", "#2f6fc4"
EDGES_DRAWN = 200
COLUMNS = 40
"""Of nodes in a row of a site."""
LEAST = 1e-5
"""Losses below this share of the largest are drawn there: a logarithmic axis has no place for 0."""


def pictures_of(figures: Figures | FrontierFigures) -> dict[str, Picture]:
    """The loss by size, and the circuit, as the report has them; of a frontier the former."""
    if isinstance(figures, FrontierFigures):
        return {"frontier/curve": frontier_picture(figures)}
    return {
        "circuit/curve": curve_picture(figures.curve, figures.loss),
        "circuit/graph": graph_picture(figures.graph, figures.sites),
    }


def curve_picture(curve: Curve, loss: str) -> Picture:
    """Loss by size under each scheme; discs are the audit's figures for the chosen circuit."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    sizes = [point.size for point in curve.points]
    drawn = {key: [getattr(point, key) for point in curve.points] for key in LINES}
    largest = max([*(value for line in drawn.values() for value in line if value is not None), curve.model_loss, 1e-9])
    floor = largest * LEAST
    for key, (words, colour, style) in LINES.items():
        if None in drawn[key]:
            continue
        axes.plot(sizes, [max(value, floor) for value in drawn[key]], style, color=colour, label=words)
        if key != "random":
            axes.plot(curve.chosen.size, max(getattr(curve.chosen, key), floor), "o", color=colour)
    axes.axhline(max(curve.model_loss, floor), color="grey", linestyle=":", linewidth=1, label="the model")
    if curve.target_loss is not None:
        axes.axhline(curve.target_loss, color="black", linestyle="--", linewidth=1, label="target")
    _label(axes, f"{curve.unit} kept of {curve.total:,}; chosen {curve.chosen.size:,}", loss)
    return _pixels(figure)


def frontier_picture(figures: FrontierFigures) -> Picture:
    """Loss by size: a disc a level and scheme, by its audit."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    sizes = [point.n_kept for point in figures.points]
    drawn = {key: [getattr(point, f"{key}_loss") for point in figures.points] for key in LINES if key != "random"}
    floor = max([*(value for line in drawn.values() for value in line), figures.model_loss, 1e-9]) * LEAST
    for key, losses in drawn.items():
        words, colour, style = LINES[key]
        axes.plot(sizes, [max(value, floor) for value in losses], f"o{style}", color=colour, label=words)
    axes.axhline(max(figures.model_loss, floor), color="grey", linestyle=":", linewidth=1, label="the model")
    _label(axes, f"nodes kept of {figures.n_nodes:,}", figures.loss)
    return _pixels(figure)


def _label(axes: Axes, size: str, loss: str) -> None:
    """The axes of losses by size."""
    axes.set_yscale("log")
    axes.set_xlabel(size)
    axes.set_ylabel(loss)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def graph_picture(graph: Graph, sites: list[Site]) -> Picture:
    """The kept nodes, site by site from the input below to the answer above, and their strongest edges.

    Larger nodes have more effect on the answer; darker ones raise the worst case more when they are removed.
    """
    places, bands, height = _places(graph, sites)
    figure = _figure(6.4, min(12.0, 1.2 + 0.16 * height))
    axes = figure.add_subplot()
    _draw_edges(axes, graph, places)
    if graph.nodes:
        across, up = zip(*places[:-1], strict=True)
        effects = np.array([abs(node.effect or 0.0) for node in graph.nodes])
        harm = np.array([max(0.0, (node.removed or 0.0) - (graph.worst or 0.0)) for node in graph.nodes])
        axes.scatter(
            across,
            up,
            s=6 + 40 * effects / max(float(effects.max()), 1e-30),
            c=np.sqrt(harm / max(float(harm.max()), 1e-30)),
            cmap="OrRd",
            vmin=0,
            vmax=1,
            edgecolors="#5a6270",
            linewidths=0.4,
            zorder=2,
        )
    axes.annotate("the answer", places[-1], ha="center", fontsize=8)
    axes.set_yticks(bands, [f"{site.name}  {site.n_kept:,} of {site.n_nodes:,}" for site in sites], fontsize=7)
    axes.set_xticks([])
    axes.set_ylim(-1, height + 1)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    return _pixels(figure)


def _places(graph: Graph, sites: list[Site]) -> tuple[list[tuple[float, float]], list[float], float]:
    """Where nodes lie, and after them the answer; the middle of each site; and how high all of it is.

    The nodes of the greatest effect are in the middle of the lowest rows of their site.
    """
    places: list[tuple[float, float]] = [(0.0, 0.0)] * (len(graph.nodes) + 1)
    bands = []
    row = 0.0
    for index in range(len(sites)):
        members = [place for place, node in enumerate(graph.nodes) if node.site == index]
        members.sort(key=lambda place: -abs(graph.nodes[place].effect or 0.0))
        n_rows = max(1, -(-len(members) // COLUMNS))
        for rank, place in enumerate(members):
            column = rank % COLUMNS
            aside = (column + 1) // 2 * (1 if column % 2 else -1)
            places[place] = (float(aside), row + rank // COLUMNS)
        bands.append(row + (n_rows - 1) / 2)
        row += n_rows + 2
    places[-1] = (0.0, row)
    return places, bands, row


def _draw_edges(axes: Axes, graph: Graph, places: list[tuple[float, float]]) -> None:
    answer = len(graph.nodes)
    direct = [(place, answer, node.direct) for place, node in enumerate(graph.nodes) if node.direct]
    edges = sorted([*graph.edges, *direct], key=lambda edge: -abs(edge[2]))[:EDGES_DRAWN]
    for start, end, strength in edges:
        (x0, y0), (x1, y1) = places[start], places[end]
        share = abs(strength) / max(abs(edges[0][2]), 1e-30)
        colour = PLUS if strength > 0 else MINUS
        axes.plot([x0, x1], [y0, y1], color=colour, alpha=0.15 + 0.7 * share, linewidth=0.4 + 2 * share, zorder=1)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _pixels(figure: Figure) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())
