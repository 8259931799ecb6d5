"""What the adversary may choose: the sources open to it, what one of them is shared by, and the loss they lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.adversary.objective import MaskedLoss
from pdprune.decomposition.model import Narrowed
from pdprune.errors import NonFiniteLossError, UserError

Scope = Literal["batch", "universal", "position", "example", "example_position"]


class Game:
    """One circuit on some data, seen by the adversary: sources in, loss out.

    Entries are the sources of the nodes and, behind them, of the sites' deltas: `[*lead, E]`, `E = n + n_sites`, with
    the leading dimensions that the scope allows. Groups are what the adversary may choose for separately: the examples
    in the scopes `example` and `example_position`, and everything together otherwise. G is their number.

    Where several ranks share the batch, groups are this rank's examples; or else losses, gradients and what is free are
    those of the whole batch, the same on all ranks.

    Args:
        losses: the batches that one source is for: one of them, or all of a data set under `universal`.
        gates: `[n]`, or `[T, n]`, `[B, T, n]`, of each batch; 1 is kept.
        scope: what one source is shared by (method.md, section 4).
        max_ablated: how many nodes the adversary may ablate, summed over parts; None is any number. With it the
            corner `s = 0` is projected, and nothing is claimed of complete ablation.
    """

    def __init__(
        self,
        losses: Sequence[MaskedLoss],
        gates: Sequence[Float[Tensor, "*lead n"]],
        scope: Scope = "batch",
        max_ablated: int | None = None,
    ) -> None:
        if scope not in get_args(Scope):
            raise UserError(f"scope: got {scope!r}; expected one of {', '.join(get_args(Scope))}")
        if scope not in ("batch", "universal") and len(losses) > 1:
            raise UserError(f"scope {scope!r}: one source cannot serve several batches; expected one batch at a time")
        self.losses = losses
        self.gates = gates
        self.scope = scope
        self.max_ablated = max_ablated
        model = losses[0].model
        self.n_nodes = model.n_nodes
        self.lead = _lead_of(scope, losses[0])
        self.separable = scope in ("example", "example_position")
        self.n_groups = losses[0].size if self.separable else 1
        self.ranks = losses[0].ranks
        self.free = self._free(model.delta_sites)

    def _free(self, delta_sites: Bool[Tensor, " s"]) -> Bool[Tensor, "*lead E"]:
        """Which entries the adversary may move: those of nodes not wholly kept, and of deltas that are not zero."""
        nodes = torch.stack([_reduce_to(gates < 1, self.lead) for gates in self.gates]).any(0)
        if not self.separable:
            nodes = self.ranks.any(nodes)
        deltas = delta_sites.to(nodes.device).expand(*self.lead, -1)
        return torch.cat([nodes, deltas], dim=-1)

    @property
    def has_choices(self) -> bool:
        """Whether there is anything, on any rank, that the adversary may move."""
        return self._anywhere(self.free.any())

    def source(self, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, "*lead n"]:
        return entries[..., : self.n_nodes]

    def delta_source(self, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, "*lead s"]:
        return entries[..., self.n_nodes :]

    def loss(self, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, " G"]:
        """Each group's loss when the adversary plays `entries`."""
        masks = (gates + (1 - gates) * self.source(entries) for gates in self.gates)
        deltas = self.delta_source(entries)
        return self._by_group(
            loss.per_example(mask, deltas, narrowed=self._narrowed)
            for loss, mask in zip(self.losses, masks, strict=True)
        )

    def loss_of_each(self, sources: Sequence[Float[Tensor, "*lead E"]]) -> Sequence[Float[Tensor, " G"]]:
        """Each group's loss under each of several sources, all run together; `at_once` says how many to give."""
        return [self.loss(sources[0])] if len(sources) == 1 else [*self._stacked_loss(torch.stack([*sources]))]

    def _stacked_loss(self, entries: Float[Tensor, "R E"]) -> Float[Tensor, "R one"]:
        deltas = self.delta_source(entries)
        total = sum(loss.whole_size for loss in self.losses)
        mean = entries.new_zeros(len(entries))
        for loss, gates in zip(self.losses, self.gates, strict=True):
            masks = gates + (1 - gates) * self.source(entries)
            per_example = loss.per_example_of_each(masks, deltas, self._narrowed, at_once=len(masks))
            mean = mean + self.ranks.mean(per_example.mean(-1), loss.size) * (loss.whole_size / total)
        self._require_finite(mean)
        return mean[:, None]

    def unablated_loss(self) -> Float[Tensor, " G"]:
        """Each group's loss when the adversary leaves everything alone, `loss(corner(1.0))`, without a run for it."""
        return self._by_group(loss.unablated() for loss in self.losses)

    def _by_group(self, by_example: Iterable[Float[Tensor, " B"]]) -> Float[Tensor, " G"]:
        """From the losses of examples, batch by batch, to those of groups."""
        total = sum(loss.whole_size for loss in self.losses)
        groups = []
        for loss, per_example in zip(self.losses, by_example, strict=True):
            share = loss.whole_size / total
            groups.append(per_example if self.separable else loss.mean(per_example).reshape(1) * share)
            self._require_finite(groups[-1])
        return groups[0] if len(groups) == 1 else torch.stack(groups).sum(0)

    def _require_finite(self, losses: Tensor) -> None:
        """NaN compares false with everything: unnoticed, it would look like a source that does not hurt."""
        if self._anywhere(~torch.isfinite(losses.detach()).all()):
            raise NonFiniteLossError("loss: it is NaN or infinite with nodes ablated; expected finite numbers")

    def everywhere(self, flag: bool) -> bool:
        """Whether something is so on all ranks, where each has groups of its own."""
        return not self._anywhere(torch.tensor(not flag, device=self.free.device)) if self.separable else flag

    def at_once(self, *, exhaustive: bool = False) -> int:
        """How many sources should be played together; only in exhaustive search on a CPU is that more than one."""
        if self.lead or any(gates.ndim > 1 for gates in self.gates):
            return 1
        return min(loss.at_once(exhaustive=exhaustive) for loss in self.losses)

    @cached_property
    def _narrowed(self) -> Narrowed | None:
        """The sites without what is kept, while gates stand still: they would be multiplied by 0 at every step."""
        if self.lead or any(gates.ndim > 1 or gates.requires_grad for gates in self.gates):
            return None
        return self.losses[0].model.narrowed_to(self.source(self.free), self.losses[0].reference)

    def mean_loss(self, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, ""]:
        """The loss of the whole batch when the adversary plays `entries`."""
        groups = self.loss(entries)
        return self.losses[0].mean(groups) if self.separable else groups.mean()

    def loss_and_gradient(
        self, entries: Float[Tensor, "*lead E"]
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, "*lead E"]]:
        """The loss, and how it changes with every entry; groups do not touch one another."""
        return self._climbable(self.loss, entries)

    def loss_and_gradient_of_each(
        self, sources: Sequence[Float[Tensor, "*lead E"]]
    ) -> list[tuple[Float[Tensor, " G"], Float[Tensor, "*lead E"]]]:
        """The same for several sources, all run together."""
        if len(sources) == 1:
            return [self.loss_and_gradient(sources[0])]
        losses, gradients = self._climbable(self._stacked_loss, torch.stack([*sources]))
        return list(zip(losses, gradients, strict=True))

    def _climbable(self, evaluate: Callable[[Tensor], Tensor], entries: Tensor) -> tuple[Tensor, Tensor]:
        leaf = entries.detach().requires_grad_()
        with torch.enable_grad():
            loss = evaluate(leaf)
            scaled = self.losses[0].scale.scaled(loss.sum())
            (gradient,) = torch.autograd.grad(scaled, leaf, allow_unused=True, materialize_grads=True)
        return loss.detach(), self.gradient(gradient).masked_fill(~self.free, 0)

    def gradient(self, own: Float[Tensor, "*lead E"]) -> Float[Tensor, "*lead E"]:
        """The gradient on entries, from what this rank's backward pass from a scaled loss has left on them."""
        return self.losses[0].scale.unscaled(own if self.separable else self.ranks.mean(own))

    def project(self, entries: Float[Tensor, "*lead E"]) -> Float[Tensor, "*lead E"]:
        """The nearest allowed source: in the box, 1 where nothing is free, within the budget of ablated nodes."""
        boxed = entries.clamp(0, 1).masked_fill(~self.free, 1)
        if self.max_ablated is None:
            return boxed
        source = _ablate_at_most(self.source(entries).masked_fill(~self.source(self.free), 1), self.max_ablated)
        return torch.cat([source, self.delta_source(boxed)], dim=-1)

    def corner(self, value: float) -> Float[Tensor, "*lead E"]:
        return self.project(torch.full(self.free.shape, value, device=self.free.device))

    def draw(self, rng: torch.Generator, *, coins: bool) -> Float[Tensor, "*lead E"]:
        """A random source: uniform on [0,1], or fair coins."""
        uniform = self.uniform(rng).to(self.free.device)
        return self.project(uniform.round() if coins else uniform)

    def uniform(self, rng: torch.Generator) -> Float[Tensor, "*lead E"]:
        """Numbers uniform on [0,1], an entry each; examples that ranks share have those that one process would draw."""
        if not self.separable:
            return torch.rand(self.free.shape, generator=rng)
        whole = (self.losses[0].whole_size, *self.free.shape[1:])
        drawn: Tensor = self.ranks.share(torch.rand(whole, generator=rng))
        return drawn

    def _anywhere(self, flag: Bool[Tensor, ""]) -> bool:
        """Whether a flag is up on some rank; where all ranks have the same groups it is the same on all of them."""
        return bool(self.ranks.any(flag) if self.separable else flag)

    def grouped(self, entries: Tensor) -> Tensor:
        """`[G, X]`: all entries of a group in one row."""
        return entries.reshape(self.n_groups, -1)


def _lead_of(scope: Scope, loss: MaskedLoss) -> tuple[int, ...]:
    """The leading dimensions of a source (method.md, section 4)."""
    if scope in ("batch", "universal"):
        return ()
    lead = loss.leading_shape
    if len(lead) == 1:
        if scope == "position":
            raise UserError("scope 'position': the sites' inputs have no position dimension; expected [B, T, d]")
        return lead
    if len(lead) != 2:
        raise UserError(f"scope {scope!r}: the sites' inputs have leading shape {list(lead)}; expected [B] or [B, T]")
    batch, positions = lead
    return {"position": (positions,), "example": (batch, 1), "example_position": (batch, positions)}[scope]


def _reduce_to(free: Bool[Tensor, "*full n"], lead: tuple[int, ...]) -> Bool[Tensor, "*lead n"]:
    """True where an entry that is shared as `lead` says has an effect anywhere."""
    padded = free.reshape((1,) * (3 - free.ndim) + tuple(free.shape))
    target = (1,) * (2 - len(lead)) + lead
    if len(lead) == 1 and free.ndim == 2 and free.shape[0] not in (1, lead[0]):
        raise UserError(f"keep: its shape {list(free.shape)} does not fit sources of shape {[*lead, free.shape[-1]]}")
    for dim, size in enumerate(target):
        if size == 1:
            padded = padded.any(dim, keepdim=True)
    return padded.expand(*target, -1).reshape(*lead, free.shape[-1])


def _ablate_at_most(source: Float[Tensor, "*lead n"], budget: int) -> Float[Tensor, "*lead n"]:
    """Project onto `{s ∈ [0,1]ⁿ : Σ(1 − s) ≤ budget}` by bisection on the shift, as for a capped simplex."""
    within = (1 - source.clamp(0, 1)).sum(-1, keepdim=True) <= budget
    if bool(within.all()):
        return source.clamp(0, 1)
    low = torch.zeros(*source.shape[:-1], 1, device=source.device)
    high = (1 - source.min(dim=-1, keepdim=True).values).clamp(min=0)
    for _ in range(40):
        middle = (low + high) / 2
        over = (1 - (source + middle).clamp(0, 1)).sum(-1, keepdim=True) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.where(within, source, source + high).clamp(0, 1)


def per_batch(keep: Float[Tensor, "*lead n"], losses: Sequence[MaskedLoss]) -> list[Float[Tensor, "*lead n"]]:
    """The gates of each batch: the same for all, or each batch's rows of one row an example, all examples in order.

    Rows by example are `[B, T, n]`, or `[B, n]` in networks without positions.
    """
    if keep.ndim < 2 or keep.shape[0] == 1 or keep.ndim - 1 < len(losses[0].leading_shape):
        return [keep] * len(losses)
    sizes = [loss.size for loss in losses]
    if keep.shape[0] != sum(sizes):
        raise UserError(
            f"keep: its shape is {list(keep.shape)}; expected {sum(sizes)} rows, one an example of all batches in order"
        )
    return list(keep.split(sizes))
