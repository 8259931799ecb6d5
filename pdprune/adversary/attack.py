"""Where the adversary chooses: which not-kept nodes to ablate and which to leave alone, so as to hurt most.

Its choice is a *source* `s ∈ [0,1]` per node (0 ablate, 1 leave alone); the model then runs under the mask
`m = g + (1 − g)·s`, so a kept node (`g = 1`) cannot be touched. The deltas of the sites are sources too. One source
must serve a whole batch (scope `batch`), or the adversary would win by fitting noise (method.md, section 4).

The attack, in the order of `attack`:
  1. both corners (`s = 0`, `s = 1`), a pool of sources that hurt before, and random draws: the first invariant of
     method.md, section 3, holds because these are evaluated, not because ascent would find them;
  2. projected gradient ascent in the unit box from several restarts (Madry et al. 2018, arXiv 1706.06083);
  3. a discrete stage: round, then flip entries ranked by gradient, since strong attackers end near corners anyway.
What comes out is a lower bound on the worst case, and is called nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.adversary.game import Game
from pdprune.errors import UserError
from pdprune.progress import moved

STALLED = 1e-3
"""A restart has converged when its best loss rises by less than this share of it in `Ascent.patience` steps."""
MIN_LATE = 5
"""A restart is judged by how it rose in the last quarter of its steps, and at least so many."""
Item = TypeVar("Item")
EXACT_LIMIT = 16
"""Exact search is refused above this many free entries: 2¹⁶ forward passes."""


@dataclass(frozen=True)
class Ascent:
    """How the adversary climbs, and how hard.

    Attributes:
        steps: gradient steps of each restart, at most.
        step_size: length of a step in every entry of the source, whose range is 1.
        restarts: independent climbs (particles).
        optimizer: `sign` steps, `adam`, or `momentum`: sign steps with momentum whose size is halved when they stall.
        draws: random sources evaluated first, half uniform on [0,1], half fair coins.
        flips: forward passes that the discrete stage may spend for each of its starts; 0 leaves it out.
        patience: a restart ends when its best loss has risen by less than a thousandth in so many steps. One that comes
            back to where it was ends at once: it would go round in circles; so does one that cannot catch up with the
            worst source known.
    """

    steps: int = 20
    step_size: float = 0.1
    restarts: int = 4
    optimizer: Literal["sign", "adam", "momentum"] = "sign"
    draws: int = 16
    flips: int = 64
    patience: int = 20

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"ascent: patience is {self.patience}; expected at least 1")
        if self.steps < 0 or self.restarts < 0 or self.draws < 0 or self.flips < 0:
            raise UserError("ascent: steps, restarts, draws and flips must be 0 or more")
        if not self.step_size > 0:
            raise UserError(f"ascent: step_size is {self.step_size}; expected more than 0")
        if self.optimizer not in ("sign", "adam", "momentum"):
            raise UserError(f"ascent: optimizer is {self.optimizer!r}; expected sign, adam or momentum")


@dataclass
class Worst:
    """The worst source met so far, group by group.

    Attributes:
        entries: `[*lead, E]`, sources of nodes, then of deltas.
        losses: `[G]`, the loss of each group under them.
    """

    game: Game
    entries: Float[Tensor, "*lead E"]
    losses: Float[Tensor, " G"]

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def meet(self, entries: Float[Tensor, "*lead E"], losses: Float[Tensor, " G"]) -> Bool[Tensor, " G"]:
        """Keep what hurts more than anything before; says in which groups."""
        better = losses > self.losses
        chosen = torch.where(better[:, None], self.game.grouped(entries), self.game.grouped(self.entries))
        self.entries = chosen.reshape(self.entries.shape)
        self.losses = torch.where(better, losses, self.losses)
        return better

    def play(self, entries: Float[Tensor, "*lead E"]) -> Bool[Tensor, " G"]:
        with torch.no_grad():
            return self.meet(entries, self.game.loss(entries))

    def play_each(self, entries: Sequence[Float[Tensor, "*lead E"]]) -> None:
        """Play several, as many together as the game can."""
        with torch.no_grad():
            losses = self.game.loss_of_each(entries)
        for played, loss in zip(entries, losses, strict=True):
            self.meet(played, loss)


def attack(
    game: Game,
    ascent: Ascent,
    rng: torch.Generator,
    *,
    pool: Sequence[Float[Tensor, "*lead E"]] = (),
    stop_above: float | None = None,
) -> Worst:
    """Look for the source that hurts most.

    On several ranks, in the scopes where each has groups of its own, only without the discrete stage and `stop_above`:
    both look at this rank's groups alone.

    Args:
        game: what is attacked.
        ascent: the budget.
        rng: decides restarts and draws.
        pool: sources to try besides, e.g. those that hurt similar circuits.
        stop_above: end as soon as the loss is above this; what is asked then is only whether it can be.

    Returns:
        the worst source met; its loss is never below that of `s = 0`, `s = 1`, the pool or a draw.
    """
    ones = game.corner(1.0)
    with torch.no_grad():
        worst = Worst(game, ones, game.unablated_loss())
    if not game.has_choices:
        return worst
    expected = len(pool) + 1 + _evaluations(ascent)
    for made, _ in enumerate(_moves(worst, ascent, rng, pool)):
        moved(made / expected)
        if stop_above is not None and worst.loss > stop_above:
            break
    return worst


def _evaluations(ascent: Ascent) -> int:
    """Sources that an attack tries, besides a pool, about: the discrete stage mostly ends early."""
    return ascent.draws + ascent.restarts * (ascent.steps + 1) + 2 * ascent.flips


def passes_of(ascent: Ascent) -> int:
    """What an attack costs, about, in passes of its data through the model; a climb's step goes back as well."""
    return _evaluations(ascent) + 2 * ascent.restarts * ascent.steps


def exact_attack(game: Game) -> Worst:
    """The worst corner of the box, by trying all of them: exact for an adversary that ablates wholly or not at all.

    Raises:
        UserError: with more than `EXACT_LIMIT` free entries.
    """
    free = game.grouped(game.free).any(0).nonzero().squeeze(-1)
    if len(free) > EXACT_LIMIT:
        raise UserError(f"search 'exact': {len(free)} entries are free; expected at most {EXACT_LIMIT}: use 'gradient'")
    ones = game.corner(1.0)
    with torch.no_grad():
        worst = Worst(game, ones, game.unablated_loss())
    for candidates in _chunks(_corners(game, free), game.at_once(exhaustive=True)):
        worst.play_each(candidates)
    return worst


def _corners(game: Game, free: Tensor) -> Iterator[Float[Tensor, "*lead E"]]:
    """All the corners of the box that are allowed."""
    ones = game.corner(1.0)
    for number, corner in enumerate(itertools.product((0.0, 1.0), repeat=len(free))):
        moved(number / 2 ** len(free))
        entries = game.grouped(torch.ones_like(ones))
        entries[:, free] = torch.tensor(corner, device=ones.device, dtype=ones.dtype)
        candidate = entries.reshape(ones.shape).masked_fill(~game.free, 1)
        if game.max_ablated is None or _within_budget(game, candidate):
            yield candidate


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most `size`, in order."""
    remaining = iter(items)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk


def _moves(worst: Worst, ascent: Ascent, rng: torch.Generator, pool: Sequence[Tensor]) -> Iterator[None]:
    """All stages of the attack; yields after every evaluation, so that the caller may stop."""
    game = worst.game
    for entries in (*pool, game.corner(0.0)):
        worst.play(game.project(entries))
        yield
    draws = (game.draw(rng, coins=index % 2 == 1) for index in range(ascent.draws))
    for drawn in _chunks(draws, game.at_once()):
        worst.play_each(drawn)
        yield
    starts = [_start(worst, restart, rng) for restart in range(ascent.restarts)]
    climbers = [Climber(game, start, ascent) for start in starts]
    for together in _chunks(climbers, game.at_once()):
        yield from _climb(together, worst)
    if not ascent.flips:
        return
    ends = sorted((climber.best for climber in climbers), key=lambda best: -best.loss)
    starts = [worst.entries, *(best.entries for best in ends)]
    if _is_small(game):
        # Climbs end in few basins. In small games flips alone lead from elsewhere into others, at little cost.
        coins = [game.draw(rng, coins=True) for _ in range(2 * ascent.restarts)]
        starts += [game.corner(0.0), game.corner(1.0), *coins]
    else:
        starts = starts[:2]
    known: dict[bytes, Tensor] = {}
    for start in starts:
        yield from _discrete_stage(start, worst, ascent.flips, known)


def _climb(climbers: Sequence[Climber], worst: Worst) -> Iterator[None]:
    """Restarts that climb together, each until it has converged or its steps are used up; yields after every step."""
    game = worst.game
    climbing = list(climbers)
    for _ in range(climbers[0].ascent.steps):
        seen = game.loss_and_gradient_of_each([climber.entries for climber in climbing])
        for climber, (losses, gradient) in zip(climbing, seen, strict=True):
            climber.learn(losses, gradient)
            worst.meet(climber.best.entries, climber.best.losses)
        yield
        climbing = [climber for climber in climbing if not game.everywhere(climber.is_done(worst.loss))]
        if not climbing:
            return
    with torch.no_grad():
        ends = game.loss_of_each([climber.entries for climber in climbing])
    for climber, end in zip(climbing, ends, strict=True):
        climber.best.meet(climber.entries, end)
        worst.meet(climber.best.entries, climber.best.losses)
    yield


def _start(worst: Worst, restart: int, rng: torch.Generator) -> Tensor:
    """Where a restart begins: half-way between the worst known source and the middle of the box, then at random.

    The corner `s = 1` itself is no start: under KL the unablated model is a minimum, where the gradient is zero.
    """
    match restart:
        case 0:
            return worst.game.project(0.5 * (worst.entries + 0.5))
        case _:
            return worst.game.draw(rng, coins=restart % 2 == 0)


@dataclass
class Climber:
    """One particle: a source that takes projected ascent steps and remembers what its optimiser needs."""

    game: Game
    entries: Float[Tensor, "*lead E"]
    ascent: Ascent
    moments: Float[Tensor, "two *lead E"] | None = None
    taken: int = 0
    best: Worst = field(init=False)
    size: float = field(init=False)
    recent: list[float] = field(default_factory=list)
    bests: list[float] = field(default_factory=list)
    visited: set[bytes] = field(default_factory=set)
    _placed: tuple[Tensor, bytes] | None = None

    def __post_init__(self) -> None:
        unmet = torch.full((self.game.n_groups,), -torch.inf, device=self.entries.device)
        self.best = Worst(self.game, self.entries, unmet)
        self.size = self.ascent.step_size
        if self.moments is None:
            self.moments = torch.zeros(2, *self.entries.shape, device=self.entries.device)

    def step(self) -> None:
        """Climb once."""
        self.learn(*self.game.loss_and_gradient(self.entries))

    def learn(self, losses: Float[Tensor, " G"], gradient: Float[Tensor, "*lead E"]) -> None:
        """Take a step with what was seen where the particle is."""
        self.best.meet(self.entries, losses)
        if self._returns:
            self.visited.add(self._place())
        self.climb(gradient)
        if self.ascent.optimizer == "momentum":
            self._halve_when_stalled(float(losses.mean()))
        self.bests.append(self.best.loss)

    def is_done(self, worst: float) -> bool:
        """Whether more steps would be of no use, where `worst` is the highest loss known of any source."""
        return self._has_stalled() or self._is_back() or self._is_left_behind(worst)

    def _has_stalled(self) -> bool:
        if len(self.bests) <= self.ascent.patience:
            return False
        before = self.bests[-1 - self.ascent.patience]
        return self.bests[-1] <= before + STALLED * abs(before)

    def _is_left_behind(self, worst: float) -> bool:
        """Whether it stays below the highest loss known even if it goes on to rise twice as fast as of late.

        Climbs slow down as entries reach the bounds; twice leaves room for those that do not yet. Groups that rise each
        for themselves are not judged by their mean.
        """
        late = max(MIN_LATE, self.ascent.steps // 4)
        if len(self.bests) <= late or self.game.n_groups > 1:
            return False
        speed = (self.bests[-1] - self.bests[-1 - late]) / late
        return self.bests[-1] + 2 * speed * (self.ascent.steps - len(self.bests)) < worst

    def _is_back(self) -> bool:
        """Whether it has come back to where it was: sign steps, which remember nothing, then repeat themselves."""
        return self._returns and self._place() in self.visited

    @property
    def _returns(self) -> bool:
        return self.ascent.optimizer == "sign"

    def _place(self) -> bytes:
        """Where it is, read once: a GPU has to stop for it."""
        if self._placed is None or self._placed[0] is not self.entries:
            self._placed = self.entries, _key(self.entries)
        return self._placed[1]

    def climb(self, gradient: Float[Tensor, "*lead E"]) -> None:
        """Take one step along a gradient that is already known."""
        self.entries = self.game.project(self.entries + self.size * self._direction(gradient))

    def _direction(self, gradient: Tensor) -> Tensor:
        assert self.moments is not None
        self.taken += 1
        match self.ascent.optimizer:
            case "sign":
                return gradient.sign()
            case "momentum":
                unit = gradient / gradient.abs().mean().clamp(min=1e-30)
                self.moments[0] = 0.75 * self.moments[0] + unit
                return self.moments[0].sign()
            case "adam":
                self.moments[0] = 0.9 * self.moments[0] + 0.1 * gradient
                self.moments[1] = 0.99 * self.moments[1] + 0.01 * gradient.square()
                mean = self.moments[0] / (1 - 0.9**self.taken)
                square = self.moments[1] / (1 - 0.99**self.taken)
                return mean / square.sqrt().clamp(min=1e-12)

    def _halve_when_stalled(self, loss: float) -> None:
        self.recent.append(loss)
        window = max(4, self.ascent.steps // 8)
        if len(self.recent) >= 2 * window:
            if max(self.recent[-window:]) <= max(self.recent[:-window]):
                self.size *= 0.5
            self.recent = self.recent[-window:]


def _discrete_stage(start: Tensor, worst: Worst, flips: int, known: dict[bytes, Tensor]) -> Iterator[None]:
    """Round a source, then flip what the gradient says would hurt more, while it does and the budget lasts.

    Each round ranks all flips by their first-order gain. It tries the first 2, 4, 8, ... of them together; if none
    helps, the best ones one at a time, and in small games two at a time. What is `known` is not evaluated again.
    """
    game = worst.game
    rounded = game.project(start.round())
    if _key(rounded) in known:
        return
    current = Worst(game, rounded, _loss_once(game, rounded, known))
    worst.meet(current.entries, current.losses)
    yield
    left = flips * (4 if _is_small(game) else 1)
    while left > 0:
        _, gradient = game.loss_and_gradient(current.entries)
        left -= 3  # a backward pass costs about two forward ones
        base, improved = current.entries, False
        blocks = (_flipped(game, base, together) for together in _blocks(game, gradient, base))
        for candidates in _chunks(blocks, game.at_once()):
            for candidate, losses in zip(candidates, _losses_once(game, candidates, known), strict=True):
                improved |= bool(current.meet(candidate, losses).any())
            worst.meet(current.entries, current.losses)
            left -= len(candidates)
            yield
        for few in () if improved else _singles_and_pairs(game, gradient, base):
            if left <= 0:
                break
            candidate = _flipped(game, current.entries, few)
            improved |= bool(current.meet(candidate, _loss_once(game, candidate, known)).any())
            worst.meet(current.entries, current.losses)
            left -= 1
            yield
        if not improved:
            break


def _loss_once(game: Game, entries: Tensor, known: dict[bytes, Tensor]) -> Float[Tensor, " G"]:
    return _losses_once(game, [entries], known)[0]


def _losses_once(game: Game, entries: Sequence[Tensor], known: dict[bytes, Tensor]) -> list[Float[Tensor, " G"]]:
    keys = [_key(one) for one in entries]
    new = {key: one for key, one in zip(keys, entries, strict=True) if key not in known}
    if new:
        with torch.no_grad():
            losses = game.loss_of_each(list(new.values()))
        known.update(zip(new, losses, strict=True))
    return [known[key] for key in keys]


def _key(entries: Tensor) -> bytes:
    return hashlib.blake2b(entries.cpu().numpy().tobytes(), digest_size=16).digest()


def _is_small(game: Game) -> bool:
    """Whether pairs of entries can be tried too."""
    return int(game.grouped(game.free).sum(-1).max()) <= EXACT_LIMIT


def _gain(game: Game, gradient: Tensor, at: Tensor) -> Float[Tensor, "G X"]:
    """What the gradient promises for flipping each entry of a rounded source."""
    promised = game.grouped(gradient) * (1 - 2 * game.grouped(at))
    return promised.masked_fill(~game.grouped(game.free), -torch.inf)


def _blocks(game: Game, gradient: Tensor, at: Tensor) -> Iterator[Bool[Tensor, "G X"]]:
    """The most promising 2, 4, 8, ... flips, and all that promise anything."""
    if game.max_ablated is not None:
        yield _ablate_best(game, gradient, game.grouped(at))
    gain = _gain(game, gradient, at)
    ranked = gain.argsort(dim=-1, descending=True, stable=True)
    n_promising = int((gain > 0).sum(-1).max())
    for size in sorted({2**k for k in range(1, n_promising.bit_length())} | ({n_promising} - {0, 1})):
        yield _first(ranked, gain, size)


def _singles_and_pairs(game: Game, gradient: Tensor, at: Tensor) -> Iterator[Bool[Tensor, "G X"]]:
    """The most promising entries one at a time, and in small games two at a time."""
    ranked = _gain(game, gradient, at).argsort(dim=-1, descending=True, stable=True)
    n_free = int(game.grouped(game.free).sum(-1).max())
    nothing = torch.zeros(ranked.shape, dtype=torch.bool, device=ranked.device)
    ranks = range(min(n_free, EXACT_LIMIT))
    for rank in ranks:
        yield nothing.scatter(-1, ranked[:, [rank]], True)
    for pair in itertools.combinations(ranks, 2) if _is_small(game) else ():
        yield nothing.scatter(-1, ranked[:, list(pair)], True)


def _first(ranked: Tensor, gain: Tensor, size: int) -> Bool[Tensor, "G X"]:
    """The `size` flips of the highest gain, where there is any gain."""
    return torch.zeros_like(gain, dtype=torch.bool).scatter(-1, ranked[:, :size], True) & (gain > 0)


def _ablate_best(game: Game, gradient: Tensor, at: Tensor) -> Bool[Tensor, "G X"]:
    """The flips that lead to ablating, within the budget, just the nodes whose ablation promises most."""
    score = (-game.source(gradient)).masked_fill(~game.source(game.free), -torch.inf)
    chosen = score.topk(min(game.max_ablated or 0, score.shape[-1]), dim=-1)
    source = torch.ones_like(score).scatter(-1, chosen.indices, (chosen.values <= 0).to(score.dtype))
    wanted = torch.cat([source, game.delta_source(at.reshape(gradient.shape))], dim=-1)
    return game.grouped(wanted) != at


def _flipped(game: Game, entries: Tensor, flips: Bool[Tensor, "G X"]) -> Tensor:
    grouped = game.grouped(entries)
    return game.project(torch.where(flips, 1 - grouped, grouped).reshape(entries.shape))


def _within_budget(game: Game, entries: Tensor) -> bool:
    assert game.max_ablated is not None
    return bool(((1 - game.source(entries)).sum(-1) <= game.max_ablated + 1e-4).all())
