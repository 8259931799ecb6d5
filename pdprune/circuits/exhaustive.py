"""Small graphs: the loss of every circuit at once.

With n nodes there are 2ⁿ binary masks. Their losses are computed once; the worst case of a circuit is then a maximum
over the masks that leave it alone, its supersets, found for all circuits together bit by bit (method.md, section 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pdprune.adversary.attack import EXACT_LIMIT
from pdprune.adversary.game import Scope
from pdprune.adversary.objective import MaskedLoss
from pdprune.circuits.schemes import Draws, SchemeName
from pdprune.circuits.selection import MARGIN, Selected, say_unreachable
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.progress import moved, part

AUTO_LIMIT = 12
"""`search="auto"` is exact up to this many nodes."""
MASKS_A_PART = 512
"""How many masks are scored between two words on how far it has come."""


def can_be_exhaustive(losses: Sequence[MaskedLoss], scheme: SchemeName, scope: Scope, draws: Draws) -> bool:
    """Whether `search="auto"` tries every circuit."""
    model = losses[0].model
    small = model.n_nodes <= AUTO_LIMIT and model.n_nodes + int(model.delta_sites.sum()) <= EXACT_LIMIT
    exactly_known = scheme != "stochastic" or draws.distribution == "bernoulli"
    return small and scope in ("batch", "universal", "example") and exactly_known


def select_exhaustively(
    losses: Sequence[MaskedLoss],
    *,
    scheme: SchemeName,
    scope: Scope,
    draws: Draws,
    max_ablated: int | None,
    target_loss: float | None,
    target_nodes: int | None,
    coefficient: float | None,
) -> Selected:
    """The best circuit of all, by scoring all of them.

    The smallest within the target loss, the best of a size, or the one of least `loss + coefficient · nodes / n`; among
    equals the one of least loss. Stochastic sources are taken as Bernoulli(p), whose mean is known exactly.

    Raises:
        UserError: with more than `EXACT_LIMIT` nodes and deltas, or a scope in which positions choose for themselves.
    """
    model = losses[0].model
    free = model.n_nodes + int(model.delta_sites.sum())
    if free > EXACT_LIMIT:
        raise UserError(
            f"search 'exact': the graph has {free} nodes and deltas; expected at most {EXACT_LIMIT}: use 'gradient'"
        )
    if scope not in ("batch", "universal", "example"):
        raise UserError(f"search 'exact': scope {scope!r} has too many free entries; use 'gradient'")
    loss = _circuit_losses(losses, scheme, scope, draws, max_ablated)
    size = _sizes(model.n_nodes)
    match target_loss, target_nodes, coefficient:
        case float() | int(), None, None:
            return _within(loss, size, target_loss, scheme)
        case None, int(), None:
            return _selected(loss, _least(loss, size == target_nodes), None)
        case _:
            assert coefficient is not None
            return _selected(loss, int((loss + coefficient * size / model.n_nodes).argmin()), None)


def _within(loss: Tensor, size: Tensor, target_loss: float, scheme: SchemeName) -> Selected:
    everything = len(loss) - 1
    if scheme == "adversarial" and float(loss[everything]) > target_loss:
        say_unreachable(target_loss, float(loss[everything]))
        return _selected(loss, everything, False)
    threshold = max(MARGIN * target_loss, min(float(loss[everything]), target_loss))
    good = loss <= threshold
    if not bool(good.any()):
        return _selected(loss, everything, False)
    return _selected(loss, _least(loss, good & (size == size[good].min())), True)


def _least(loss: Tensor, among: Tensor) -> int:
    return int(loss.masked_fill(~among, torch.inf).argmin())


def _selected(loss: Tensor, circuit: int, reached: bool | None) -> Selected:
    n = (len(loss) - 1).bit_length()
    keep = torch.tensor([bool(circuit >> node & 1) for node in range(n)])
    return Selected(keep, float(loss[circuit]), reached)


def _circuit_losses(
    losses: Sequence[MaskedLoss], scheme: SchemeName, scope: Scope, draws: Draws, max_ablated: int | None
) -> Float[Tensor, " circuits"]:
    """The loss of every circuit under a scheme; bit i of a circuit's number says whether node i is kept."""
    total = sum(loss.size for loss in losses)
    by_batch = []
    for index, loss in enumerate(losses):
        with part(index, len(losses)):
            by_batch.append(_mask_losses(loss, scheme, per_example=scope == "example"))
    weights = [loss.size / total for loss in losses]
    if scope == "universal":
        by_batch = [torch.stack([w * table for w, table in zip(weights, by_batch, strict=True)]).sum(0)]
        weights = [1.0]
    n = losses[0].model.n_nodes
    scored = torch.zeros(2**n, dtype=torch.float64)
    for weight, by_deltas in zip(weights, by_batch, strict=True):
        table = by_deltas.amax(0) if scheme != "stochastic" else _mean_over_deltas(by_deltas, draws.p)
        if scheme == "adversarial" and max_ablated is not None:
            table = table.masked_fill((n - _sizes(n) > max_ablated)[:, None], -torch.inf)
        scored += weight * _over_supersets(table, scheme, draws.p).mean(-1)
    return scored


def _mask_losses(loss: MaskedLoss, scheme: SchemeName, *, per_example: bool) -> Float[Tensor, "deltas masks G"]:
    """The loss under every binary mask, for every pattern of deltas; complete ablation has just the one without any."""
    model = loss.model
    device = model.delta_sites.device
    sites = model.delta_sites.nonzero().squeeze(-1).tolist() if scheme != "complete" else []
    rows = []
    with torch.no_grad():
        for pattern, deltas in enumerate(itertools.product((0.0, 1.0), repeat=len(sites))):
            delta_mask = torch.ones(model.n_sites, device=device)
            delta_mask[model.delta_sites] = 0.0
            delta_mask[sites] = torch.tensor(deltas, device=device)
            masks = torch.stack([_mask(number, model.n_nodes, device) for number in range(2**model.n_nodes)])
            by_part = []
            for number, some in enumerate(masks.split(MASKS_A_PART)):
                moved((pattern + number * MASKS_A_PART / len(masks)) / 2 ** len(sites))
                same = delta_mask.expand(len(some), -1)
                by_part.append(loss.per_example_of_each(some, same, at_once=loss.at_once(exhaustive=True)))
            values = torch.cat(by_part).double().cpu()
            if not bool(torch.isfinite(values).all()):
                raise NonFiniteLossError("loss: it is NaN or infinite with nodes ablated; expected finite numbers")
            rows.append(values if per_example else values.mean(-1, keepdim=True))
    return torch.stack(rows)


def _mean_over_deltas(table: Tensor, p: float) -> Tensor:
    """The mean when each delta is left alone with chance p; the first axis counts their patterns in binary."""
    while len(table) > 1:
        half = len(table) // 2
        table = (1 - p) * table[:half] + p * table[half:]
    return table[0]


def _over_supersets(table: Float[Tensor, "masks G"], scheme: SchemeName, p: float) -> Float[Tensor, "masks G"]:
    """For each circuit the maximum, or the mean, over the masks that keep at least it."""
    if scheme == "complete":
        return table
    table = table.clone()
    number = torch.arange(len(table))
    for node in range((len(table) - 1).bit_length()):
        without = number[(number >> node & 1) == 0]
        kept = table[without + (1 << node)]
        table[without] = torch.maximum(table[without], kept) if scheme == "adversarial" else (
            (1 - p) * table[without] + p * kept
        )  # fmt: skip
    return table


def _mask(number: int, n: int, device: torch.device) -> Float[Tensor, " n"]:
    return torch.tensor([float(number >> node & 1) for node in range(n)], device=device)


def _sizes(n: int) -> Int[Tensor, " circuits"]:
    return torch.tensor([number.bit_count() for number in range(2**n)])
