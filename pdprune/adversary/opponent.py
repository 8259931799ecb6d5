"""The adversary while gates are learned: fresh, persistent or free (method.md, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent, Climber, Worst, attack
from pdprune.adversary.game import Game
from pdprune.errors import UserError
from pdprune.seeding import generator


@dataclass(frozen=True)
class TrainingAdversary:
    """How the adversary climbs between two keep steps.

    Attributes:
        mode: `fresh` starts anew on every batch and climbs `steps` times, then the gates descend once; `persistent`
            keeps its sources from batch to batch and goes on climbing; `free` climbs along the gradient of the keep
            step itself, so that both players share one backward pass (Shafahi et al. 2019): cheap, and weaker.
        steps: ascent steps a keep step; `free` takes one.
        step_size: of one ascent step. Steps × step size of 2 lets a fresh source cross its range.
        particles: sources climbing at once; the worst is met by the gates. `free` takes them in turn.
        optimizer: `sign` steps or `adam`.
        max_ablated: how many nodes the adversary may ablate; none is any number.
    """

    mode: Literal["fresh", "persistent", "free"] = "fresh"
    steps: int = 4
    step_size: float = 0.5
    particles: int = 1
    optimizer: Literal["sign", "adam"] = "sign"
    max_ablated: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("fresh", "persistent", "free"):
            raise UserError(f"adversary: mode is {self.mode!r}; expected fresh, persistent or free")
        if self.steps < 1 or self.particles < 1:
            raise UserError("adversary: steps and particles must be at least 1")
        if self.max_ablated is not None and self.max_ablated < 0:
            raise UserError(f"adversary: max_ablated is {self.max_ablated}; expected 0 or more")
        if self.optimizer not in ("sign", "adam"):
            raise UserError(f"adversary: optimizer is {self.optimizer!r}; expected sign or adam")
        if not self.step_size > 0:
            raise UserError(f"adversary: step_size is {self.step_size}; expected more than 0")

    @property
    def ascent(self) -> Ascent:
        return Ascent(self.steps, self.step_size, self.particles, self.optimizer, draws=0, flips=0)


class Opponent(nn.Module):
    """The adversary's side of a keep step. What it carries from step to step is in buffers, for checkpoints.

    Args:
        settings: how it climbs.
        lead: the leading dimensions of a source: () for scope `batch`, (T,) for `position`.
        n_entries: nodes and deltas.
        seed: decides every start.
    """

    sources: Float[Tensor, "P *lead E"]
    moments: Float[Tensor, "P two *lead E"]

    def __init__(self, settings: TrainingAdversary, lead: tuple[int, ...], n_entries: int, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        carried = settings.particles if settings.mode != "fresh" else 0
        shape = (carried, *lead, n_entries)
        self.register_buffer("sources", torch.rand(shape, generator=generator(seed, "sources")))
        self.register_buffer("moments", torch.zeros(carried, 2, *lead, n_entries))

    def choose(self, game: Game, step: int) -> Float[Tensor, "*lead E"]:
        """The source that the gates will meet at this keep step, climbed for against detached gates."""
        match self.settings.mode:
            case "fresh":
                return attack(game, self.settings.ascent, generator(self.seed, "ascent", step)).entries
            case "persistent":
                return self._climb_on(game, step)
            case "free":
                turn = self._turn(step)
                return game.corner(0.0) if turn is None else game.project(self.sources[turn])

    def met_by_gates(self, game: Game, step: int) -> Float[Tensor, "*lead E"]:
        """What the gates meet of it; under `free` with room for the gradient that it will climb along.

        What the adversary does to a wholly kept node makes no difference, but its gate's gradient asks what would
        happen without it: there it would be ablated.
        """
        entries = self.choose(game, step).detach().masked_fill(~game.free, 0)
        return entries.requires_grad_(self.settings.mode == "free")

    def learn(self, game: Game, step: int, gradient: Float[Tensor, "*lead E"]) -> None:
        """Climb along the keep step's own gradient; only `free` does."""
        turn = self._turn(step)
        if self.settings.mode != "free" or turn is None:
            return
        climber = self._climber(game, turn, taken=step // (self.settings.particles + 1))
        climber.climb(gradient.masked_fill(~game.free, 0))
        self._carry(game, turn, climber)

    def _turn(self, step: int) -> int | None:
        """Whose turn it is under `free`: each particle's, and then, for one step, the corner `s = 0`."""
        turn = step % (self.settings.particles + 1)
        return turn if turn < self.settings.particles else None

    def _climb_on(self, game: Game, step: int) -> Float[Tensor, "*lead E"]:
        candidates = [game.corner(0.0), game.corner(1.0)]
        for particle in range(self.settings.particles):
            climber = self._climber(game, particle, taken=step * self.settings.steps)
            for _ in range(self.settings.steps):
                climber.step()
            self._carry(game, particle, climber)
            candidates.append(climber.entries)
        ablated, unablated, *climbed = candidates
        with torch.no_grad():
            worst = Worst(game, ablated, game.loss(ablated))
            worst.meet(unablated, game.unablated_loss())
        for entries in climbed:
            worst.play(entries)
        return worst.entries

    def _climber(self, game: Game, particle: int, taken: int) -> Climber:
        moments = self.moments[particle].clone()
        return Climber(game, game.project(self.sources[particle]), self.settings.ascent, moments, taken)

    def _carry(self, game: Game, particle: int, climber: Climber) -> None:
        """Remember where a particle is. Of a node that is wholly kept now, what it did when it last was not: there
        the climber plays 1, which under KL is no place to start from."""
        assert climber.moments is not None
        self.sources[particle] = torch.where(game.free, climber.entries, self.sources[particle])
        self.moments[particle] = climber.moments


@contextmanager
def as_one(opponents: Sequence[Opponent]) -> Iterator[Opponent]:
    """Several opponents of one kind as one that plays `SeveralCircuits`; what it carries on is theirs afterwards."""
    joint = Opponent(opponents[0].settings, (), 0, opponents[0].seed)
    joint.sources = torch.stack([opponent.sources for opponent in opponents], dim=1)
    joint.moments = torch.stack([opponent.moments for opponent in opponents], dim=2)
    yield joint
    for row, opponent in enumerate(opponents):
        opponent.sources.copy_(joint.sources[:, row])
        opponent.moments.copy_(joint.moments[:, :, row])
