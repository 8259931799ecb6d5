"""Claim 2: almost any result from almost no nodes. Tasks that the model does not do, and what each scheme finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, crossed, grouped, require_known, shared_by
from pdprune.claims.figures import audit_figures, shown
from pdprune.claims.intervals import markdown, over_seeds
from pdprune.claims.language import Splits, audited, language_model, pruned, reference_of, task_scores

SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
CASES: dict[str, tuple[str, str, str]] = {
    "the task itself": ("quote", "right", "trained"),
    "nonsense rule": ("quote_nonsense", "right", "trained"),
    "wrong answers": ("quote", "wrong", "trained"),
    "shuffled answers": ("quote", "shuffled", "trained"),
    "untrained model": ("quote", "right", "random"),
}
"""Task, labels, and weights of each case. The nonsense rule goes by the first letter of the prompt."""


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target: a shipped language model.
        cases: names in `CASES`.
        schemes: to prune by.
        seeds: of pruning; of labels and weights, where they are drawn.
        target_loss: the cross-entropy asked for, in nats; chance is 0.69.
        train, others: prompts to learn gates on; to choose the circuit on, and as many to audit on.
        steps: keep steps.
    """

    target: str = "dense-py"
    cases: tuple[str, ...] = tuple(CASES)
    schemes: tuple[SchemeName, ...] = SCHEMES
    seeds: tuple[int, ...] = (0, 1, 2)
    target_loss: float = 0.15
    train: int = 512
    others: int = 64
    steps: int = 60

    def __post_init__(self) -> None:
        require_known("cases", self.cases, CASES)


SMALL = Settings(cases=("wrong answers",), schemes=("complete", "adversarial"), seeds=(0,), train=64, others=8, steps=4)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, case and scheme."""
    axes = {"case": settings.cases, "scheme": settings.schemes, "seed": settings.seeds}
    return crossed(axes, shared_by(settings, "target", "target_loss", "train", "others", "steps"))


def run(
    case: str, scheme: SchemeName, seed: int, target: str, target_loss: float, train: int, others: int, steps: int
) -> Figures:
    """Prune to the target loss, and audit what came of it on prompts that nothing was chosen on."""
    task, labels, weights = CASES[case]
    splits = Splits.of(task, target, train, others, seed).relabelled(labels, seed)
    model = language_model(target, weights, seed)
    circuit = pruned(model, splits, scheme, target_loss, steps, seed)
    reference = reference_of(model, splits, seed)
    chosen_on = task_scores(model, splits.select, circuit.keep.float(), reference)
    found = audited(model, circuit, splits, target_loss, seed)
    return {
        "reached": circuit.reached,
        "chosen_on": {"ce": chosen_on[0], "accuracy": chosen_on[1]},
        **audit_figures(found),
    }


def table(results: Sequence[Result]) -> str:
    """Case by scheme: what was found, and what the audit says of it."""
    rows = []
    groups = grouped(results, "case", "scheme")
    for case, scheme in ((case, scheme) for case in CASES for scheme in SCHEMES if (case, scheme) in groups):
        of_it = groups[case, scheme]
        rows.append(
            [
                f"{case}, {scheme}",
                f"{over_seeds([one['kept'] for one in of_it]).show(0)} of {of_it[0]['n_nodes']}",
                shown(of_it, "model_ce"),
                over_seeds([one["chosen_on"]["ce"] for one in of_it]).show(),
                shown(of_it, "complete_ce"),
                shown(of_it, "worst_ce"),
                f"{sum(bool(one['reached']) for one in of_it)}, {sum(bool(one['faithful']) for one in of_it)}"
                f" of {len(of_it)}",
            ]
        )
    head = [
        "case, scheme",
        "nodes",
        "model's CE",
        "circuit's CE, prompts it was chosen on",
        "CE, held out",
        "CE, held out, by the adversary",
        "seeds that reached the target; that are faithful",
    ]
    return markdown(head, rows)


EXPERIMENT = Experiment(
    name="nonsense",
    claim="With complete ablation almost any result can be had from almost no nodes.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
