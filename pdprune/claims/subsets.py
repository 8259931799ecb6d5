"""Claim 3: subsets cure it, adversarial ones more than random ones. The curve of loss by size, learned three ways."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pdprune.circuits.pruning import CircuitPruner
from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, grouped, require_known, shared_by
from pdprune.claims.intervals import markdown, over_seeds, paired
from pdprune.claims.language import BATCH_SIZE, Splits, audited, language_model
from pdprune.claims.ranking import learned_ranking
from pdprune.claims.recovery import top
from pdprune.tasks import TaskData

SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
Goal = Literal["nodes", "loss"]


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target, tasks: a shipped language model and tasks of it.
        seeds: of pruning, and of the order of prompts.
        shares: of the nodes: the sizes at which each ranking is audited.
        goals: whether gates are learned for a number of `nodes`, or for a `loss`; a table for each.
        target_share: of the nodes: how many.
        target_loss: task cross-entropy, in nats; audits call faithful what stays within it.
        train, others: prompts to learn gates on, and to audit on.
        steps: keep steps.
    """

    target: str = "dense-py"
    tasks: tuple[str, ...] = ("quote", "bracket", "colon")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shares: tuple[float, ...] = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7)
    goals: tuple[Goal, ...] = get_args(Goal)
    target_share: float = 0.25
    target_loss: float = 0.15
    train: int = 512
    others: int = 64
    steps: int = 60

    def __post_init__(self) -> None:
        require_known("goals", self.goals, get_args(Goal))


SMALL = Settings(tasks=("quote",), seeds=(0,), shares=(0.1, 0.7), goals=("nodes",), train=64, others=8, steps=4)


def cells(settings: Settings) -> list[Cell]:
    """One for every goal, seed, task and scheme."""
    return [
        {
            "task": task,
            "scheme": scheme,
            "seed": seed,
            "target": settings.target,
            "shares": list(settings.shares),
            "goal": goal,
            **shared_by(settings, "target_share", "target_loss", "train", "others", "steps"),
        }
        for goal in settings.goals
        for seed in settings.seeds
        for task in settings.tasks
        for scheme in SCHEMES
    ]


def run(
    task: str,
    scheme: SchemeName,
    seed: int,
    target: str,
    shares: Sequence[float],
    goal: Goal,
    target_share: float,
    target_loss: float,
    train: int,
    others: int,
    steps: int,
) -> Figures:
    """Learn gates once; audit the top of their ranking at every size."""
    splits = Splits.of(task, target, train, others)
    model = language_model(target)
    pruner = CircuitPruner(
        model,
        loss="ce",
        scheme=scheme,
        reference="mean",
        target_nodes=round(target_share * model.n_nodes) if goal == "nodes" else None,
        target_loss=target_loss if goal == "loss" else None,
        search="gradient",
        seed=seed,
    )
    data = TaskData(task, target, batch_size=BATCH_SIZE, n_train=train, seed=seed)
    ranking = learned_ranking(pruner, data, steps)
    curve = []
    for share in shares:
        keep = top(ranking, round(share * model.n_nodes))
        found = audited(model, keep, splits, target_loss, seed)
        curve.append(
            {
                "share": share,
                "kept": len(keep),
                "complete_ce": found.complete_loss,
                "stochastic_ce": found.stochastic.mean,
                "worst_ce": found.adversarial.loss,
            }
        )
    return {
        "n_nodes": model.n_nodes,
        "model_ce": found.model_loss,
        "open": int((pruner.gates() > 0.5).sum()),
        "curve": curve,
    }


def table(results: Sequence[Result]) -> str:
    """Of each goal the curves, and the schemes compared."""
    by_goal = [[result for result in results if result.cell["goal"] == goal] for goal in get_args(Goal)]
    return "\n\n".join(_table_of_goal(found) for found in by_goal if found)


def _table_of_goal(results: Sequence[Result]) -> str:
    """Task and scheme by size: the worst case, in brackets the loss with the rest ablated; then schemes compared."""
    first = results[0].cell
    goal = f"{first['target_share']:.0%} of the nodes" if first["goal"] == "nodes" else f"CE {first['target_loss']}"
    sizes = [f"{share:.0%}" for share in first["shares"]]
    rows = []
    for (task, scheme), of_it in grouped(results, "task", "scheme").items():
        row = [f"{task}, {scheme} ({len(of_it)} seeds)"]
        for place in range(len(sizes)):
            worst, complete = (
                over_seeds([one["curve"][place][what] for one in of_it]).show() for what in ("worst_ce", "complete_ce")
            )
            row.append(f"{worst} ({complete})")
        rows.append(row)
    curves = markdown([f"learned for {goal}: CE by the adversary (rest ablated), by nodes kept", *sizes], rows)
    return f"{curves}\n\n{_compared(results, sizes)}"


def _compared(results: Sequence[Result], sizes: Sequence[str]) -> str:
    """The worst case of each ranking over that of another of the same task and seed: the geometric mean over pairs."""
    worst = {
        (result.cell["scheme"], result.cell["task"], result.cell["seed"]): [
            point["worst_ce"] for point in result.figures["curve"]
        ]
        for result in results
    }
    rows = []
    for one, other in itertools.combinations(reversed(SCHEMES), 2):
        of_both = [of for (scheme, *of) in worst if scheme == one and (other, *of) in worst]
        pairs = [(worst[one, *of], worst[other, *of]) for of in of_both]
        if not pairs:
            continue
        row = [f"{one} over {other} ({len(pairs)} pairs)"]
        for place in range(len(sizes)):
            row.append(paired([(first[place], second[place]) for first, second in pairs]))
        rows.append(row)
    return markdown(["worst case; pairs in which it is lower", *sizes], rows)


EXPERIMENT = Experiment(
    name="subsets",
    claim="At every size a ranking learned against subsets holds better, and one against adversarial subsets best.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
