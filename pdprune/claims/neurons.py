"""Claim 6: the neuron basis has the same disease. MLP neurons and attention heads, which nobody learned, as nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pdprune.circuits.pruning import CircuitPruner
from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, crossed, grouped, shared_by
from pdprune.claims.figures import HEAD, audit_figures, columns, shown
from pdprune.claims.intervals import markdown
from pdprune.claims.language import BATCH_SIZE, SELECTION, Splits, audited
from pdprune.claims.nodes import HEADS, in_nodes
from pdprune.claims.ranking import learned_ranking
from pdprune.claims.recovery import top
from pdprune.tasks import TaskData

SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        targets: shipped language models, each with the task cross-entropy asked for, in nats: the weight-sparse one
            reaches 0.12 by itself where the dense one reaches 0.06.
        tasks: the last one is nonsense: its answer goes by the first letter of the prompt.
        nodes: kinds of nodes (`pdprune.claims.nodes`).
        schemes: to prune by.
        seeds: of pruning, and of the order of prompts.
        shares: of the nodes: the sizes at which each ranking is audited besides.
        train, others: prompts to learn gates on; to choose the circuit on, and as many to audit on.
        steps: keep steps.
    """

    targets: tuple[tuple[str, float], ...] = (("dense-py", 0.15), ("sparse-py", 0.3))
    tasks: tuple[str, ...] = ("quote", "colon", "quote_nonsense")
    nodes: tuple[str, ...] = (HEADS,)
    schemes: tuple[SchemeName, ...] = SCHEMES
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    train: int = 512
    others: int = 64
    steps: int = 60


SMALL = Settings(
    targets=(("dense-py", 0.15),),
    tasks=("quote",),
    schemes=("complete", "adversarial"),
    seeds=(0,),
    shares=(0.5,),
    train=64,
    others=8,
    steps=4,
)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, target, kind of nodes, task and scheme."""
    axes = {"scheme": settings.schemes, "task": settings.tasks, "nodes": settings.nodes}
    shared = {"shares": list(settings.shares), **shared_by(settings, "train", "others", "steps")}
    return [
        cell
        for seed in settings.seeds
        for target, target_loss in settings.targets
        for cell in crossed(axes, {"target": target, "seed": seed, "target_loss": target_loss, **shared})
    ]


def run(
    scheme: SchemeName,
    task: str,
    nodes: str,
    target: str,
    seed: int,
    target_loss: float,
    shares: Sequence[float],
    train: int,
    others: int,
    steps: int,
) -> Figures:
    """Learn gates once; audit the circuit chosen by them, and the top of their ranking at every size."""
    model = in_nodes(target, nodes)
    data = TaskData(task, target, batch_size=BATCH_SIZE, n_train=train, n_select=others, seed=seed)
    pruner = CircuitPruner(
        model, loss="ce", scheme=scheme, reference="mean", target_loss=target_loss, selection=SELECTION, seed=seed
    )
    ranking = learned_ranking(pruner, data, steps)
    selected = pruner.select(data)
    splits = Splits.of(task, target, train, others)
    curve = [top(ranking, round(share * model.n_nodes)) for share in shares]
    return {
        "reached": selected.reached,
        **audit_figures(audited(model, selected.keep, splits, target_loss, seed)),
        "curve": [audit_figures(audited(model, keep, splits, target_loss, seed)) for keep in curve],
    }


def table(results: Sequence[Result]) -> str:
    """The circuits found, and below them the worst case of rankings by size, in brackets with the rest ablated."""
    found, curves = [], []
    groups = grouped(results, "target", "target_loss", "nodes", "task", "scheme")
    for (target, target_loss, nodes, task, scheme), of_it in groups.items():
        name = f"{target} at {target_loss}, {nodes}: {task}, {scheme}"
        found.append([name, *columns(of_it)])
        sizes = (list(size) for size in zip(*(one["curve"] for one in of_it), strict=True))
        curves.append([name, *(f"{shown(size, 'worst_ce')} ({shown(size, 'complete_ce')})" for size in sizes)])
    shares = [f"{share:.0%}" for share in results[0].cell["shares"]]
    return "\n\n".join(
        [
            markdown(["circuit found", *HEAD], found),
            markdown(["CE by the adversary (rest ablated), by share of nodes kept", *shares], curves),
        ]
    )


EXPERIMENT = Experiment(
    name="neurons",
    claim="The neuron basis has the same disease: complete ablation finds small circuits that an adversary breaks.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
