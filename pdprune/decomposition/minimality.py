"""What it costs that components matter: the pressure under which few do on any input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.errors import UserError
from pdprune.ranks import ALONE, Ranks

OFFSET = 1e-12
"""Added to an importance before a power below 1, whose gradient at 0 is infinite."""


@dataclass(frozen=True)
class Minimality:
    """The price of importances: on each token the sum over components, then the mean over tokens.

    Attributes:
        coefficient: its weight in the loss.
        kind: `lp`: `Σ g^p` (SPD, arXiv 2506.20790); `smooth_l0`: `Σ g²/(g² + γ²)`.
        start: p or γ at first.
        end: p or γ at last, linearly in between; none for one that stays.
        anneal_from, anneal_until: shares of training between which it moves.
        frequency: β in `Σ_c f_c + β f_c log2(1 + N f_c)`, where `f_c` is a component's mean over the batch's `N`
            tokens: what matters often costs slightly more than in proportion (VPD).
    """

    coefficient: float = 1e-3
    kind: Literal["lp", "smooth_l0"] = "lp"
    start: float = 1.0
    end: float | None = None
    anneal_from: float = 0.0
    anneal_until: float = 1.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("lp", "smooth_l0"):
            raise UserError(f"minimality: kind is {self.kind!r}; expected lp or smooth_l0")
        for name, value in (("start", self.start), ("end", self.start if self.end is None else self.end)):
            if not value > 0:
                raise UserError(f"minimality: {name} is {value}; expected more than 0")
        for name, value in (("coefficient", self.coefficient), ("frequency", self.frequency)):
            if value < 0:
                raise UserError(f"minimality: {name} is {value}; expected 0 or more")
        if not 0 <= self.anneal_from <= self.anneal_until <= 1:
            raise UserError(
                f"minimality: anneal_from {self.anneal_from}, anneal_until {self.anneal_until}; "
                "expected 0 <= anneal_from <= anneal_until <= 1"
            )

    def shape_at(self, progress: float) -> float:
        """p or γ when this share of training is done."""
        if self.end is None or progress <= self.anneal_from:
            return self.start
        if progress >= self.anneal_until:
            return self.end
        return self.start + (self.end - self.start) * (progress - self.anneal_from) / (
            self.anneal_until - self.anneal_from
        )

    def __call__(
        self,
        importances: Iterable[Float[Tensor, "*lead C"]],
        progress: float,
        counts: Float[Tensor, "*lead"] | None = None,
        ranks: Ranks = ALONE,
    ) -> Float[Tensor, ""]:
        """The price of the whole batch, without its coefficient.

        Args:
            importances: of each site's components, upper-leaky.
            progress: the share of training that is done.
            counts: 0 for tokens that are padding, 1 for others; None if all count.
            ranks: who shares the batch; importances and counts are of this one's examples.
        """
        shape = self.shape_at(progress)
        total = []
        for g in importances:
            price = (g + OFFSET) ** shape if self.kind == "lp" else g.square() / (g.square() + shape**2)
            lead = price.shape[:-1] if counts is None else counts.shape  # a site may read the same for all examples
            rows = price.expand(*lead, -1).flatten(0, -2)
            weights = rows.new_ones(len(rows)) if counts is None else counts.flatten().to(rows.dtype)
            n_own = weights.sum()
            often = ranks.mean(weights @ rows / n_own.clamp(min=1), n_own)
            n_tokens = ranks.sum(n_own).clamp(min=1)
            total.append((often + self.frequency * often * torch.log2(1 + n_tokens * often)).sum())
        return torch.stack(total).sum()
