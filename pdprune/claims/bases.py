"""Claim 7: learned components against singular vectors, neurons and heads: nodes needed at one worst case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdprune.claims.experiment import Cell, Experiment, Figures, Result, crossed, grouped, shared_by
from pdprune.claims.figures import HEAD, audit_figures, columns
from pdprune.claims.intervals import markdown, over_seeds, paired
from pdprune.claims.language import Splits, audited, pruned
from pdprune.claims.nodes import CHANNELS, HEADS, LEARNED, SINGULAR, in_nodes


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        target: a shipped language model that components of were learned.
        bases: kinds of nodes (`pdprune.claims.nodes`), all of the same matrices; also paths of saved decompositions.
        sampled: path of the saved decomposition that was learned by sampling, a row of its own: none ships.
        tasks: of the target.
        seeds: of pruning, and of which prompts are drawn; the learned components are one seed's.
        target_loss: task cross-entropy, in nats.
        train, others: prompts to learn gates on; to choose the circuit on, and as many to audit on.
        steps: keep steps.
    """

    target: str = "dense-py"
    bases: tuple[str, ...] = (LEARNED, SINGULAR, CHANNELS, HEADS)
    sampled: str | None = None
    tasks: tuple[str, ...] = ("quote", "colon")
    seeds: tuple[int, ...] = (0, 1, 2)
    target_loss: float = 0.15
    train: int = 512
    others: int = 64
    steps: int = 60


SMALL = Settings(bases=(LEARNED, SINGULAR), tasks=("quote",), seeds=(0,), train=64, others=8, steps=4)


def require(settings: Settings) -> None:
    """Refuse a path that holds no decomposition: it would be found out several cells later."""
    for basis in _bases(settings):
        in_nodes(settings.target, basis)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed, task and basis."""
    axes = {"basis": _bases(settings), "task": settings.tasks, "seed": settings.seeds}
    return crossed(axes, shared_by(settings, "target", "target_loss", "train", "others", "steps"))


def _bases(settings: Settings) -> tuple[str, ...]:
    return settings.bases if settings.sampled is None else (*settings.bases, settings.sampled)


def run(
    basis: str, task: str, seed: int, target: str, target_loss: float, train: int, others: int, steps: int
) -> Figures:
    """Prune against the adversary, to the same target loss in every basis, and audit on held-out prompts.

    What components leave over of a matrix is no node, and the adversary plays with it: only the learned ones leave
    anything over.
    """
    model = in_nodes(target, basis)
    splits = Splits.of(task, target, train, others, seed)
    circuit = pruned(model, splits, "adversarial", target_loss, steps, seed)
    found = audited(model, circuit, splits, target_loss, seed)
    return {"reached": circuit.reached, "deltas": int(model.delta_sites.sum()), **audit_figures(found)}


def table(results: Sequence[Result]) -> str:
    """Task by basis: how many nodes, which share of them, and how the circuits hold; then bases compared in pairs."""
    rows = [
        [f"{task}: {basis}", _share(of_it), *columns(of_it)]
        for (task, basis), of_it in grouped(results, "task", "basis").items()
    ]
    found = markdown(["nodes", "share kept", *HEAD], rows)
    compared = _compared(results)
    return f"{found}\n\n{compared}" if compared else found


def _compared(results: Sequence[Result]) -> str:
    """What the first basis keeps over what another keeps, pruned on the same prompts; empty where there is no other."""
    of = {(result.cell["basis"], result.cell["task"], result.cell["seed"]): result.figures for result in results}
    first, *others = dict.fromkeys(basis for basis, _, _ in of)
    rows = []
    for other in others:
        both = [(of[first, *rest], of[other, *rest]) for basis, *rest in of if basis == first and (other, *rest) in of]
        if both:
            shares = [(one["kept"] / one["n_nodes"], two["kept"] / two["n_nodes"]) for one, two in both]
            rows.append(
                [f"{first} over {other}", paired(shares), paired([(one["kept"], two["kept"]) for one, two in both])]
            )
    return markdown(["kept; pairs in which it is lower", "share", "nodes"], rows) if rows else ""


def _share(of_it: Sequence[Figures]) -> str:
    return over_seeds([one["kept"] / one["n_nodes"] for one in of_it]).within(0, 1).show()


EXPERIMENT = Experiment(
    name="bases",
    claim="At one worst case a circuit of learned components needs fewer nodes than one of other bases.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
    require=require,
)
