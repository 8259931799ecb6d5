"""The three schemes by which a circuit is scored: complete, stochastic, adversarial (method.md, section 3).

A *scorer* gives the loss of any circuit on fixed data under one scheme. Selection asks it about hundreds of circuits.
The adversarial one remembers what hurt and restarts elsewhere each time, so that a circuit may score higher when asked
again, and what is asked in the same order is answered alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, attack
from pdprune.adversary.game import Game, Scope
from pdprune.adversary.objective import MaskedLoss, by_size
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.seeding import generator

SchemeName = Literal["complete", "stochastic", "adversarial"]


@dataclass(frozen=True)
class Draws:
    """How stochastic sources are drawn.

    Attributes:
        distribution: `uniform` on [0,1], or `bernoulli`.
        p: under `bernoulli`, the chance that a not-kept node is left alone.
        count: draws that a score is the mean of.
    """

    distribution: Literal["uniform", "bernoulli"] = "uniform"
    p: float = 0.5
    count: int = 16

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "bernoulli"):
            raise UserError(f"draws: distribution is {self.distribution!r}; expected uniform or bernoulli")
        if not 0 <= self.p <= 1:
            raise UserError(f"draws: p is {self.p}; expected a probability")
        if self.count < 1:
            raise UserError(f"draws: count is {self.count}; expected at least 1")

    def entries(self, game: Game, rng: torch.Generator) -> Float[Tensor, "*lead E"]:
        """One random source for a game: nodes, then deltas."""
        uniform = game.uniform(rng)
        drawn = uniform if self.distribution == "uniform" else (uniform < self.p).float()
        return game.project(drawn.to(game.free.device))


class Scorer(Protocol):
    """The loss of circuits under one scheme, on fixed data."""

    def score(self, keep: Float[Tensor, "*lead n"], stop_above: float | None = None) -> float:
        """The mean loss over the data; above `stop_above` any lower bound will do."""
        ...


class SmoothScorer(Scorer, Protocol):
    """A scorer whose loss is smooth in the gates, as no adversary answers them."""

    def promise(self, keep: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """How much, to first order, the loss would fall with each node's gate."""
        ...


@dataclass
class CompleteScorer:
    """Everything that is not kept is ablated, deltas too."""

    losses: Sequence[MaskedLoss]

    def score(self, keep: Float[Tensor, "*lead n"], stop_above: float | None = None) -> float:
        with torch.no_grad():
            return by_size(self.losses, [float(_complete(loss, keep)) for loss in self.losses])

    def promise(self, keep: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        return _promise(keep, self.losses, _complete)


@dataclass
class StochasticScorer:
    """The mean over random sources, the same ones for every circuit."""

    losses: Sequence[MaskedLoss]
    scope: Scope = "batch"
    draws: Draws = field(default_factory=Draws)
    seed: int = 0

    def score(self, keep: Float[Tensor, "*lead n"], stop_above: float | None = None) -> float:
        with torch.no_grad():
            return by_size(self.losses, [float(self._mean(loss, keep)) for loss in self.losses])

    def promise(self, keep: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        return _promise(keep, self.losses, self._mean)

    def _mean(self, loss: MaskedLoss, keep: Tensor) -> Float[Tensor, ""]:
        game = Game([loss], [keep], self.scope)
        index = self.losses.index(loss)
        draws = [
            self.draws.entries(game, generator(self.seed, "select-draw", index, draw))
            for draw in range(self.draws.count)
        ]
        return torch.stack([game.loss(entries).mean() for entries in draws]).mean()


@dataclass
class AdversarialScorer:
    """The worst case that an attack finds, remembering what hurt so far.

    Each game keeps a pool of the sources that were worst for earlier circuits. A circuit that lacks a node more is
    tried on them with that node ablated, which shows most bad circuits to be bad in a pass or two.
    """

    losses: Sequence[MaskedLoss]
    scope: Scope = "batch"
    ascent: Ascent = field(default_factory=Ascent)
    max_ablated: int | None = None
    seed: int = 0
    pool_size: int = 6
    _asked: int = 0
    _unablated: list[float] = field(default_factory=list)
    _pools: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def score(self, keep: Float[Tensor, "*lead n"], stop_above: float | None = None) -> float:
        self._asked += 1
        games = self._games(keep)
        sizes = [sum(loss.size for loss in game.losses) for game in games]
        found = list(self._floors(games))
        for index, game in enumerate(games):
            others = sum(s * f for i, (s, f) in enumerate(zip(sizes, found, strict=True)) if i != index)
            worst = attack(
                game,
                self.ascent,
                generator(self.seed, "select-attack", self._asked, index),
                pool=self._remembered(index, game),
                stop_above=None if stop_above is None else (stop_above * sum(sizes) - others) / sizes[index],
            )
            self._remember(index, game, worst.entries)
            found[index] = worst.loss
            mean = sum(s * f for s, f in zip(sizes, found, strict=True)) / sum(sizes)
            if stop_above is not None and mean > stop_above:
                break
        return mean

    def memory(self) -> dict[str, Any]:
        """What later scores follow from."""
        return {"asked": self._asked, "pools": dict(self._pools)}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on as the scorer that this is the memory of."""
        device = self.losses[0].model.delta_sites.device
        self._asked = memory["asked"]
        self._pools = {
            index: [(entries.to(device), free.to(device)) for entries, free in pool]
            for index, pool in memory["pools"].items()
        }

    def _floors(self, games: Sequence[Game]) -> Sequence[float]:
        """The loss of each game with nothing ablated, whatever the circuit: what its worst case is at least."""
        if not self._unablated:
            with torch.no_grad():
                self._unablated = [float(game.unablated_loss().mean()) for game in games]
        return self._unablated

    def _games(self, keep: Tensor) -> list[Game]:
        if self.scope == "universal":
            return [Game(self.losses, [keep] * len(self.losses), self.scope, self.max_ablated)]
        return [Game([loss], [keep], self.scope, self.max_ablated) for loss in self.losses]

    def _remembered(self, index: int, game: Game) -> list[Tensor]:
        """The pool for a game, the latest first: nodes that were kept then and are not now are ablated."""
        pool = self._pools.get(index, [])
        return [torch.where(game.free & ~was_free, 0.0, entries) for entries, was_free in reversed(pool)]

    def _remember(self, index: int, game: Game, entries: Tensor) -> None:
        self._pools[index] = [*self._pools.get(index, []), (entries, game.free)][-self.pool_size :]


def scorer(
    scheme: SchemeName,
    losses: Sequence[MaskedLoss],
    *,
    scope: Scope,
    draws: Draws,
    ascent: Ascent,
    max_ablated: int | None,
    seed: int,
) -> Scorer:
    """The scorer of a scheme.

    Raises:
        UserError: for an unknown scheme.
    """
    match scheme:
        case "complete":
            return CompleteScorer(losses)
        case "stochastic":
            return StochasticScorer(losses, scope, draws, seed)
        case "adversarial":
            return AdversarialScorer(losses, scope, ascent, max_ablated, seed)
        case _:
            raise UserError(f"scheme: got {scheme!r}; expected one of {', '.join(get_args(SchemeName))}")


def _complete(loss: MaskedLoss, keep: Float[Tensor, "*lead n"]) -> Float[Tensor, ""]:
    deltas = torch.zeros(loss.model.n_sites, device=keep.device)
    value = loss.per_example(keep, deltas).mean()
    if not bool(torch.isfinite(value.detach())):
        raise NonFiniteLossError("loss: it is NaN or infinite with nodes ablated; expected finite numbers")
    return value


def _promise(
    keep: Float[Tensor, "*lead n"], losses: Sequence[MaskedLoss], mean_loss: Callable[[MaskedLoss, Tensor], Tensor]
) -> Float[Tensor, "*lead n"]:
    total = sum(loss.size for loss in losses)
    promise = torch.zeros_like(keep)
    for loss in losses:
        leaf = keep.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(mean_loss(loss, leaf), leaf)
        promise -= gradient * (loss.size / total)
    return promise
