"""An attack of another kind, to see whether the first had converged (method.md, section 4).

It shares no start with the first: momentum with halved steps, from restarts of its own, and coordinate ascent from the
unablated model, which needs no gradient and so is not misled by one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, Worst, attack
from pdprune.adversary.game import Game
from pdprune.progress import moved, part

COORDINATE_LIMIT = 256
"""Coordinate ascent is left out above this many free entries: a pass over them is as many forward passes."""
COORDINATE_PASSES = 3


def attack_again(game: Game, first: Ascent, rng: torch.Generator) -> Worst:
    """The worst source that momentum and coordinate ascent find.

    Args:
        game: what is attacked.
        first: the first attack's budget; this one has twice its steps, of a size that is halved when they stall.
        rng: decides restarts and draws.
    """
    steps = 2 * first.steps
    momentum = Ascent(steps, step_size=0.4, restarts=first.restarts, optimizer="momentum")
    with part(0, 2):
        worst = attack(game, momentum, rng)
    if n_free(game) <= COORDINATE_LIMIT:
        with part(1, 2):
            climbed = coordinate_ascent(game)
        worst.meet(climbed.entries, climbed.losses)
    return worst


def coordinate_ascent(game: Game) -> Worst:
    """From `s = 1`, flip single entries while that hurts more.

    Each entry is first flipped alone. Then they are flipped for good one after another, the most hurtful alone first,
    if that hurts on top of those before; and so again until a whole pass changes nothing.
    """
    ones = game.corner(1.0)
    entries = game.grouped(game.free).any(0).nonzero().squeeze(-1)
    with torch.no_grad():
        worst = Worst(game, ones, game.unablated_loss())
        if len(entries) == 0:
            return worst
        alone = torch.stack([game.loss(_flip(game, ones, entry.expand(game.n_groups))) for entry in entries])
    order = entries[alone.argsort(dim=0, descending=True, stable=True)]
    for climb in range(COORDINATE_PASSES):
        moved((climb + 1) / (COORDINATE_PASSES + 1))
        improved = [bool(worst.play(_flip(game, worst.entries, entry)).any()) for entry in order]
        if not any(improved):
            break
    return worst


def n_free(game: Game) -> int:
    """How many entries the adversary may move, in the group where they are most."""
    return int(game.grouped(game.free).sum(-1).max())


def _flip(game: Game, entries: Float[Tensor, "*lead E"], which: Tensor) -> Float[Tensor, "*lead E"]:
    """One entry of each group turned over, `which` of shape `[G]`."""
    grouped = game.grouped(entries).clone()
    row = torch.arange(len(grouped), device=grouped.device)
    grouped[row, which] = 1 - grouped[row, which]
    return game.project(grouped.reshape(entries.shape))
