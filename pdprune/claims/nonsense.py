"""Claim 2: almost any result from almost no nodes. Tasks that the model does not do, and what each scheme finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result
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


SMALL = Settings(cases=("wrong answers",), schemes=("complete", "adversarial"), seeds=(0,), train=64, others=8, steps=4)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, case and scheme."""
    return [
        {
            "case": case,
            "scheme": scheme,
            "seed": seed,
            "target": settings.target,
            "target_loss": settings.target_loss,
            "train": settings.train,
            "others": settings.others,
            "steps": settings.steps,
        }
        for seed in settings.seeds
        for scheme in settings.schemes
        for case in settings.cases
    ]


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
    assert found.task is not None
    return {
        "n_nodes": model.n_nodes,
        "kept": circuit.n_kept,
        "reached": circuit.reached,
        "chosen_on": {"ce": chosen_on[0], "accuracy": chosen_on[1]},
        "model_ce": found.task.model.ce,
        "complete_ce": found.task.complete.ce,
        "complete_accuracy": found.task.complete.accuracy,
        "stochastic_ce": found.task.stochastic.ce,
        "worst_ce": found.adversarial.loss,
        "worst_accuracy": found.task.adversarial.accuracy,
        "beats_model": found.beats_model,
        "faithful": found.faithful,
    }


def table(results: Sequence[Result]) -> str:
    """Case by scheme: what was found, and what the audit says of it."""
    rows = []
    for case in dict.fromkeys(result.cell["case"] for result in results):
        for scheme in SCHEMES:
            of_it = [one.figures for one in results if (one.cell["case"], one.cell["scheme"]) == (case, scheme)]
            if not of_it:
                continue
            rows.append(
                [
                    f"{case}, {scheme}",
                    f"{over_seeds([one['kept'] for one in of_it]).show(0)} of {of_it[0]['n_nodes']}",
                    over_seeds([one["model_ce"] for one in of_it]).show(),
                    over_seeds([one["chosen_on"]["ce"] for one in of_it]).show(),
                    over_seeds([one["complete_ce"] for one in of_it]).show(),
                    over_seeds([one["worst_ce"] for one in of_it]).show(),
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
