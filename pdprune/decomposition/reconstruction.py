"""How far a network is from its target while what does not matter is partly ablated, by chance.

Masks are `m = g + (1 − g)·s` of importances `g` and drawn sources `s`, one for every token (SPD, arXiv 2506.20790).
Deltas have no importances, only sources.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.decomposition.model import DecomposedModel


def at_all_sites(loss: MaskedLoss, gates: Float[Tensor, "*lead n"], rng: torch.Generator) -> Float[Tensor, ""]:
    """The loss with all sites masked."""
    game = _by_token(loss, gates)
    return game.mean_loss(game.draw(rng, coins=False))


def site_by_site(loss: MaskedLoss, gates: Float[Tensor, "*lead n"], rng: torch.Generator) -> Float[Tensor, ""]:
    """The mean over sites of the loss with only that one masked."""
    game = _by_token(loss, gates)
    entries = game.draw(rng, coins=False)
    mask, delta_mask = gates + (1 - gates) * game.source(entries), game.delta_source(entries)
    losses = [loss.mean(loss.per_example(mask, delta_mask, sites=[name])) for name in loss.model.site_names]
    return torch.stack(losses).mean()


def in_subsets(loss: MaskedLoss, gates: Float[Tensor, "*lead n"], rng: torch.Generator) -> Float[Tensor, ""]:
    """The loss with a random subset of the sites masked, another one at every token; the others are left alone.

    The size of a subset is uniform on 1 to all, and every subset of a size is as likely as another (VPD).
    """
    game = _by_token(loss, gates)
    of_whole_batch = random_subsets((loss.whole_size, *game.lead[1:]), loss.model.n_sites, rng)
    masked = loss.ranks.share(of_whole_batch).to(gates.device)
    sources = game.draw(rng, coins=False)
    left_alone = torch.ones_like(sources)  # a source of 1 leaves a node and a delta just as they are
    return game.mean_loss(torch.where(masked[..., site_of_entry(loss.model)], sources, left_alone))


def random_subsets(lead: tuple[int, ...], n_sites: int, rng: torch.Generator) -> Bool[Tensor, "*lead s"]:
    """For every token a random subset of the sites, not empty."""
    size = torch.randint(1, n_sites + 1, (*lead, 1), generator=rng)
    rank = torch.rand(*lead, n_sites, generator=rng).argsort(-1).argsort(-1)
    return rank < size


def site_of_entry(model: DecomposedModel) -> Tensor:
    """For each source, of the nodes and then of the deltas, the number of the site it acts at.

    Every node must be of components of one site, as those of a decomposition that is being learned are.
    """
    at = torch.empty(model.n_nodes + model.n_sites, dtype=torch.long, device=model.delta_sites.device)
    for index, site in enumerate(model.sites.values()):
        at[site.node_index] = index
        at[model.n_nodes + index] = index
    return at


def _by_token(loss: MaskedLoss, gates: Float[Tensor, "*lead n"]) -> Game:
    return Game([loss], [gates], "example_position")
