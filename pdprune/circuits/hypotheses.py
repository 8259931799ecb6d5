"""What a circuit claims, put as hypotheses (after Shi et al. 2024, arXiv 2410.13032), and tested in the worst case too.

| hypothesis | test |
|---|---|
| sufficient | it loses less than random circuits of as many nodes in every site, the rest ablated |
| necessary | ablating it costs more than ablating as many nodes at random |
| minimal | without any one of its nodes its worst case is higher |

And the ablation curve, which is no hypothesis: the loss on the way from the worst source to no ablation at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, attack, passes_of
from pdprune.adversary.game import Game
from pdprune.circuits.attack_journal import Attacks
from pdprune.circuits.findings import Comparison, CurvePoint, HypothesisTests, Minimality, Removal
from pdprune.circuits.matched import interchangeable_nodes, permuted_within, reordered
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.seeding import generator

NORMAL = 1.96
"""The normal's 97.5 % quantile."""
UNCHANGED_RELATIVE, UNCHANGED_ABSOLUTE = 0.02, 1e-4
"""A removal that raises the worst case by less than this changes nothing."""


@dataclass(frozen=True)
class HypothesisSettings:
    """Which tests are done, and how thoroughly.

    Attributes:
        circuits: random circuits to compare with, at two forward passes each; 0 leaves sufficiency and necessity out.
        removals: whether every kept node is removed in turn, at three forward passes each, for minimality.
        removal_attacks: of the removals that seem to change nothing, how many are attacked, the least first.
        points: of the ablation curve, both ends included.
    """

    circuits: int = 40
    removals: bool = False
    removal_attacks: int = 8
    points: int = 11

    def __post_init__(self) -> None:
        if self.circuits < 0 or self.removal_attacks < 0:
            raise UserError("hypotheses: circuits and removal_attacks must be 0 or more")
        if self.points < 2:
            raise UserError(f"hypotheses: points is {self.points}; expected at least 2, the two ends")


def cost_of(settings: HypothesisSettings, ascent: Ascent, games: Sequence[Game]) -> int:
    """About how many passes of a game's data the tests are, for who waits."""
    cost = (2 * settings.circuits + settings.points) * len(games)
    if settings.removals:
        n_kept = max(int((gates == 1).sum(-1).max()) for game in games for gates in game.gates)
        cost += (3 * n_kept + settings.removal_attacks * passes_of(ascent)) * len(games)
    return cost


def check_hypotheses(
    games: Sequence[Game],
    model: DecomposedModel,
    worst: Sequence[Float[Tensor, "*lead E"]],
    settings: HypothesisSettings,
    ascent: Ascent,
    seed: int,
    attacks: Attacks,
    progress: Callable[[str], None] = lambda check: None,
) -> HypothesisTests:
    """Test a circuit.

    Args:
        games: of the circuit, one a batch.
        model: what it is a circuit of.
        worst: the worst source found in each game.
        settings: which tests.
        ascent: the attack on removals.
        seed: decides all draws.
        attacks: makes the attacks.
        progress: told the name of each test as it begins.
    """
    progress(f"{settings.circuits} random circuits, ablated")
    sufficiency, necessity = _against_random(games, model, settings.circuits, seed)
    minimality = _minimality(games, worst, settings, ascent, seed, attacks, progress) if settings.removals else None
    progress("ablation curve")
    return HypothesisTests(sufficiency, necessity, minimality, _curve(games, worst, settings.points))


# -- sufficient and necessary ----------------------------------------------------------------------------------------


def _against_random(
    games: Sequence[Game], model: DecomposedModel, count: int, seed: int
) -> tuple[Comparison | None, Comparison | None]:
    """The circuit and its complement among random circuits and theirs; None where there is nothing to draw."""
    groups = interchangeable_nodes([gates for game in games for gates in game.gates], model)
    if not count or not groups:
        return None, None
    kept, ablated = [], []
    for circuit in range(count):
        order = permuted_within(groups, model.n_nodes, generator(seed, "hypothesis-circuit", circuit))
        others = reordered(games, order)
        kept.append(_complete_loss(others))
        ablated.append(_complement_loss(others))
    own_kept, own_ablated = _complete_loss(games), _complement_loss(games)
    return (
        _compared(own_kept, kept, sum(loss > own_kept for loss in kept)),
        _compared(own_ablated, ablated, sum(loss < own_ablated for loss in ablated)),
    )


def _compared(loss: float, others: Sequence[float], beaten: int) -> Comparison:
    low, high = wilson(beaten, len(others))
    median = float(torch.tensor(others, dtype=torch.float64).quantile(0.5))
    return Comparison(loss, len(others), median, beaten / len(others), low, high)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which has a width even where all or none hit."""
    share, spread = hits / n, NORMAL**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = NORMAL * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _complete_loss(games: Sequence[Game]) -> float:
    """With all that is not kept ablated, deltas too."""
    return _mean(games, [torch.zeros_like(game.corner(0.0)) for game in games])


def _complement_loss(games: Sequence[Game]) -> float:
    """With the circuit ablated and the rest kept, deltas too."""
    complements = [Game(game.losses, [1 - gates for gates in game.gates], game.scope) for game in games]
    entries = [torch.zeros_like(game.corner(0.0)) for game in complements]
    for game, played in zip(complements, entries, strict=True):
        game.delta_source(played).fill_(1.0)
    return _mean(complements, entries)


def _mean(games: Sequence[Game], entries: Sequence[Float[Tensor, "*lead E"]]) -> float:
    """The loss over all games, weighted by their examples."""
    sizes = [sum(loss.size for loss in game.losses) for game in games]
    with torch.no_grad():
        losses = [float(game.loss(played).mean()) for game, played in zip(games, entries, strict=True)]
    return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)


# -- minimal ---------------------------------------------------------------------------------------------------------


def _minimality(
    games: Sequence[Game],
    worst: Sequence[Float[Tensor, "*lead E"]],
    settings: HypothesisSettings,
    ascent: Ascent,
    seed: int,
    attacks: Attacks,
    progress: Callable[[str], None],
) -> Minimality | None:
    """How the worst case changes when kept nodes are removed one at a time; None for an empty circuit.

    A removal is first tried with what is worst for the circuit, with everything ablated, and with nothing else
    ablated. Only where none of the three hurts more is it attacked.
    """
    kept = _kept_nodes(games)
    if not kept:
        return None
    before = _mean(games, worst)
    changes = {}
    for number, node in enumerate(kept):
        progress(f"removal {number + 1} of {len(kept)}")
        changes[node] = max(0.0, _without(games, worst, node) - before)
    bound = UNCHANGED_RELATIVE * before + UNCHANGED_ABSOLUTE
    doubtful = sorted((node for node in kept if changes[node] <= bound), key=changes.__getitem__)
    attacked = doubtful[: settings.removal_attacks]
    for node in attacked:
        progress(f"attack without node {node}")
        changes[node] = max(changes[node], _attacked_without(games, worst, node, ascent, seed, attacks) - before)
    order = sorted(kept, key=changes.__getitem__)
    return Minimality(
        tested=len(kept),
        attacked=len(attacked),
        largest=Removal(order[-1], changes[order[-1]]),
        smallest=Removal(order[0], changes[order[0]]),
        unchanged=sorted(node for node in kept if changes[node] <= bound),
    )


def _kept_nodes(games: Sequence[Game]) -> list[int]:
    """Nodes kept anywhere."""
    rows = torch.cat([gates.reshape(-1, gates.shape[-1]) for game in games for gates in game.gates])
    nodes: list[int] = (rows > 0).any(0).nonzero().squeeze(-1).tolist()
    return nodes


def _without(games: Sequence[Game], worst: Sequence[Float[Tensor, "*lead E"]], node: int) -> float:
    smaller = [_removed(game, node) for game in games]
    tries = [
        _ablating(smaller, worst, node),
        [game.corner(0.0) for game in smaller],
        _ablating(smaller, [game.corner(1.0) for game in smaller], node),
    ]
    return max(_mean(smaller, entries) for entries in tries)


def _attacked_without(
    games: Sequence[Game],
    worst: Sequence[Float[Tensor, "*lead E"]],
    node: int,
    ascent: Ascent,
    seed: int,
    attacks: Attacks,
) -> float:
    smaller = [_removed(game, node) for game in games]
    pools = _ablating(smaller, worst, node)
    found = []
    for index, (game, pool) in enumerate(zip(smaller, pools, strict=True)):
        rng = generator(seed, "hypothesis-removal", node, index)
        found.append(attacks.made(game, partial(attack, game, ascent, rng, pool=[pool])).entries)
    return _mean(smaller, found)


def _removed(game: Game, node: int) -> Game:
    """The game of the circuit without one of its nodes."""
    smaller = []
    for gates in game.gates:
        without = gates.clone()
        without[..., node] = 0
        smaller.append(without)
    return Game(game.losses, smaller, game.scope, game.max_ablated)


def _ablating(
    games: Sequence[Game], entries: Sequence[Float[Tensor, "*lead E"]], node: int
) -> list[Float[Tensor, "*lead E"]]:
    """The sources with one more node ablated, as far as the budget allows."""
    ablated = [played.clone() for played in entries]
    for played in ablated:
        played[..., node] = 0
    return [game.project(played) for game, played in zip(games, ablated, strict=True)]


# -- the ablation curve ----------------------------------------------------------------------------------------------


def _curve(games: Sequence[Game], worst: Sequence[Float[Tensor, "*lead E"]], points: int) -> list[CurvePoint]:
    """The loss at `t·1 + (1 − t)·s`, from the worst source at t = 0 to no ablation at t = 1."""
    curve = []
    for point in range(points):
        t = point / (points - 1)
        curve.append(CurvePoint(t, _mean(games, [torch.lerp(s, torch.ones_like(s), t) for s in worst])))
    return curve
