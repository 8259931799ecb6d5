"""Random circuits that keep as many nodes of every set of sites as a given one: what a circuit is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from pdprune.adversary.game import Game
from pdprune.decomposition import DecomposedModel


def interchangeable_nodes(gates: Sequence[Tensor], model: DecomposedModel) -> list[list[int]]:
    """Nodes that live in the same sites, where some are kept and some are not; empty if nothing is left to draw."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for node, sites in enumerate(model.node_signature):
        groups.setdefault(sites, []).append(node)
    rows = torch.cat([g.reshape(-1, model.n_nodes) for g in gates])
    return [nodes for nodes in groups.values() if bool((rows[:, nodes] != rows[:, nodes[:1]]).any())]


def permuted_within(groups: Sequence[Sequence[int]], n: int, rng: torch.Generator) -> Int[Tensor, " n"]:
    """A random order of all nodes in which each stays in its group."""
    order = torch.arange(n)
    for nodes in groups:
        order[nodes] = torch.tensor(nodes)[torch.randperm(len(nodes), generator=rng)]
    return order


def reordered(games: Sequence[Game], order: Int[Tensor, " n"]) -> list[Game]:
    """The games of the circuit whose nodes are those of the given one in another order."""
    return [
        Game(game.losses, [g[..., order.to(g.device)] for g in game.gates], game.scope, game.max_ablated)
        for game in games
    ]
