"""Claim 2: almost any result from almost no nodes. Tasks that the model does not do, and what each scheme finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.batches import as_batches
from pdprune.circuits.gates import LeakyHardSigmoid
from pdprune.circuits.prune import InMemory
from pdprune.circuits.pruning import CircuitPruner, Learning
from pdprune.circuits.schemes import SchemeName, Scorer
from pdprune.circuits.selection import MARGIN, top_mask
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, crossed, grouped, require_known, shared_by
from pdprune.claims.figures import audit_figures, shown
from pdprune.claims.intervals import markdown, over_seeds
from pdprune.claims.language import Splits, audited, language_model, module_of, task_scores
from pdprune.claims.nodes import CHANNELS
from pdprune.claims.ranking import learned_ranking
from pdprune.decomposition import DecomposedModel, decompose

SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
BY_HEART = "shuffled"
"""Labels that follow from nothing: they can only be learned by heart."""
CASES: dict[str, tuple[str, str, str]] = {
    "the task itself": ("quote", "right", "trained"),
    "nonsense rule": ("quote_nonsense", "right", "trained"),
    "wrong answers": ("quote", "wrong", "trained"),
    "shuffled answers": ("quote", BY_HEART, "trained"),
    "untrained model": ("quote", "right", "random"),
    "shuffled weights": ("quote", "right", "shuffled"),
}
"""Task, labels, and weights of each case. The nonsense rule goes by the first letter of the prompt."""
EVERY_MATRIX = "singular vectors of every matrix"
GRAPHS: dict[str, tuple[SchemeName, ...]] = {EVERY_MATRIX: SCHEMES, CHANNELS: ("complete",)}
"""What the nodes are, with the schemes that are asked; of neurons and channels, how far complete ablation comes."""
PERCENTS = (*range(1, 20), *range(20, 101, 5))
"""Of the nodes: the sizes that a ranking is cut at."""
PASSES: dict[SchemeName, int] = {"complete": 1, "stochastic": 1, "adversarial": 5}
"""Forward and backward passes of a keep step: the adversary climbs four times first."""


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target: a shipped language model.
        cases: names in `CASES`.
        graphs: names in `GRAPHS`.
        schemes: to prune by.
        seeds: of pruning, of which prompts are drawn, and of labels and weights where they are.
        target_loss: the cross-entropy asked for, in nats; chance is 0.69.
        aim: share of it that the loss is held at while gates are learned, since whole nodes do worse than gates.
        start: how open all gates are at first. Open ones begin at the model, which is at odds with the answers.
        share: of the nodes: a size at which every ranking is audited besides.
        train, others: prompts to learn gates on; to choose the circuit on, and as many to audit on. Shuffled answers
            are learned, and the circuit chosen, on one batch of 64.
        passes: forward and backward passes in learning gates: each scheme takes as many keep steps as they allow.
    """

    target: str = "dense-py"
    cases: tuple[str, ...] = tuple(CASES)
    graphs: tuple[str, ...] = tuple(GRAPHS)
    schemes: tuple[SchemeName, ...] = SCHEMES
    seeds: tuple[int, ...] = (0, 1, 2)
    target_loss: float = 0.3
    aim: float = 0.5
    start: float = 0.5
    share: float = 0.1
    train: int = 512
    others: int = 64
    passes: int = 400

    def __post_init__(self) -> None:
        require_known("cases", self.cases, CASES)
        require_known("graphs", self.graphs, GRAPHS)


SMALL = Settings(
    cases=("wrong answers",),
    graphs=(EVERY_MATRIX,),
    schemes=("complete", "adversarial"),
    seeds=(0,),
    train=64,
    others=8,
    passes=20,
)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, graph, case and scheme."""
    shared = shared_by(settings, "target", "target_loss", "aim", "start", "share", "train", "others", "passes")
    axes = {"case": settings.cases, "scheme": settings.schemes, "graph": settings.graphs, "seed": settings.seeds}
    return [cell for cell in crossed(axes, shared) if cell["scheme"] in GRAPHS[cell["graph"]]]


def run(
    case: str,
    scheme: SchemeName,
    graph: str,
    seed: int,
    target: str,
    target_loss: float,
    aim: float,
    start: float,
    share: float,
    train: int,
    others: int,
    passes: int,
) -> Figures:
    """Learn gates, cut their ranking, and audit what came of it on prompts that nothing was chosen on."""
    task, labels, weights = CASES[case]
    splits = splits_of(task, labels, target, train, others, seed)
    model = nodes_of(graph, target, weights, seed)
    pruner = CircuitPruner(
        model,
        loss="ce",
        scheme=scheme,
        reference="mean",
        target_loss=target_loss,
        search="gradient",
        learning=Learning(aim=aim),
        seed=seed,
    )
    pruner.gate_map = LeakyHardSigmoid(start=start)
    data = InMemory(as_batches(splits.train), as_batches(splits.select))
    ranking = learned_ranking(pruner, data, passes // PASSES[scheme])
    scorer = pruner.scorer(pruner.select_losses(data))
    keep, reached = smallest_or_best(ranking, scorer, scheme, MARGIN * target_loss)
    chosen_on = task_scores(model, splits.select, keep, pruner.reference)
    found = audited(model, keep, splits, target_loss, seed)
    at_share = audited(model, top_mask(ranking, round(share * model.n_nodes)), splits, target_loss, seed)
    return {
        "reached": reached,
        "chosen_on": {"ce": chosen_on[0], "accuracy": chosen_on[1]},
        **audit_figures(found),
        "at_share": audit_figures(at_share),
    }


def splits_of(task: str, labels: str, target: str, train: int, others: int, seed: int) -> Splits:
    """The prompts with their labels; of those to be learned by heart one batch, which the circuit is chosen on too."""
    splits = Splits.of(task, target, train, others, seed).relabelled(labels, seed)
    by_heart = splits.train[:1]
    return replace(splits, train=by_heart, select=by_heart) if labels == BY_HEART else splits


def nodes_of(graph: str, target: str, weights: str, seed: int) -> DecomposedModel:
    """A shipped model with some weights (`pdprune.claims.language.module_of`), by the nodes of a graph."""
    if graph == CHANNELS:
        return language_model(target, weights, seed)
    return decompose(module_of(target, weights, seed), "*", "svd")


def smallest_or_best(
    ranking: Float[Tensor, " n"], scorer: Scorer, scheme: SchemeName, most: float
) -> tuple[Float[Tensor, " n"], bool]:
    """The fewest highest nodes whose loss is at most `most`; or else those of the least loss. Says whether it is.

    A worst case is never below the model's own loss, which all nodes together have: above `most` they are the best.
    """
    attacked = scheme == "adversarial"
    everything = torch.ones_like(ranking)
    if attacked and scorer.score(everything) > most:
        return everything, False
    best, least = everything, float("inf")
    for percent in PERCENTS:
        keep = top_mask(ranking, round(percent * len(ranking) / 100))
        loss = scorer.score(keep, stop_above=most if attacked else None)
        if loss <= most:
            return keep, True
        if loss < least:
            best, least = keep, loss
    return best, False


def table(results: Sequence[Result]) -> str:
    """For each graph case by scheme: what was found, and what the audit says of it."""
    groups = grouped(results, "graph", "case", "scheme")
    tables = []
    for graph in (graph for graph in GRAPHS if any(graph == name for name, _, _ in groups)):
        rows = [
            [f"{case}, {scheme}", *_columns(groups[graph, case, scheme])]
            for case in CASES
            for scheme in SCHEMES
            if (graph, case, scheme) in groups
        ]
        tables.append(markdown([graph, *_head(results[0].cell["share"])], rows))
    return "\n\n".join(tables)


def _head(share: float) -> list[str]:
    return [
        "nodes",
        "model's CE",
        "circuit's CE, prompts it was chosen on",
        "CE, held out",
        "accuracy, held out",
        "CE, held out, by the adversary",
        f"with the highest {share:.0%} of the nodes: CE, held out; by the adversary",
        "seeds that reached the target; that are faithful",
    ]


def _columns(of_it: Sequence[Figures]) -> list[str]:
    at_share = [one["at_share"] for one in of_it]
    return [
        f"{over_seeds([one['kept'] for one in of_it]).show(0)} of {of_it[0]['n_nodes']:,}",
        shown(of_it, "model_ce"),
        over_seeds([one["chosen_on"]["ce"] for one in of_it]).show(),
        shown(of_it, "complete_ce"),
        over_seeds([one["complete_accuracy"] for one in of_it]).within(0, 1).show(),
        shown(of_it, "worst_ce"),
        f"{shown(at_share, 'complete_ce')}; {shown(at_share, 'worst_ce')}",
        f"{sum(bool(one['reached']) for one in of_it)}, {sum(bool(one['faithful']) for one in of_it)} of {len(of_it)}",
    ]


EXPERIMENT = Experiment(
    name="nonsense",
    claim="With complete ablation almost any result can be had from almost no nodes.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
