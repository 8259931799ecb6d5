"""From gates to a circuit: rank the nodes, bisect on how many are kept, then drop what is not needed.

Without an adversary the loss need not fall with the number of nodes: then sizes are tried from below rather than
bisected, what cancels is dropped in pairs, and a small circuit is also grown from nothing.

All on the select split, under the scheme that the gates were learned with (method.md, section 5).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.circuits.schemes import SchemeName, Scorer, SmoothScorer
from pdprune.errors import require_at_least
from pdprune.progress import part, span

log = logging.getLogger(__name__)

MARGIN = 0.9
"""Selection aims at this share of the target loss, since its data and its attack are not the audit's."""

CONFIRMATIONS = 4
"""Attacks, each from other starts, that the chosen circuit must withstand."""

SCANNED_SIZES = 128
"""Sizes that are tried first where the loss need not fall with size."""

SWAP_GAIN = 0.01
"""A swap must lower the loss by this share of it; among nodes that do not matter one would swap for ever."""

GROWN_AT_MOST = 16
"""Nodes of a circuit that is grown from nothing."""
GROWN_FROM = 3
"""Nodes that are tried each time a circuit grows by one."""
SWAPS_A_SIZE = 40
"""Swaps that are tried at each size of a growing circuit."""


@dataclass(frozen=True)
class Selection:
    """How gates become a circuit.

    Attributes:
        drop_scores: how many circuits may be scored in dropping nodes one by one; None is enough for all of them up to
            400 kept nodes, and 400 above.
        swap_scores: how many may be scored in swapping kept nodes for others, where a number of nodes is asked for;
            and in growing a circuit from nothing.
    """

    drop_scores: int | None = None
    swap_scores: int = 200

    def __post_init__(self) -> None:
        require_at_least(0, "selection: ", drop_scores=self.drop_scores, swap_scores=self.swap_scores)

    def budget(self, n_kept: int) -> int:
        return self.drop_scores if self.drop_scores is not None else min(2 * n_kept, 800)


@dataclass(frozen=True)
class Selected:
    """A chosen circuit.

    Attributes:
        keep: `[n]`, or `[T, n]`.
        loss: its loss on the select split, under the scheme.
        reached: whether that is within the target loss; None where none was asked for.
    """

    keep: Bool[Tensor, "*lead n"]
    loss: float
    reached: bool | None


Report = Callable[[str, int, int], None]
"""Told `(what is being done, circuits scored so far, nodes kept now)`."""


def silent(doing: str, scored: int, kept: int) -> None:
    """The report of who wants none."""


def select_for_loss(
    ranking: Float[Tensor, "*lead n"],
    scorer: Scorer,
    target_loss: float,
    *,
    scheme: SchemeName,
    selection: Selection,
    report: Report = silent,
) -> Selected:
    """The smallest circuit found whose loss stays within the target.

    Args:
        ranking: the higher, the sooner kept.
        scorer: scores circuits on the select split.
        target_loss: in the loss's unit.
        scheme: an unreachable target ends the search under `adversarial`: adding nodes cannot help there. Under the
            other schemes a smaller circuit may beat the model, so that they search anyway.
        selection: how much dropping is tried.
        report: told of progress.
    """
    everything = torch.ones_like(ranking)
    floor = scorer.score(everything)
    if floor > target_loss and scheme == "adversarial":
        say_unreachable(target_loss, floor)
        return Selected(everything.bool(), floor, False)
    threshold = MARGIN * target_loss if floor <= MARGIN * target_loss else target_loss
    counter = _Counter(scorer, threshold, report, expected=_most_scores(ranking.numel(), scheme, selection))
    if scheme == "adversarial":
        keep = _bisect(ranking, counter)
        keep = _drop(keep, ranking, counter, selection.budget(int(keep.sum())))
    else:
        keep = _scan(ranking, counter)
        keep = _drop_singles_and_pairs(keep, ranking, counter, selection.budget(int(keep.sum())))
        grown = _grow(keep, cast(SmoothScorer, scorer), counter, selection.swap_scores)
        if grown is not None:
            keep = _drop_singles_and_pairs(grown, ranking, counter, selection.budget(int(grown.sum())))
    attempts = CONFIRMATIONS if scheme == "adversarial" else 1
    with span(1.0, 1.0):
        keep, loss = _confirm(keep, ranking, scorer, threshold, attempts)
    return Selected(keep.bool(), loss, loss <= target_loss)


def say_unreachable(target_loss: float, floor: float) -> None:
    """One line for a target below the worst case of keeping everything."""
    log.warning(
        "target_loss %.4g cannot be reached: with every node kept the worst case is already %.4g; "
        "all nodes are returned",
        target_loss,
        floor,
    )


def select_for_size(
    ranking: Float[Tensor, "*lead n"],
    scorer: Scorer,
    target_nodes: int,
    *,
    selection: Selection | None = None,
    report: Report = silent,
) -> Selected:
    """The highest-ranked `target_nodes` nodes (or node positions), some of them swapped where that lowers the loss."""
    keep = top_mask(ranking, target_nodes)
    keep, loss = _Swaps(scorer, (selection or Selection()).swap_scores, report).improve(keep, ranking)
    return Selected(keep.bool(), loss, None)


def select_open_gates(gates: Float[Tensor, "*lead n"], scorer: Scorer) -> Selected:
    """The nodes whose gates are more open than shut, for a fixed coefficient."""
    keep = (gates > 0.5).float()
    return Selected(keep.bool(), scorer.score(keep), None)


def _most_scores(n: int, scheme: SchemeName, selection: Selection) -> int:
    """Circuits that are scored at most, about, for a loss: what progress is measured by."""
    if scheme == "adversarial":
        return n.bit_length() + selection.budget(n)
    return min(n, SCANNED_SIZES) + selection.budget(n) + min(n, GROWN_AT_MOST) * GROWN_FROM + selection.swap_scores


@dataclass
class _Counter:
    """Asks whether a circuit is good enough, counting, of about so many as are expected."""

    scorer: Scorer
    threshold: float
    report: Report
    expected: int
    scored: int = 0

    def good(self, keep: Float[Tensor, "*lead n"], doing: str) -> bool:
        self.scored += 1
        self.report(doing, self.scored, int(keep.sum()))
        with part(self.scored - 1, max(self.scored, self.expected)):
            return self.scorer.score(keep, stop_above=self.threshold) <= self.threshold


def _bisect(ranking: Float[Tensor, "*lead n"], counter: _Counter) -> Float[Tensor, "*lead n"]:
    """The fewest top-ranked nodes that are good enough; all of them if none of the sizes tried is.

    The binary worst case never rises when a node is added, so that adversarially this finds the least such number.
    """
    low, high = -1, ranking.numel()
    while high - low > 1:
        middle = (low + high) // 2
        if counter.good(top_mask(ranking, middle), "bisecting"):
            high = middle
        else:
            low = middle
    return top_mask(ranking, high)


def _confirm(
    keep: Float[Tensor, "*lead n"],
    ranking: Float[Tensor, "*lead n"],
    scorer: Scorer,
    threshold: float,
    attempts: int,
) -> tuple[Float[Tensor, "*lead n"], float]:
    """Score the choice some more times and take nodes back while it fails.

    The adversarial scorer restarts elsewhere each time: of many circuits that were each attacked once, the smallest
    that passed is likely one whose attack was unlucky.
    """
    taken_back = 1
    while (loss := _highest(keep, scorer, threshold, attempts)) > threshold and not bool(keep.all()):
        missing = _missing(ranking, keep)
        keep = keep.clone()
        keep.view(-1)[missing[:taken_back]] = 1
        taken_back *= 2
    return keep, loss


def _highest(keep: Float[Tensor, "*lead n"], scorer: Scorer, threshold: float, attempts: int) -> float:
    """The highest of several scores, or the first one above the threshold."""
    loss = -math.inf
    for _ in range(attempts):
        loss = max(loss, scorer.score(keep, stop_above=threshold))
        if loss > threshold:
            break
    return loss


def _scan(ranking: Float[Tensor, "*lead n"], counter: _Counter) -> Float[Tensor, "*lead n"]:
    """The fewest top-ranked nodes that are good enough, where more nodes may be worse: sizes are tried from below."""
    n = ranking.numel()
    sizes = sorted({round(n * step / SCANNED_SIZES) for step in range(SCANNED_SIZES + 1)})
    for below, size in itertools.pairwise([-1, *sizes]):
        if counter.good(top_mask(ranking, size), "scanning"):
            between = range(below + 1, size)
            return next(
                (top for k in between if counter.good(top := top_mask(ranking, k), "scanning")), top_mask(ranking, size)
            )
    return torch.ones_like(ranking)


def _drop(
    keep: Float[Tensor, "*lead n"], ranking: Float[Tensor, "*lead n"], counter: _Counter, budget: int
) -> Float[Tensor, "*lead n"]:
    """Drop kept nodes, the lowest-ranked first, while the circuit stays good enough.

    Several are tried together and halved where that fails, so that one pass over all of them costs little. A node that
    cannot go now cannot go later either (the binary worst case never falls when a node goes), so one pass will do.
    """
    order = [i for i in ranking.flatten().argsort(stable=True).tolist() if keep.flatten()[i] > 0]
    waiting = _runs(order)
    end = counter.scored + budget
    while waiting and counter.scored < end:
        together = waiting.pop()
        candidate = keep.clone()
        candidate.view(-1)[together] = 0
        if counter.good(candidate, "dropping"):
            keep = candidate
        elif len(together) > 1:
            half = len(together) // 2
            waiting += [together[half:], together[:half]]
    return keep


def _drop_singles_and_pairs(
    keep: Float[Tensor, "*lead n"], ranking: Float[Tensor, "*lead n"], counter: _Counter, budget: int
) -> Float[Tensor, "*lead n"]:
    """Drop single nodes and, where none can go, two that cancel: without an adversary, one drop may allow another."""
    end = counter.scored + budget
    dropped = True
    while dropped and counter.scored < end:
        before = int(keep.sum())
        keep = _drop(keep, ranking, counter, end - counter.scored)
        dropped = int(keep.sum()) < before
        if dropped:
            continue
        order = [i for i in ranking.flatten().argsort(stable=True).tolist() if keep.flatten()[i] > 0]
        for pair in itertools.combinations(order, 2):
            if counter.scored >= end:
                break
            candidate = keep.clone()
            candidate.view(-1)[list(pair)] = 0
            if counter.good(candidate, "dropping pairs"):
                keep, dropped = candidate, True
                break
    return keep


@dataclass
class _Swaps:
    """Swaps kept nodes for others while that lowers the loss, near the boundary of the ranking first."""

    scorer: Scorer
    budget: int
    report: Report
    scored: int = 0

    def improve(
        self, keep: Float[Tensor, "*lead n"], ranking: Float[Tensor, "*lead n"]
    ) -> tuple[Float[Tensor, "*lead n"], float]:
        loss = self.scorer.score(keep)
        while (better := self._better(keep, loss, ranking)) is not None:
            keep, loss = better
        return keep, loss

    def _better(self, keep: Tensor, loss: float, ranking: Tensor) -> tuple[Tensor, float] | None:
        wanted = loss - SWAP_GAIN * abs(loss)
        others = _missing(ranking, keep)
        kept = _missing(-ranking, 1 - keep)
        for out, into in _nearest_first(kept, others):
            if self.scored >= self.budget:
                return None
            candidate = keep.clone()
            candidate.view(-1)[[out, into]] = candidate.view(-1)[[into, out]]
            self.scored += 1
            self.report("swapping", self.scored, int(keep.sum()))
            with part(self.scored - 1, self.budget):
                value = self.scorer.score(candidate, stop_above=wanted)
            if value < wanted:
                return candidate, value
        return None


def _nearest_first(kept: Sequence[int], others: Sequence[int]) -> Iterator[tuple[int, int]]:
    """All pairs, those near the heads of both lists first."""
    for distance in range(len(kept) + len(others) - 1):
        for i in range(max(0, distance - len(others) + 1), min(distance + 1, len(kept))):
            yield kept[i], others[distance - i]


def _grow(
    found: Float[Tensor, "*lead n"], scorer: SmoothScorer, counter: _Counter, budget: int
) -> Float[Tensor, "*lead n"] | None:
    """A circuit smaller than `found`, if adding one node after another leads to one, from nothing.

    Each time the few nodes that promise most are tried, the best of them stays, and nodes are swapped while `budget`
    swaps last.
    Gates have to come down together where many nodes cancel, since any imbalance hurts, and may get stuck on the way.
    From below, what cancels never comes in.
    """
    keep, left = torch.zeros_like(found), budget
    for _ in range(min(int(found.sum()), GROWN_AT_MOST)):
        if counter.good(keep, "growing"):
            return keep
        candidates = []
        for node in _missing(scorer.promise(keep), keep)[:GROWN_FROM]:
            candidates.append(keep.clone())
            candidates[-1].view(-1)[node] = 1
        keep = min(candidates, key=scorer.score)
        swaps = _Swaps(scorer, min(SWAPS_A_SIZE, left), silent)
        keep, _ = swaps.improve(keep, scorer.promise(keep))
        left -= swaps.scored
        counter.scored += len(candidates) + swaps.scored
    return None


def _runs(order: Sequence[int], size: int = 8) -> list[list[int]]:
    """Runs of nodes to be tried together, as a stack: the first to try last."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)][::-1]


def _missing(ranking: Float[Tensor, "*lead n"], keep: Float[Tensor, "*lead n"]) -> list[int]:
    """The nodes that are not kept, the highest-ranked first."""
    order = ranking.flatten().argsort(descending=True, stable=True)
    return [int(node) for node in order[keep.flatten()[order] == 0]]


def top_mask(ranking: Float[Tensor, "*lead n"], count: int) -> Float[Tensor, "*lead n"]:
    """The mask of the `count` highest nodes (or node positions); among equals, of the first."""
    order = ranking.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(ranking.numel(), device=ranking.device)
    keep[order[:count]] = 1
    return keep.reshape(ranking.shape)
