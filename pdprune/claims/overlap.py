"""Claim 9: the same circuit twice? Circuits of other seeds and other prompts, and prompts from elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from pdprune.circuits.circuit import jaccard
from pdprune.circuits.schemes import SchemeName
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, shared_by
from pdprune.claims.intervals import bootstrap, markdown, over_seeds
from pdprune.claims.language import BATCH_SIZE, Splits, audited, language_model, pruned, reference_of, task_scores
from pdprune.seeding import generator
from pdprune.targets import load_target

SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
ELSEWHERE = '\n# it\'s "so"'
"""Before every prompt: a comment with both quotes, which no prompt of the task begins with."""


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target, task: a shipped language model and a task of it.
        seeds: of pruning, and of the order of batches. Each prunes on two disjoint halves of the training prompts.
        target_loss: task cross-entropy, in nats.
        train, others: prompts of both halves together; to choose the circuit on, and as many to audit on.
        steps: keep steps.
    """

    target: str = "dense-py"
    task: str = "quote"
    seeds: tuple[int, ...] = (0, 1, 2)
    target_loss: float = 0.15
    train: int = 1024
    others: int = 64
    steps: int = 60


SMALL = Settings(seeds=(0,), train=2 * BATCH_SIZE, others=16, steps=10)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, scheme and half."""
    return [
        {
            "scheme": scheme,
            "seed": seed,
            "half": half,
            **shared_by(settings, "target", "task", "target_loss", "train", "others", "steps"),
        }
        for seed in settings.seeds
        for scheme in SCHEMES
        for half in (0, 1)
    ]


def run(
    scheme: SchemeName,
    seed: int,
    half: int,
    target: str,
    task: str,
    target_loss: float,
    train: int,
    others: int,
    steps: int,
) -> Figures:
    """Prune on one half of the prompts; how the circuit does on held-out prompts, and on those from elsewhere."""
    splits = Splits.of(task, target, train, others)
    order = torch.randperm(len(splits.train[half::2]), generator=generator(seed, "order of batches"))
    splits = Splits([splits.train[half::2][index] for index in order], splits.select, splits.held_out)
    model = language_model(target)
    circuit = pruned(model, splits, scheme, target_loss, steps, seed)
    found = audited(model, circuit, splits, target_loss, seed)
    reference = reference_of(model, splits, seed)
    keep, source = circuit.keep.float(), found.worst_source
    assert source is not None
    elsewhere = [after(batch, ELSEWHERE, target) for batch in splits.held_out]
    masks = {"model": None, "complete": keep, "adversarial": keep + (1 - keep) * source}
    return {
        "n_nodes": model.n_nodes,
        "kept": circuit.kept,
        "reached": circuit.reached,
        "worst_case": found.adversarial.loss,
        "held_out": {name: task_scores(model, splits.held_out, mask, reference)[1] for name, mask in masks.items()},
        "elsewhere": {name: task_scores(model, elsewhere, mask, reference)[1] for name, mask in masks.items()},
    }


def after(batch: dict[str, Any], text: str, target: str) -> dict[str, Any]:
    """The prompts of a batch, each after the same text."""
    tokenizer = load_target(target).tokenizer
    assert tokenizer is not None
    before = torch.tensor(tokenizer.encode(text))
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    rows = before.expand(len(ids), -1)
    inputs = {"input_ids": torch.cat([rows, ids], 1), "attention_mask": torch.cat([torch.ones_like(rows), mask], 1)}
    return batch | {"inputs": inputs, "positions": batch["positions"] + len(before)}


def table(results: Sequence[Result]) -> str:
    """Overlaps and accuracies by scheme."""
    rows = []
    for scheme in SCHEMES:
        of_it = [result for result in results if result.cell["scheme"] == scheme]
        if not of_it:
            continue
        figures = [result.figures for result in of_it]
        rows.append(
            [
                scheme,
                f"{over_seeds([len(one['kept']) for one in figures]).show(0)} of {figures[0]['n_nodes']}",
                *(_overlap(of_it, same) for same in ("half", "seed")),
                f"{_by_chance(figures):.2f}",
                *(
                    over_seeds([one[place][check] for one in figures]).within(0, 1).show()
                    for place in ("held_out", "elsewhere")
                    for check in ("complete", "adversarial")
                ),
                over_seeds([one["elsewhere"]["model"] for one in figures]).show(),
            ]
        )
    head = [
        "scheme",
        "nodes",
        "Jaccard, other seed",
        "Jaccard, other half",
        "by chance",
        "accuracy, held out, ablated",
        "by the adversary",
        "elsewhere, ablated",
        "elsewhere, the same source",
        "the model, elsewhere",
    ]
    return markdown(head, rows)


def _overlap(results: Sequence[Result], same: str) -> str:
    """The mean Jaccard of all pairs that have this in common and differ in the other."""
    other = {"half": "seed", "seed": "half"}[same]
    pairs = [
        jaccard(set(one.figures["kept"]), set(two.figures["kept"]))
        for one, two in itertools.combinations(results, 2)
        if one.cell[same] == two.cell[same] and one.cell[other] != two.cell[other]
    ]
    return bootstrap(pairs).show() if pairs else ""


def _by_chance(figures: Sequence[Figures]) -> float:
    """The Jaccard of two random circuits of the mean size: about `p / (2 - p)` for a share `p` of the nodes."""
    share = sum(len(one["kept"]) for one in figures) / len(figures) / figures[0]["n_nodes"]
    return share / (2 - share)


EXPERIMENT = Experiment(
    name="overlap",
    claim="Pruned again with another seed or other prompts, an adversarial circuit is the same circuit.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
