"""The loss by size: circuits of the same ranking and random ones, larger and smaller than the chosen one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, attack
from pdprune.adversary.game import Game
from pdprune.circuits.matched import permuted_within
from pdprune.report.audited_run import AuditedRun
from pdprune.report.figures import Curve, CurvePoint
from pdprune.report.worst_case import Replay, replay, spread_examples
from pdprune.seeding import generator

CURVE_EXAMPLES = 256
CLIMB = Ascent(steps=3, step_size=0.5, restarts=1, draws=0, flips=0)
"""From what hurt before: few steps, since many sizes are attacked."""
CLIMB_BELOW = Ascent(steps=8, step_size=0.25, restarts=2, draws=2, flips=0)
"""Of circuits smaller than the chosen one, which would look better than they are: what hurts them is another source."""
DRAWS = 4
SHARES_BELOW = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of the chosen size."""
STEPS_ABOVE = 3
"""Equal factors between the chosen size and all nodes."""


def size_curve(run: AuditedRun, whole: Replay) -> Curve:
    """Score circuits of several sizes, those of the audited circuit's ranking and random ones.

    Args:
        run: what was audited.
        whole: some of its examples, and the worst source on them.
    """
    replayed = replay(run, spread_examples(whole, CURVE_EXAMPLES))
    keep, audit = run.circuit.keep, run.audit
    chosen = int(keep.sum())
    wanted = sizes(chosen, keep.numel())
    order = ranking(run, replayed)
    worst = worst_by_size(run, replayed, order, {size: CLIMB_BELOW if size < chosen else CLIMB for size in wanted})
    random = worst_by_size(run, replayed, _shuffled(run, order), dict.fromkeys(wanted, CLIMB))
    return Curve(
        points=[_point(worst[size], size, audit.seed, random[size].loss) for size in wanted],
        chosen=CurvePoint(chosen, audit.complete_loss, audit.stochastic.mean, audit.adversarial.loss),
        unit="nodes" if keep.ndim == 1 else "node positions",
        total=keep.numel(),
        model_loss=audit.model_loss,
        target_loss=audit.target_loss,
        random=_random(run, chosen),
        note=_note(run, replayed.game.losses[0].size),
    )


def ranking(run: AuditedRun, replayed: Replay) -> list[int]:
    """The chosen circuit first, then the rest, by gate; equal gates by what the worst source would gain, to first
    order, if the node were ablated wholly.

    Returns:
        nodes, or node positions in circuits by position, what is kept first.
    """
    keep, gates, game = run.circuit.keep, run.circuit.gates, replayed.game
    mask = replayed.mask.detach().requires_grad_()
    with torch.enable_grad():
        loss = game.losses[0].per_example(mask, game.delta_source(replayed.entries)).mean()
        (gradient,) = torch.autograd.grad(loss, mask)
    mask = mask.detach()
    left = torch.where(game.gates[0] > 0, mask, 1 - mask)  # of a kept node there is all to lose, of others the rest
    need = -(gradient * left).cpu()
    need = need if need.shape == keep.shape else need.reshape(-1, keep.shape[-1]).mean(0).expand(keep.shape)
    kept, gate, needed = keep.flatten().tolist(), gates.flatten().tolist(), need.flatten().tolist()
    return sorted(range(len(kept)), key=lambda place: (-kept[place], -gate[place], -needed[place], place))


def _shuffled(run: AuditedRun, order: Sequence[int]) -> list[int]:
    """Another order, in which the first of any number lie in the same sites."""
    n_nodes = run.circuit.n_nodes
    groups: dict[tuple[str, ...], list[int]] = {}
    for node, sites in enumerate(run.model.node_signature):
        groups.setdefault(sites, []).append(node)
    other = permuted_within(list(groups.values()), n_nodes, generator(run.audit.seed, "report-random")).tolist()
    return [place - place % n_nodes + other[place % n_nodes] for place in order]


def sizes(chosen: int, total: int) -> list[int]:
    """Some sizes from few to all, the chosen one among them."""
    below = [round(chosen * share) for share in SHARES_BELOW]
    factor = total / max(1, chosen)
    above = [round(max(1, chosen) * factor ** (step / STEPS_ABOVE)) for step in range(1, STEPS_ABOVE + 1)]
    return sorted({size for size in (*below, chosen, *above, total) if 0 <= size <= total})


@dataclass(frozen=True)
class Worst:
    """A circuit, and the worst source that was found for it."""

    game: Game
    entries: Float[Tensor, "*lead E"]
    loss: float


def worst_by_size(
    run: AuditedRun, replayed: Replay, order: Sequence[int], climbs: Mapping[int, Ascent]
) -> dict[int, Worst]:
    """Attack the first nodes of an order, as many as asked for, the largest circuit first.

    A smaller circuit is attacked with what hurt the larger ones too, the nodes that it lacks ablated or left alone. So
    the loss never rises with size, as the exact worst case would not.

    Args:
        run: what was audited.
        replayed: the examples, and a source to begin with.
        order: nodes, or node positions.
        climbs: how hard to attack, by size.
    """
    keep = run.circuit.keep
    met = [(replayed.entries, replayed.game.free)]
    found = {}
    for size in sorted(climbs, reverse=True):
        gates = torch.zeros(keep.numel())
        gates[list(order[:size])] = 1
        on_device = gates.reshape(keep.shape).to(replayed.entries.device)
        game = Game(replayed.game.losses, [on_device], replayed.game.scope, run.max_ablated)
        pool = [entries for entries, _ in met]
        pool += [torch.where(game.free & ~was_free, 0.0, entries) for entries, was_free in met]
        worst = attack(game, climbs[size], generator(run.audit.seed, "report-curve", size), pool=pool)
        found[size] = Worst(game, worst.entries, worst.loss)
        met = [met[0], (worst.entries, game.free)]
    return found


def _point(worst: Worst, size: int, seed: int, random: float) -> CurvePoint:
    game = worst.game
    with torch.no_grad():
        complete = float(game.loss(torch.zeros_like(worst.entries)).mean())
        draws = [game.draw(generator(seed, "report-draw", draw), coins=False) for draw in range(DRAWS)]
        stochastic = sum(float(game.loss(entries).mean()) for entries in draws) / DRAWS
    return CurvePoint(size, complete, stochastic, worst.loss, random)


def _random(run: AuditedRun, chosen: int) -> CurvePoint | None:
    drawn = run.audit.random_circuits
    return None if drawn is None else CurvePoint(chosen, drawn.complete_loss, None, drawn.adversarial_loss)


def _note(run: AuditedRun, n_examples: int) -> str:
    on = (
        f"all {n_examples:,} held-out examples"
        if n_examples == run.n_examples
        else f"{n_examples:,} of the {run.n_examples:,} held-out examples, spread evenly by how much they suffer"
    )
    return (
        f"Lines: circuits of other sizes, on {on}. Nodes leave and join by gate, and among equal gates by how much the "
        "worst case loses with them; random circuits keep as many nodes of each site. The adversary's lines are lower "
        "bounds, found with less than the audit's budget: beside what hurt the chosen circuit and the next larger one, "
        f"{CLIMB_BELOW.restarts} climbs of {CLIMB_BELOW.steps} sign steps of {CLIMB_BELOW.step_size:g} below that "
        f"size, one of {CLIMB.steps} of {CLIMB.step_size:g} above it and for random circuits. “At random” is the mean "
        f"of {DRAWS} draws."
    )
