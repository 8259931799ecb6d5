"""What a report shows of one run, as plain data: what is gathered on one side, and drawn on the other.

Losses are in the audit's unit. Nodes, sites and examples refer to one another by their place in these lists.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from pdprune.circuits.frontier_curve import FrontierPoint

Standing = Literal["faithful", "unfaithful", "no_target"]


@dataclass(frozen=True)
class Verdict:
    """What came out, in words."""

    standing: Standing
    sentence: str
    question: str
    """What the adversary is for."""
    budget: str
    """How hard the adversary tried."""
    convergence: str
    """Whether trying harder would have found more, as far as that is known."""
    converged: bool | None


@dataclass(frozen=True)
class Check:
    """One check of the audit; None where a figure makes no sense."""

    name: str
    loss: float | None
    task_loss: float | None = None
    accuracy: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """The loss of the circuit of one size, and what the adversary makes of one drawn at random."""

    size: int
    complete: float
    stochastic: float | None
    adversarial: float
    random: float | None = None


@dataclass(frozen=True)
class Curve:
    """Loss by size, and what the audit found at the size that was chosen."""

    points: list[CurvePoint]
    chosen: CurvePoint
    """By the audit, whose attack is stronger."""
    unit: str
    """What sizes count."""
    total: int
    model_loss: float
    target_loss: float | None
    random: CurvePoint | None
    """Circuits of the chosen size drawn at random, by the audit; no stochastic figure."""
    note: str


@dataclass(frozen=True)
class Text:
    """One held-out example as the target reads it."""

    tokens: list[int]
    """Places in the vocabulary; empty where the target reads no sequence."""
    numbers: str
    """What it reads instead."""
    answer: str | None


@dataclass(frozen=True)
class Context:
    """Where a node is active: a stretch of an example, and the activation at each of its tokens."""

    text: int
    start: int
    values: list[float]


@dataclass(frozen=True)
class NodeFigures:
    """A kept node.

    Attributes:
        node: its index in the model.
        site: where it writes; the first of several.
        effect, direct: on the answer, along all paths and along those that meet no other kept node.
        removed: the worst case if it alone is removed, which cannot be lower than with it, since the adversary may
            leave it alone; None where that was not tried.
        raised, lowered: outputs that it raises and lowers most where it is most active, with how much.
        choices: what it adds there to the outputs that the task is decided among.
    """

    node: int
    label: str
    site: int
    n_components: int
    gate: float
    positions: list[int] | None
    effect: float | None
    direct: float | None
    removed: float | None
    contexts: list[Context]
    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]
    choices: list[tuple[str, float]]


@dataclass(frozen=True)
class Site:
    """A site, and how many of its nodes are kept and ablated by the worst source."""

    name: str
    n_nodes: int
    n_kept: int
    n_ablated: int


@dataclass(frozen=True)
class Graph:
    """The circuit: kept nodes, and what they do to one another."""

    nodes: list[NodeFigures]
    edges: list[tuple[int, int, float]]
    """From, to, strength; the strongest of them."""
    answer: str
    """What effects are measured on."""
    worst: float | None
    """The worst case that removals compare with, on the same examples."""
    notes: list[str]


@dataclass(frozen=True)
class Opposed:
    """A node that is not kept, and what the adversary does with it."""

    label: str
    site: int
    source: float
    gain: float
    """How much less it would hurt, to first order, to do the opposite."""


@dataclass(frozen=True)
class Said:
    """An answer, and its probability."""

    text: str
    probability: float | None


@dataclass(frozen=True)
class Sufferer:
    """An example, and what becomes of it."""

    text: int
    model_loss: float
    circuit_loss: float
    attacked_loss: float
    model: Said
    circuit: Said
    attacked: Said


@dataclass(frozen=True)
class Adversary:
    """The adversary's side: what its worst source does, and to whom."""

    ablated: list[Opposed]
    left_alone: list[Opposed]
    sufferers: list[Sufferer]
    notes: list[str]


@dataclass(frozen=True)
class Series:
    """One logged value by step."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Origin:
    """What it takes to make the run again."""

    command: str
    config: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Figures:
    """All that a report shows of a run."""

    name: str
    task: str
    target: str
    loss: str
    """The name of the loss, for axes and tables."""
    verdict: Verdict
    checks: list[Check]
    checks_note: str
    curve: Curve
    sites: list[Site]
    """In the order in which the target calls them."""
    graph: Graph
    adversary: Adversary
    training: list[Series]
    origin: Origin
    vocabulary: list[str]
    texts: list[Text]


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs."""

    name: str
    link: str | None
    """To its own report, from where the comparison lies."""
    scheme: str
    n_nodes: int
    n_kept: int
    verdict: Verdict
    checks: list[Check]
    curve: Curve


@dataclass(frozen=True)
class OverlapFigures:
    """What two of the runs have in common; None where their nodes are not the same."""

    first: int
    second: int
    jaccard: float | None
    both: int | None


@dataclass(frozen=True)
class SiteRow:
    """How many nodes of a site each run keeps; None where it has no such site."""

    name: str
    kept: list[int | None]


@dataclass(frozen=True)
class Comparison:
    """All that is shown of several runs side by side."""

    headline: str
    task: str
    target: str
    loss: str
    runs: list[ComparedRun]
    overlaps: list[OverlapFigures]
    sites: list[SiteRow]


@dataclass(frozen=True)
class FrontierFigures:
    """All that is shown of a frontier."""

    name: str
    headline: str
    task: str
    target: str
    loss: str
    n_nodes: int
    model_loss: float
    points: list[FrontierPoint]
    """The smallest circuit first."""
    note: str


def as_json(figures: Any) -> Any:
    """Dataclasses as JSON values: floats to four digits, and None for what is no finite number."""
    match figures:
        case float():
            return float(f"{figures:.4g}") if math.isfinite(figures) else None
        case dict():
            return {key: as_json(value) for key, value in figures.items()}
        case list() | tuple():
            return [as_json(value) for value in figures]
        case _ if dataclasses.is_dataclass(figures):
            return {field.name: as_json(getattr(figures, field.name)) for field in dataclasses.fields(figures)}
        case _:
            return figures
