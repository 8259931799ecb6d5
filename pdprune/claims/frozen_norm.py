"""Claim 4: no frozen layer norm needed. Norm scales frozen to the unpruned run against live ones, audited live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, crossed, grouped, shared_by
from pdprune.claims.figures import HEAD, audit_figures, columns
from pdprune.claims.intervals import markdown, over_seeds
from pdprune.claims.language import Splits, audited, pruned, reference_of, task_scores
from pdprune.claims.nodes import CHANNELS, in_nodes
from pdprune.claims.overlap import ELSEWHERE, after
from pdprune.decomposition.norms import NormScaling


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target, tasks: a shipped language model and tasks of it.
        schemes: to prune by.
        norm_scales: while pruning; the audit is live.
        seeds: of pruning, and of which prompts are drawn.
        target_loss: task cross-entropy, in nats.
        train, others: prompts to learn gates on; to choose the circuit on, and as many to audit on.
        steps: keep steps.
    """

    target: str = "dense-py"
    tasks: tuple[str, ...] = ("quote", "colon")
    schemes: tuple[SchemeName, ...] = ("complete", "adversarial")
    norm_scales: tuple[NormScaling, ...] = ("frozen", "live")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    target_loss: float = 0.15
    train: int = 512
    others: int = 64
    steps: int = 60


SMALL = Settings(tasks=("quote",), schemes=("complete",), seeds=(0,), train=64, others=8, steps=4)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, task, scheme and kind of norm scales."""
    axes = {
        "norm_scales": settings.norm_scales,
        "scheme": settings.schemes,
        "task": settings.tasks,
        "seed": settings.seeds,
    }
    return crossed(axes, shared_by(settings, "target", "target_loss", "train", "others", "steps"))


def run(
    norm_scales: NormScaling,
    scheme: SchemeName,
    task: str,
    seed: int,
    target: str,
    target_loss: float,
    train: int,
    others: int,
    steps: int,
) -> Figures:
    """Prune with norms of one kind; audit with live ones, and try the circuit on prompts from elsewhere."""
    model = in_nodes(target, CHANNELS)
    splits = Splits.of(task, target, train, others, seed)
    circuit = pruned(model, splits, scheme, target_loss, steps, seed, norm_scales)
    found = audited(model, circuit, splits, target_loss, seed)
    keep, source = circuit.keep.float(), found.worst_source
    assert source is not None
    masks = {"model": None, "complete": keep, "adversarial": keep + (1 - keep) * source}
    reference = reference_of(model, splits, seed)
    elsewhere = [after(batch, ELSEWHERE, target) for batch in splits.held_out]
    return {
        "reached": circuit.reached,
        **audit_figures(found),
        "elsewhere": {name: task_scores(model, elsewhere, mask, reference)[1] for name, mask in masks.items()},
    }


def table(results: Sequence[Result]) -> str:
    """Task and scheme, with frozen and with live scales."""
    rows = [
        [f"{task}, {scheme}, {norm_scales}", *columns(of_it), *_elsewhere(of_it)]
        for (task, scheme, norm_scales), of_it in grouped(results, "task", "scheme", "norm_scales").items()
    ]
    head = ["accuracy elsewhere, rest ablated", "by the same source", "the model"]
    return markdown(["norm scales while pruning; audited live", *HEAD, *head], rows)


def _elsewhere(of_it: Sequence[Figures]) -> list[str]:
    checks = ("complete", "adversarial", "model")
    return [over_seeds([one["elsewhere"][check] for one in of_it]).within(0, 1).show() for check in checks]


EXPERIMENT = Experiment(
    name="frozen-norm",
    claim="No frozen layer norm is needed: with live norms circuits are as small, and hold.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
