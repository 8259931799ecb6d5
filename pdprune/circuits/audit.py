"""The audit: the checks of a circuit on data that nothing was chosen on (method.md, section 3).

`audit` lists the checks, and each is a function below it. The one that counts is the attack, which `adversary.py`
carries out. A passed audit means "survived this attack, with this budget": it is a lower bound on the worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.attack import Ascent, Worst, attack, exact_attack, passes_of
from pdprune.adversary.game import Game, Scope, per_batch
from pdprune.adversary.objective import MaskedLoss, Reference, ReferenceKind, masked_losses
from pdprune.adversary.second_attack import attack_again, n_free
from pdprune.batches import Batch, as_batches
from pdprune.circuits.attack_journal import Attacks
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import (
    KL,
    Adversarial,
    Audit,
    RandomCircuits,
    Rung,
    Score,
    Stochastic,
    TaskScores,
)
from pdprune.circuits.hypotheses import HypothesisSettings, check_hypotheses, cost_of
from pdprune.circuits.journal import fingerprint_of
from pdprune.circuits.matched import interchangeable_nodes, permuted_within, reordered
from pdprune.decomposition import DecomposedModel
from pdprune.errors import NonFiniteLossError, UserError, require_at_least, require_gradients
from pdprune.losses import (
    LossFunction,
    answers,
    kl,
    loss_function,
    loss_name,
    scored_positions,
    task_loss_and_accuracy,
)
from pdprune.precision import computed_in
from pdprune.progress import part, span
from pdprune.seeding import generator

__all__ = ["Audit", "as_gates", "audit"]

FLOOR = Ascent(steps=20, step_size=0.1, restarts=4)
"""No circuit is audited with less than this, corners and discrete stage included."""
BRIEF = Ascent(steps=20, step_size=0.1, restarts=1, flips=16)
"""What random circuits are attacked with: too weak an attack flatters them, not the circuit that they stand beside."""
AUTO_LIMIT = 12
"""`search="auto"` tries all subsets too, up to this many free entries."""
CLIMBS_RELATIVE, CLIMBS_ABSOLUTE = 0.02, 1e-4
"""An attack that finds this much more than another shows that the other had not converged."""

Search = Literal["gradient", "exact", "auto"]
Keep = Circuit | Tensor | Iterable[int]


def audit(
    model: DecomposedModel,
    keep: Keep,
    batches: Iterable[Any],
    *,
    loss: str | LossFunction = "kl",
    reference: ReferenceKind | Reference = "zero",
    scope: Scope = "batch",
    target_loss: float | None = None,
    steps: int = 20,
    step_size: float = 0.1,
    restarts: int = 4,
    search: Search = "gradient",
    seed: int = 0,
    scheme: str | None = None,
    ladder: Sequence[int] = (),
    second_attack: bool = False,
    draws: int = 32,
    random_circuits: int = 2,
    hypotheses: HypothesisSettings | None = None,
    reference_batches: Iterable[Any] | None = None,
    max_ablated: int | None = None,
    held_out: bool | None = None,
    attacks: Attacks | None = None,
    progress: Callable[[str], None] = lambda check: None,
) -> Audit:
    """Check a circuit: completely, at random, and against an adversary.

    Args:
        model: the decomposed target.
        keep: the circuit: Bool `[n]`, a set of node indices, a `Circuit`, or keeping by position or example (`[T, n]`,
            `[B, T, n]`; `[B, n]` in networks without positions; B counts the examples of all batches). By position or
            example it may be kept in part: causal importances in [0, 1] (`importance_mask`), which the adversary can
            take the rest of.
        batches: re-iterable, of what a DataLoader yields. Each gets a source of its own, so make them large (256): many
            examples under one source are what keeps the adversary from fitting noise.
        loss: `"kl"`, `"ce"`, `"mse"`, or a function `(output, target_output, batch) -> [B]`.
        reference: what ablated components are replaced by: a kind, or one that is measured already.
        scope: what one source is shared by (method.md, section 4).
        target_loss: what the circuit should stay within; a `Circuit` brings its own.
        steps: of each of the attack's climbs.
        step_size: of one of them, where a source ranges over 1.
        restarts: climbs, each from another start.
        search: `gradient`; `exact`, all subsets instead, refused above 16 free entries; `auto`, all subsets besides
            `gradient` up to 12 free entries.
        seed: decides all draws.
        scheme: what the circuit was pruned with, for the record; a `Circuit` brings its own.
        ladder: numbers of steps to attack with besides, e.g. `(20, 80, 320)`.
        second_attack: whether an attack of another kind follows.
        draws: random sources of the stochastic check.
        random_circuits: how many to compare with, each under a brief attack.
        hypotheses: the circuit hypothesis tests to do besides, none if not given (see `pdprune.circuits.hypotheses`).
        reference_batches: what mean references are measured on; by default `batches`.
        max_ablated: how many nodes the adversary may ablate. With it, its loss may be below that of complete ablation.
        held_out: whether nothing was chosen on `batches`, for the record.
        attacks: makes the attacks, and may know some from an audit of the same that was stopped; for one `audit` only.
        progress: told the name of each check as it begins.

    Returns:
        what was found. It is the same for the same seed; target and global random state are left as they were.

    Raises:
        UserError: for what does not fit together, for a budget below 4 restarts × 20 steps of 0.1, and (as
            `NonFiniteLossError`) for a loss that is NaN or infinite.
    """
    require_gradients("audit")
    plan = _Plan.checked(Ascent(steps, step_size, restarts), search, ladder, second_attack, seed)
    require_at_least(1, draws=draws)
    require_at_least(0, random_circuits=random_circuits, max_ablated=max_ablated)
    gates = as_gates(keep, model)
    if isinstance(keep, Circuit):
        scheme = scheme or keep.scheme
        target_loss = keep.target_loss if target_loss is None and keep.loss == loss_name(loss) else target_loss
    data = as_batches(batches)
    if not isinstance(reference, Reference):
        measured_on = data if reference_batches is None else as_batches(reference_batches)
        reference = Reference.measure(reference, model, measured_on, seed)
    eye = _Eye.on(masked_losses(model, data, loss, reference), loss)
    games = _games(eye.losses, gates, scope, max_ablated)
    attacks = attacks or Attacks()
    settings = plan, reference.kind, loss_name(loss), scope, draws, random_circuits, hypotheses, max_ablated
    attacks.begin(lambda: fingerprint_of(gates, eye.losses, *settings, computed_in(gates.device)))
    cost = plan.cost(games) + len(games) * (4 + draws + random_circuits * passes_of(BRIEF))
    course = _Course(progress, cost + (cost_of(hypotheses, FLOOR, games) if hypotheses else 0))

    with course.check("model, complete ablation, complement", 3 * len(games)):
        unablated = eye.read_unablated(games)
        complete = eye.read(games, [torch.zeros_like(game.corner(0.0)) for game in games])
        complement = eye.read_complement(games)
    with course.check(f"{draws} random sources", draws * len(games)):
        drawn = _draw(eye, games, draws, seed)
    attacked = _attack(games, drawn.worst, plan, course, attacks)
    with course.check("transfer to other batches", len(games)):
        under_attack = eye.read(games, [worst.entries for worst in attacked.worst])
        transfer = _transfer(games, attacked.worst)
    with course.check(f"{random_circuits} random circuits", random_circuits * len(games) * passes_of(BRIEF)):
        random = _random_circuits(eye, games, model, random_circuits, seed, attacks)
    tests = None
    if hypotheses is not None:
        sources = [worst.entries for worst in attacked.worst]
        with course.check("hypothesis tests", cost_of(hypotheses, FLOOR, games)):
            tests = check_hypotheses(games, model, sources, hypotheses, FLOOR, seed, attacks, progress)

    adversarial_loss = _not_below_its_starts(
        attacked.loss,
        {"model": unablated.loss, "stochastic": drawn.stochastic.max}
        | ({"complete": complete.loss} if max_ablated is None else {}),
    )
    exact = search == "exact"
    source, delta_source = _split(games[0], transfer.entries)
    return Audit(
        n_nodes=model.n_nodes,
        n_kept=_n_kept(gates),
        loss=loss_name(loss),
        scheme=scheme,
        reference=reference.kind,
        scope=scope,
        n_examples=sum(batch.size for batch in data),
        batch_size=max(batch.size for batch in data),
        held_out=held_out,
        seed=seed,
        model_loss=unablated.loss,
        complete_loss=complete.loss,
        stochastic=drawn.stochastic,
        adversarial=Adversarial(
            loss=adversarial_loss,
            discrete_loss=_discrete_loss(games, attacked.worst),
            held_out_loss=transfer.held_out_loss,
            per_example_p95=_p95(under_attack.by_example("loss")),
            flipped=under_attack.mean("flipped"),
            steps=0 if exact else steps,
            step_size=step_size,
            restarts=0 if exact else restarts,
            n_ablated=_n_ablated(games, attacked.worst),
            ladder=attacked.ladder,
            converged=attacked.converged,
        ),
        complement_loss=complement.loss,
        random_circuits=random,
        task=_task_scores(unablated, complete, drawn, under_attack),
        beats_model=_below(complete.mean("ce"), unablated.mean("ce")),
        target_loss=target_loss,
        faithful=None if target_loss is None else adversarial_loss <= target_loss,
        kl=_kl(complete, drawn, under_attack),
        hypothesis_tests=tests,
        worst_source=source,
        worst_source_delta=delta_source,
    )


def as_gates(keep: Keep, model: DecomposedModel) -> Float[Tensor, "*lead n"]:
    """A circuit, however given, as gates on the model's device: 0 and 1, or what lies between in causal importances.

    Raises:
        UserError: for a circuit of another model, an index that no node has, a wrong width, values other than 0 and 1
            in `[n]` and outside of [0, 1] elsewhere.
    """
    n = model.n_nodes
    match keep:
        case Circuit():
            keep.check_fits(model)
            gates = keep.keep.float()
        case Tensor():
            gates = keep.detach().float()
            if gates.ndim not in (1, 2, 3) or gates.shape[-1] != n:
                raise UserError(
                    f"keep: its shape is {list(gates.shape)}; expected [{n}] or [..., {n}], one entry a node"
                )
            if gates.ndim == 1 and not bool(((gates == 0) | (gates == 1)).all()):
                raise UserError("keep: it has values other than 0 and 1; expected booleans (for indices, give a set)")
            if not bool(((gates >= 0) & (gates <= 1)).all()):
                raise UserError("keep: it has values outside of [0, 1]; expected booleans, or causal importances")
        case Iterable():
            gates = torch.zeros(n)
            for node in keep:
                if isinstance(node, bool) or not isinstance(node, int) or not 0 <= node < n:
                    raise UserError(f"keep: got node {node!r}; expected indices from 0 to {n - 1}, or Bool [{n}]")
                gates[node] = 1
        case _:
            raise UserError(f"keep: got {keep!r}; expected Bool [{n}], a set of node indices, or a Circuit")
    return gates.to(model.delta_sites.device)


# -- how far it has come ---------------------------------------------------------------------------------------------


@dataclass
class _Course:
    """The checks one after another, each as long as the passes of a game's data that it costs, about.

    Attributes:
        tell: told the name of each check.
        total: passes of all checks.
        done: passes of those that are over.
    """

    tell: Callable[[str], None]
    total: int
    done: int = 0

    @contextmanager
    def check(self, name: str, cost: int) -> Iterator[None]:
        """While this lasts, the check goes on."""
        self.tell(name)
        with span(self.done / self.total, (self.done + cost) / self.total):
            yield
        self.done += cost


# -- what is looked at -----------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What a run of one game's data under one source shows, example by example; None where it makes no sense."""

    loss: Float[Tensor, " B"]
    ce: Float[Tensor, " B"] | None
    accuracy: Float[Tensor, " B"] | None
    flipped: Float[Tensor, " B"] | None
    kl: Float[Tensor, " B"] | None


@dataclass(frozen=True)
class _Readings:
    """A reading of every game."""

    games: list[_Reading]

    @property
    def loss(self) -> float:
        return _weighted([(len(reading.loss), float(reading.loss.mean())) for reading in self.games])

    def by_example(self, what: str) -> Float[Tensor, " B"]:
        return torch.cat([getattr(reading, what) for reading in self.games])

    def mean(self, what: str) -> float | None:
        return None if getattr(self.games[0], what) is None else float(self.by_example(what).double().mean())


@dataclass(frozen=True)
class _Eye:
    """Runs the masked model and reads all that is asked of its output at once.

    Attributes:
        losses: the audited batches.
        loss: the audit's loss.
        classes: whether outputs are logits of classes, so that there are answers.
        labelled: whether there are right answers.
        with_kl: whether the KL is another number than the loss.
    """

    losses: list[MaskedLoss]
    loss: Callable[[Tensor, Tensor, Batch], Tensor]
    classes: bool
    labelled: bool
    with_kl: bool

    @classmethod
    def on(cls, losses: list[MaskedLoss], loss: str | LossFunction) -> _Eye:
        labelled = all(_has_classes(masked) and _has_class_labels(masked.batch) for masked in losses)
        classes = labelled or (loss in ("kl", "ce") and all(map(_has_classes, losses)))
        return cls(losses, loss_function(loss), classes, labelled, classes and loss != "kl")

    def read(self, games: Sequence[Game], entries: Sequence[Float[Tensor, "*lead E"]]) -> _Readings:
        """Under one source a game: nodes, then deltas."""
        readings = []
        for game, played in zip(games, entries, strict=True):
            source = game.source(played)
            masks = [gates + (1 - gates) * source for gates in game.gates]
            readings.append(self._read_game(game, masks, game.delta_source(played)))
        return _Readings(readings)

    def read_complement(self, games: Sequence[Game]) -> _Readings:
        """With the circuit ablated and the rest kept, deltas too."""
        return _Readings([self._read_game(game, [1 - gates for gates in game.gates], None) for game in games])

    def read_unablated(self, games: Sequence[Game]) -> _Readings:
        """With nothing ablated: what the target answers."""
        return _Readings(
            [_joined([self._read_output(masked, masked.target_output) for masked in game.losses]) for game in games]
        )

    def _read_game(self, game: Game, masks: Sequence[Tensor], deltas: Tensor | None) -> _Reading:
        batches = [self._read_batch(masked, mask, deltas) for masked, mask in zip(game.losses, masks, strict=True)]
        return _joined(batches)

    def _read_batch(self, masked: MaskedLoss, mask: Tensor, deltas: Tensor | None) -> _Reading:
        with torch.no_grad():
            return self._read_output(masked, masked.output(mask, deltas))

    def _read_output(self, masked: MaskedLoss, output: Tensor) -> _Reading:
        with torch.no_grad():
            target_output, batch = masked.target_output, masked.batch
            loss = self.loss(output, target_output, batch)
            if not bool(torch.isfinite(loss).all()):
                raise NonFiniteLossError("loss: it is NaN or infinite with nodes ablated; expected finite numbers")
            ce, right = task_loss_and_accuracy(output, batch) if self.labelled else (None, None)
            flipped = _flipped(output, target_output, batch) if self.classes else None
            divergence = kl(output, target_output, batch) if self.with_kl else None
            return _Reading(loss, ce, right, flipped, divergence)


def _joined(batches: Sequence[_Reading]) -> _Reading:
    """The readings of several batches, one after another."""
    fields: dict[str, Any] = {}
    for what in _Reading._fields:
        parts = [getattr(reading, what) for reading in batches]
        fields[what] = None if parts[0] is None else torch.cat(parts)
    return _Reading(**fields)


def _has_classes(masked: MaskedLoss) -> bool:
    return masked.target_output.ndim in (2, 3) and masked.target_output.shape[-1] > 1


def _has_class_labels(batch: Batch) -> bool:
    return batch.labels is not None and not batch.labels.is_floating_point()


def _flipped(output: Tensor, target_output: Tensor, batch: Batch) -> Float[Tensor, " B"]:
    """The share of each example's scored positions where the answer is not the target's."""
    differs = answers(output, batch) != answers(target_output, batch)
    return scored_positions(output, batch).mean_by_example(differs.float(), batch.size)


def _games(
    losses: list[MaskedLoss], gates: Float[Tensor, "*lead n"], scope: Scope, max_ablated: int | None
) -> list[Game]:
    """One game a batch; a single one for all of them under `universal`."""
    of_batches = per_batch(gates, losses)
    if scope == "universal":
        return [Game(losses, of_batches, scope, max_ablated)]
    return [Game([masked], [g], scope, max_ablated) for masked, g in zip(losses, of_batches, strict=True)]


# -- random sources --------------------------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """What random sources show.

    `worst` has the worst draw of each game: over several games they hurt at least as much as any one draw.
    """

    stochastic: Stochastic
    worst: list[Worst]
    score: Score | None
    kl: float | None


def _draw(eye: _Eye, games: Sequence[Game], draws: int, seed: int) -> _Drawn:
    """Uniform sources on [0,1], deltas too, one a game and draw."""
    worst = [_unmet(game) for game in games]
    losses, scores, divergences = [], [], []
    for draw in range(draws):
        entries = [
            game.draw(generator(seed, "audit-draw", draw, index), coins=False) for index, game in enumerate(games)
        ]
        readings = eye.read(games, entries)
        for found, played, reading in zip(worst, entries, readings.games, strict=True):
            found.meet(played, _group_losses(found.game, reading))
        losses.append(readings.loss)
        scores.append(_score(readings))
        divergences.append(readings.mean("kl"))
    values = torch.tensor(losses, dtype=torch.float64)
    summary = Stochastic(float(values.mean()), _p95(values), max(losses), draws)
    score = _mean_score([score for score in scores if score is not None])
    return _Drawn(summary, worst, score, _mean_if_any(divergences))


def _unmet(game: Game) -> Worst:
    """Nothing met yet: whatever comes is worse."""
    ones = game.corner(1.0)
    return Worst(game, ones, torch.full((game.n_groups,), -torch.inf, device=ones.device))


def _group_losses(game: Game, reading: _Reading) -> Float[Tensor, " G"]:
    return reading.loss if game.separable else reading.loss.mean(0, keepdim=True)


# -- the attack ------------------------------------------------------------------------------------------------------


def require_strong(attack: Ascent) -> None:
    """Refuse an attack that is too weak for its outcome to mean anything.

    Raises:
        UserError: it has less than the least budget of an audit.
    """
    reach, floor_reach = attack.steps * attack.step_size, FLOOR.steps * FLOOR.step_size
    if attack.restarts < FLOOR.restarts or attack.steps < FLOOR.steps or reach < floor_reach - 1e-9:
        raise UserError(
            f"audit: got {attack.restarts} restarts of {attack.steps} steps of {attack.step_size}; expected at least "
            f"{FLOOR.restarts} restarts, {FLOOR.steps} steps, and steps × step_size of {floor_reach:g}"
        )


def require_ladder(rungs: Sequence[int], name: str = "ladder") -> None:
    """Refuse budgets that are none.

    Raises:
        UserError: one of them is less than one step.
    """
    if any(rung < 1 for rung in rungs):
        raise UserError(f"{name}: got {list(rungs)}; expected numbers of steps, 1 or more")


@dataclass(frozen=True)
class _Plan:
    """Which attacks follow one another, each starting from what the last one found."""

    first: Ascent
    search: Search
    ladder: tuple[int, ...]
    second_attack: bool
    seed: int

    @classmethod
    def checked(cls, first: Ascent, search: Search, ladder: Sequence[int], second_attack: bool, seed: int) -> _Plan:
        require_strong(first)
        if search not in get_args(Search):
            raise UserError(f"search: got {search!r}; expected one of {', '.join(get_args(Search))}")
        require_ladder(ladder)
        return cls(first, search, tuple(ladder), second_attack, seed)

    @property
    def budgets(self) -> list[int]:
        """Steps of the attacks by gradient, rising."""
        return sorted({*self.ladder} if self.search == "exact" else {*self.ladder, self.first.steps})

    @property
    def second(self) -> Ascent:
        """What the attack of another kind costs, about."""
        return replace(self.first, steps=2 * self.first.steps)

    def cost(self, games: Sequence[Game]) -> int:
        """Passes of all attacks."""
        attacks = [replace(self.first, steps=steps) for steps in self.budgets]
        attacks += [self.second] if self.second_attack else []
        subsets = sum(2 ** n_free(game) for game in games) if _tries_all_subsets(games, self.search) else 0
        return subsets + len(games) * sum(map(passes_of, attacks))


class _Attacked(NamedTuple):
    """What was found in each game; `loss` is over all of them."""

    worst: list[Worst]
    loss: float
    ladder: list[Rung]
    converged: bool | None


def _attack(games: Sequence[Game], starts: list[Worst], plan: _Plan, course: _Course, attacks: Attacks) -> _Attacked:
    """All subsets if asked for, the ladder of budgets, and the second attack, from the worst random draws on."""
    worst = starts
    if _tries_all_subsets(games, plan.search):
        for index, game in enumerate(games):
            with course.check("attack by all subsets", 2 ** n_free(game)):
                worst[index] = _worse(attacks.made(game, partial(exact_attack, game)), worst[index])
    base = _loss_of(worst)
    rungs, later = [], False
    for steps in plan.budgets:
        ascent = replace(plan.first, steps=steps)
        for index, game in enumerate(games):
            rng = generator(plan.seed, "audit-attack", steps, index)
            with course.check(f"attack of {steps} steps, batch {index + 1} of {len(games)}", passes_of(ascent)):
                pool = [worst[index].entries]
                worst[index] = attacks.made(game, partial(attack, game, ascent, rng, pool=pool))
        rungs.append(Rung(steps, _loss_of(worst)))
        if steps <= plan.first.steps and plan.search != "exact":
            base = rungs[-1].loss
        else:
            later = True
    if plan.second_attack:
        later = True
        for index, game in enumerate(games):
            rng = generator(plan.seed, "audit-second-attack", index)
            with course.check(f"second attack, batch {index + 1} of {len(games)}", passes_of(plan.second)):
                again = attacks.made(game, partial(attack_again, game, plan.first, rng))
                worst[index] = _worse(again, worst[index])
    loss = _loss_of(worst)
    converged = loss <= base * (1 + CLIMBS_RELATIVE) + CLIMBS_ABSOLUTE if later else None
    return _Attacked(worst, loss, rungs if plan.ladder else [], converged)


def _tries_all_subsets(games: Sequence[Game], search: Search) -> bool:
    """Exact search refuses large games itself; `auto` leaves it out."""
    return search == "exact" or (search == "auto" and max(map(n_free, games)) <= AUTO_LIMIT)


def _worse(one: Worst, other: Worst) -> Worst:
    """The one that hurts more, group by group."""
    one.meet(other.entries, other.losses)
    return one


def _loss_of(worst: Sequence[Worst]) -> float:
    return _weighted([(_size(found.game), found.loss) for found in worst])


def _not_below_its_starts(loss: float, starts: dict[str, float]) -> float:
    """The attack's loss, which is at least that of every start, but for the order in which floats were added."""
    for name, start in starts.items():
        if loss < start - 1e-5 * (1 + abs(start)):
            raise AssertionError(f"the attack ended at {loss}, below its start {name} at {start}")
    return max(loss, *starts.values())


def _discrete_loss(games: Sequence[Game], worst: Sequence[Worst]) -> float:
    """The worst sources rounded, or a corner where that hurts more."""
    rounded = []
    for game, found in zip(games, worst, strict=True):
        best = _unmet(game)
        best.meet(game.corner(1.0), game.unablated_loss())
        best.play(_rounded(game, found.entries))
        if game.max_ablated is None:
            best.play(game.corner(0.0))
        rounded.append(best)
    return _loss_of(rounded)


def _rounded(game: Game, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, "*lead E"]:
    """A source of zeros and ones; within a budget, the most ablated nodes stay ablated."""
    rounded = entries.round()
    if game.max_ablated is not None:
        source = game.source(entries)
        rank = source.argsort(dim=-1, stable=True).argsort(dim=-1)
        within = (source.round() == 1) | (rank >= game.max_ablated)
        rounded = torch.cat([within.to(entries.dtype), game.delta_source(rounded)], dim=-1)
    return rounded.masked_fill(~game.free, 1)


def _n_ablated(games: Sequence[Game], worst: Sequence[Worst]) -> float:
    """Not-kept nodes with `s < 0.5`, on average over what has a source of its own."""
    counts = []
    for game, found in zip(games, worst, strict=True):
        ablated = game.source((found.entries < 0.5) & game.free)
        counts.append((_size(game), float(ablated.sum(-1).double().mean())))
    return _weighted(counts)


# -- does the weakness transfer --------------------------------------------------------------------------------------


class _Transfer(NamedTuple):
    """The worst sources on the batches that they were not found on, and the one that hurts all data most."""

    held_out_loss: float | None
    entries: Float[Tensor, "*lead E"]


def _transfer(games: Sequence[Game], worst: Sequence[Worst]) -> _Transfer:
    """Score every batch's worst source on every batch. Structured weakness transfers, noise does not."""
    shapes = {found.entries.shape for found in worst}
    if len(games) == 1 or games[0].separable or len(shapes) > 1:
        return _Transfer(None, max(worst, key=lambda found: found.loss).entries)
    sizes = torch.tensor([_size(game) for game in games], dtype=torch.float64)
    with torch.no_grad():
        losses = torch.tensor(
            [[float(game.loss(game.project(found.entries))) for game in games] for found in worst], dtype=torch.float64
        )
    pairs = torch.outer(sizes, sizes).fill_diagonal_(0)
    return _Transfer(float((losses * pairs).sum() / pairs.sum()), worst[int((losses @ sizes).argmax())].entries)


# -- random circuits -------------------------------------------------------------------------------------------------


def _random_circuits(
    eye: _Eye, games: Sequence[Game], model: DecomposedModel, count: int, seed: int, attacks: Attacks
) -> RandomCircuits | None:
    """Circuits that keep as many nodes of every set of sites, under complete ablation and a brief attack."""
    gates = [g for game in games for g in game.gates]
    groups = interchangeable_nodes(gates, model)
    if count == 0 or not groups:
        return None
    complete, adversarial = 0.0, 0.0
    for circuit in range(count):
        order = permuted_within(groups, model.n_nodes, generator(seed, "audit-random-circuit", circuit))
        others = reordered(games, order)
        complete += eye.read(others, [torch.zeros_like(game.corner(0.0)) for game in others]).loss / count
        worst = []
        for index, game in enumerate(others):
            with part(circuit * len(others) + index, count * len(others)):
                rng = generator(seed, "audit-random-attack", circuit, index)
                worst.append(attacks.made(game, partial(attack, game, BRIEF, rng)))
        adversarial += _loss_of(worst) / count
    return RandomCircuits(count, _n_kept(gates), complete, adversarial)


# -- the task --------------------------------------------------------------------------------------------------------


def _task_scores(
    unablated: _Readings, complete: _Readings, drawn: _Drawn, under_attack: _Readings
) -> TaskScores | None:
    scores = _score(unablated), _score(complete), drawn.score, _score(under_attack)
    return None if None in scores else TaskScores(*scores)  # type: ignore[arg-type]


def _score(readings: _Readings) -> Score | None:
    ce, accuracy = readings.mean("ce"), readings.mean("accuracy")
    return None if ce is None or accuracy is None else Score(ce, accuracy)


def _mean_score(scores: Sequence[Score]) -> Score | None:
    if not scores:
        return None
    n = len(scores)
    return Score(sum(score.ce for score in scores) / n, sum(score.accuracy for score in scores) / n)


def _kl(complete: _Readings, drawn: _Drawn, under_attack: _Readings) -> KL | None:
    values = complete.mean("kl"), drawn.kl, under_attack.mean("kl")
    return None if None in values else KL(*values)  # type: ignore[arg-type]


def _mean_if_any(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# -- small change ----------------------------------------------------------------------------------------------------


def _weighted(sized: Sequence[tuple[int, float]]) -> float:
    """The mean of values by how many examples each is of."""
    return sum(size * value for size, value in sized) / sum(size for size, _ in sized)


def _size(game: Game) -> int:
    return sum(masked.size for masked in game.losses)


def _p95(values: Float[Tensor, " k"]) -> float:
    return float(torch.quantile(values.double(), 0.95))


def _n_kept(gates: Tensor | Sequence[Tensor]) -> int:
    """Nodes kept anywhere."""
    stacked = [gates] if isinstance(gates, Tensor) else gates
    return int(torch.cat([g.reshape(-1, g.shape[-1]) for g in stacked]).any(0).sum())


def _split(game: Game, entries: Tensor) -> tuple[Tensor, Tensor]:
    return game.source(entries).cpu().clone(), game.delta_source(entries).cpu().clone()


def _below(value: float | None, bound: float | None) -> bool | None:
    return None if value is None or bound is None else value < bound
