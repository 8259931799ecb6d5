"""Several circuits on one batch, each with an adversary of its own, as one game: what a frontier plays on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.game import Game


class SeveralCircuits(Game):
    """R games of the scope `batch` side by side: a group each, whose masks run as one batch.

    Entries are `[R, E]`, gates `[R, n]`, losses `[R]`. What an adversary does (`attack.py`, `opponent.py`) it does to
    all of them at once, group by group.

    Args:
        games: on one and the same batch, with gates `[n]`.
        alike: whether random draws are the same for all of them, as they are where all have one seed.
    """

    def __init__(self, games: Sequence[Game], *, alike: bool) -> None:
        first = games[0]
        self.losses = first.losses
        self.gates = [torch.stack([game.gates[0] for game in games])]
        self.scope = first.scope
        self.max_ablated = first.max_ablated
        self.n_nodes = first.n_nodes
        self.lead = (len(games),)
        self.separable = False
        self.n_groups = len(games)
        self.ranks = first.ranks
        self.free = torch.stack([game.free for game in games])
        self.alike = alike

    def loss(self, entries: Float[Tensor, "*P R E"]) -> Float[Tensor, "*P R"]:
        """Each circuit's loss when its adversary plays its row."""
        (loss,), (gates,) = self.losses, self.gates
        masks = (gates + (1 - gates) * self.source(entries)).flatten(0, -2)
        deltas = self.delta_source(entries).flatten(0, -2)
        per_example = loss.per_example_of_each(masks, deltas, at_once=loss.at_once())
        losses = self.ranks.mean(per_example.mean(-1), loss.size).reshape(entries.shape[:-1])
        self._require_finite(losses)
        return losses

    def _stacked_loss(self, entries: Float[Tensor, "P R E"]) -> Float[Tensor, "P R"]:
        return self.loss(entries)

    def unablated_loss(self) -> Float[Tensor, " R"]:
        return super().unablated_loss().expand(self.n_groups)

    def at_once(self, *, exhaustive: bool = False) -> int:
        """How many sources of every circuit should be played together."""
        return max(1, self.losses[0].at_once(exhaustive=exhaustive) // self.n_groups)

    def uniform(self, rng: torch.Generator) -> Float[Tensor, "R E"]:
        if not self.alike:
            return torch.rand(self.free.shape, generator=rng)
        return torch.rand(self.free.shape[1:], generator=rng).expand(self.free.shape)
