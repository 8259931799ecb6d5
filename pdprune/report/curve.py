"""The loss by size: circuits of the same ranking, larger and smaller than the chosen one, under each scheme."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, attack
from pdprune.adversary.game import Game
from pdprune.report.audited_run import AuditedRun
from pdprune.report.figures import Curve, CurvePoint
from pdprune.report.worst_case import Replay
from pdprune.seeding import generator

CURVE_EXAMPLES = 256
CLIMB = Ascent(steps=3, step_size=0.5, restarts=1, draws=0, flips=0)
"""From what hurt before: few steps, since many sizes are attacked."""
DRAWS = 4
SHARES_BELOW = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of the chosen size."""
STEPS_ABOVE = 3
"""Equal factors between the chosen size and all nodes."""


def curve_of(run: AuditedRun, replayed: Replay, order: Sequence[int]) -> Curve:
    """Score circuits of several sizes, the largest first.

    A smaller circuit is attacked with what hurt the larger ones too, the nodes that it lacks ablated or left alone. So
    the adversary's line never rises with size, as the exact worst case would not.

    Args:
        run: what was audited.
        replayed: the examples, and the worst source on them.
        order: the nodes (node positions in circuits by position), what is kept first.
    """
    keep = run.circuit.keep
    chosen = int(keep.sum())
    audit = run.audit
    points: list[CurvePoint] = []
    met = [(replayed.entries, replayed.game.free)]
    for size in reversed(sizes(chosen, keep.numel())):
        gates = torch.zeros(keep.numel())
        gates[list(order[:size])] = 1
        game = Game(
            replayed.game.losses,
            [gates.reshape(keep.shape).to(replayed.entries.device)],
            replayed.game.scope,
            run.max_ablated,
        )
        point, worst = _point(game, size, met, audit.seed)
        points.insert(0, point)
        met = [met[0], (worst, game.free)]
    return Curve(
        points=points,
        chosen=CurvePoint(chosen, audit.complete_loss, audit.stochastic.mean, audit.adversarial.loss),
        unit="nodes" if keep.ndim == 1 else "node positions",
        total=keep.numel(),
        model_loss=audit.model_loss,
        target_loss=audit.target_loss,
        random=_random(run, chosen),
        note=_note(run, replayed.game.losses[0].size),
    )


def ranking(run: AuditedRun, replayed: Replay, removed: dict[int, float]) -> list[int]:
    """The chosen circuit first, then the rest, by gate; equal gates by what the worst case would lose with the node."""
    keep, gates = run.circuit.keep, run.circuit.gates
    _, gradient = replayed.game.loss_and_gradient(replayed.entries)
    source = replayed.game.source(replayed.entries)
    promise = -(replayed.game.source(gradient) * (1 - source)).reshape(-1, keep.shape[-1]).mean(0).cpu()
    for node, worst in removed.items():
        promise[node] = worst
    promise = promise.expand(keep.shape).flatten()
    kept, gate, loss = keep.flatten().tolist(), gates.flatten().tolist(), promise.tolist()
    return sorted(range(len(kept)), key=lambda place: (-kept[place], -gate[place], -loss[place], place))


def sizes(chosen: int, total: int) -> list[int]:
    """Some sizes from few to all, the chosen one among them."""
    below = [round(chosen * share) for share in SHARES_BELOW]
    factor = total / max(1, chosen)
    above = [round(max(1, chosen) * factor ** (step / STEPS_ABOVE)) for step in range(1, STEPS_ABOVE + 1)]
    return sorted({size for size in (*below, chosen, *above, total) if 0 <= size <= total})


def _point(
    game: Game, size: int, met: Sequence[tuple[Tensor, Tensor]], seed: int
) -> tuple[CurvePoint, Float[Tensor, "*lead E"]]:
    """`met` are sources that hurt other circuits, with what was free to choose there."""
    pool = [entries for entries, _ in met]
    pool += [torch.where(game.free & ~was_free, 0.0, entries) for entries, was_free in met]
    worst = attack(game, CLIMB, generator(seed, "report-curve", size), pool=pool)
    with torch.no_grad():
        complete = float(game.loss(torch.zeros_like(worst.entries)).mean())
        draws = [game.draw(generator(seed, "report-draw", draw), coins=False) for draw in range(DRAWS)]
        stochastic = sum(float(game.loss(entries).mean()) for entries in draws) / DRAWS
    return CurvePoint(size, complete, stochastic, worst.loss), worst.entries


def _random(run: AuditedRun, chosen: int) -> CurvePoint | None:
    drawn = run.audit.random_circuits
    return None if drawn is None else CurvePoint(chosen, drawn.complete_loss, float("nan"), drawn.adversarial_loss)


def _note(run: AuditedRun, n_examples: int) -> str:
    on = (
        f"all {n_examples:,} held-out examples"
        if n_examples == run.n_examples
        else f"{n_examples:,} of the {run.n_examples:,} held-out examples, spread evenly by how much they suffer"
    )
    return (
        f"Lines: circuits of other sizes, on {on}. Nodes leave and join by gate, and among equal gates by how much the "
        "worst case loses with them. The adversary's line is a lower bound, found with less than the audit's budget: "
        f"{CLIMB.steps} sign steps of {CLIMB.step_size:g} from what hurt the chosen circuit and the next larger one. "
        f"The random line is the mean of {DRAWS} draws."
    )
