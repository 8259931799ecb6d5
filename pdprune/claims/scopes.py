"""Claim 5: the adversary must be restricted, or circuits that are faithful look broken.

The network is one whose faithful circuit is known: one node tells the answer at every position; each other one adds a
little noise of its own. One source for a batch can line up little of that noise; one for each example, all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdprune.adversary.game import Scope
from pdprune.circuits.audit import audit
from pdprune.claims.experiment import Cell, Experiment, Figures, Result
from pdprune.claims.intervals import markdown, over_seeds
from pdprune.claims.planted.handmade import noisy_sequences

POSITIONS, IDLE = 4, 40
ALIKE: tuple[Scope, ...] = ("example", "example_position")
"""Scopes in which each example has a source of its own, so that the batch size makes no difference."""


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        scopes: what one source is shared by.
        batch_sizes: examples under one source; only the largest up to 64 in the scopes with a source an example.
        noises: how far the logit moves if all idle nodes push the same way; the answer moves it by 2.
        seeds: of the noise and of the attack.
    """

    scopes: tuple[Scope, ...] = ("batch", "position", "example", "example_position")
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    noises: tuple[float, ...] = (1.0, 2.0, 4.0)
    seeds: tuple[int, ...] = (0, 1, 2)


SMALL = Settings(batch_sizes=(1, 64), noises=(4.0,), seeds=(0,))


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, noise, scope and batch size."""
    most_alike = max((size for size in settings.batch_sizes if size <= 64), default=64)
    return [
        {"scope": scope, "batch_size": size, "noise": noise, "seed": seed}
        for seed in settings.seeds
        for noise in settings.noises
        for scope in settings.scopes
        for size in ((most_alike,) if scope in ALIKE else settings.batch_sizes)
    ]


def run(scope: Scope, batch_size: int, noise: float, seed: int) -> Figures:
    """Audit the true circuit under a scope: on two batches, so that each one's source is tried on the other."""
    puzzle, batches = noisy_sequences(IDLE, noise, POSITIONS, (batch_size, batch_size), seed)
    (truth,) = puzzle.adversarial
    found = audit(puzzle.model, truth, batches, scope=scope, draws=8, random_circuits=0, seed=seed)
    return {
        "complete_loss": found.complete_loss,
        "worst_case": found.adversarial.loss,
        "on_the_other_batch": found.adversarial.held_out_loss,
        "flipped": found.adversarial.flipped,
    }


def table(results: Sequence[Result]) -> str:
    """The worst case by batch size and noise, and what is left of it on the other batch."""
    noises = sorted({result.cell["noise"] for result in results})
    rows = []
    for scope, size in dict.fromkeys((result.cell["scope"], result.cell["batch_size"]) for result in results):
        row = [f"{scope}, any size" if scope in ALIKE else f"{scope}, {size:,}"]
        for noise in noises:
            of_it = [
                one.figures
                for one in results
                if (one.cell["scope"], one.cell["batch_size"], one.cell["noise"]) == (scope, size, noise)
            ]
            row.append(_shown(of_it) if of_it else "")
        rows.append(row)
    head = [f"noise {noise:g}: worst case; on the other batch" for noise in noises]
    return markdown(["scope, examples under one source", *head], rows)


def _shown(figures: Sequence[Figures]) -> str:
    worst = over_seeds([one["worst_case"] for one in figures]).show(3)
    transferred = [one["on_the_other_batch"] for one in figures]
    if None in transferred:
        return worst
    return f"{worst}; {over_seeds(transferred).show(3)}"


EXPERIMENT = Experiment(
    name="scopes",
    claim="The adversary must be restricted: with a choice for every example it breaks faithful circuits too.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
