"""Gates: one number in [0,1] a node, 1 kept; how they come from parameters, and what keeping costs.

A *gate map* turns an unconstrained parameter θ into a gate. A *sparsity term* turns gates into the expected, or a
smooth, number of kept nodes. Any map goes with any term (method.md, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.decomposition.importances import lower_leaky, upper_leaky
from pdprune.errors import UserError, require_above, require_share

Parameters = Float[Tensor, "*lead n"]
Gates = Float[Tensor, "*lead n"]


class GateMap(Protocol):
    """From parameters to gates."""

    def initial(self, shape: tuple[int, ...], rng: torch.Generator) -> Parameters:
        """Parameters to begin with: everything kept, or nearly."""
        ...

    def at(self, gates: Gates) -> Parameters:
        """Parameters to begin with where gates shall start at these, as near as the map comes to them."""
        ...

    def gates(self, theta: Parameters, rng: torch.Generator | None = None) -> Gates:
        """Gates in [0,1], with a gradient to θ; random ones for maps that sample, if `rng` is given."""
        ...

    def presence(self, theta: Parameters) -> Gates:
        """What the sparsity term counts: a gate with a gradient that never dies where θ could still come down."""
        ...

    def bounds(self) -> tuple[float, float]:
        """Between what θ is held after every step, so that no gate is ever out of reach of coming back."""
        ...


@dataclass(frozen=True)
class LeakyHardSigmoid:
    """`g = clamp(θ, 0, 1)`, with leaks so that no gate is stuck (SPD, arXiv 2506.20790).

    Below 0 the gate lets through 0.01 of those gradients that would raise it; above 1 the sparsity term still sees 0.01
    of θ, so that it can bring θ back.
    """

    leak: float = 0.01
    start: float = 1.0

    def initial(self, shape: tuple[int, ...], rng: torch.Generator) -> Parameters:
        return torch.full(shape, self.start)

    def at(self, gates: Gates) -> Parameters:
        return gates

    def gates(self, theta: Parameters, rng: torch.Generator | None = None) -> Gates:
        return lower_leaky(theta, self.leak)

    def presence(self, theta: Parameters) -> Gates:
        return upper_leaky(theta, self.leak)

    def bounds(self) -> tuple[float, float]:
        return -0.05, 1.05


@dataclass(frozen=True)
class HardConcrete:
    """A stretched binary concrete gate with mass at exactly 0 and 1 (Louizos et al. 2018, arXiv 1712.01312).

    θ is the logit; without `rng` the gate is the deterministic one of the paper's equation 13.
    """

    beta: float = 2 / 3
    low: float = -0.1
    high: float = 1.1
    start: float = 3.0

    def initial(self, shape: tuple[int, ...], rng: torch.Generator) -> Parameters:
        return torch.full(shape, self.start)

    def at(self, gates: Gates) -> Parameters:
        return ((gates - self.low) / (self.high - self.low)).logit()

    def gates(self, theta: Parameters, rng: torch.Generator | None = None) -> Gates:
        logits = theta
        if rng is not None:
            uniform = torch.rand(theta.shape, generator=rng).clamp(1e-6, 1 - 1e-6).to(theta.device)
            logits = (theta + uniform.logit()) / self.beta
        return (torch.sigmoid(logits) * (self.high - self.low) + self.low).clamp(0, 1)

    def presence(self, theta: Parameters) -> Gates:
        """The probability that the gate is not 0 (equation 12)."""
        return torch.sigmoid(theta - self.beta * math.log(-self.low / self.high))

    def bounds(self) -> tuple[float, float]:
        return -5.0, 5.0


@dataclass(frozen=True)
class Heaviside:
    """`g = 1[θ > 0]` with the gradient of a sigmoid (Gao et al. 2025, arXiv 2511.13653); θ starts at N(0.1, 0.01)."""

    temperature: float = 1.0

    def initial(self, shape: tuple[int, ...], rng: torch.Generator) -> Parameters:
        return 0.1 + 0.01 * torch.randn(shape, generator=rng)

    def at(self, gates: Gates) -> Parameters:
        """Open wherever it is not 0, and the nearer to closing the less it matters."""
        return 0.1 * gates

    def gates(self, theta: Parameters, rng: torch.Generator | None = None) -> Gates:
        gates: Tensor = _Heaviside.apply(theta, self.temperature)
        return gates

    def presence(self, theta: Parameters) -> Gates:
        return self.gates(theta)

    def bounds(self) -> tuple[float, float]:
        return -0.5, 0.5


@dataclass(frozen=True)
class Sparsity:
    """What keeping costs, by the number of nodes.

    Attributes:
        kind: `l0`, the expected number of gates that are not 0; `lp`, `Σ g^p`; `smooth_l0`, `Σ g²/(g² + γ²)`.
        start: p or γ at the first step.
        end: p or γ from `annealed_at` of the run on, linearly in between.
        annealed_at: as a fraction of all steps.
    """

    kind: Literal["l0", "lp", "smooth_l0"] = "lp"
    start: float = 1.0
    end: float = 0.3
    annealed_at: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in ("l0", "lp", "smooth_l0"):
            raise UserError(f"sparsity: kind is {self.kind!r}; expected l0, lp or smooth_l0")
        require_above(0, "sparsity: ", start=self.start, end=self.end)
        require_share("sparsity: ", annealed_at=self.annealed_at)

    def __call__(self, presence: Gates, progress: float) -> Float[Tensor, ""]:
        """The mean over nodes (and positions) at `progress` ∈ [0,1] of the run."""
        shape = self.start + (self.end - self.start) * min(1.0, progress / max(self.annealed_at, 1e-9))
        match self.kind:
            case "l0":
                return presence.mean()
            case "lp":
                # the offset bounds the gradient at 0, which a power below 1 sends to infinity
                return ((presence + _OFFSET) ** shape - _OFFSET**shape).mean()
            case "smooth_l0":
                return (presence.square() / (presence.square() + shape**2)).mean()


_OFFSET = 1e-3


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, theta: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        return (theta > 0).to(theta.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        temperature = ctx.temperature  # type: ignore[attr-defined]
        soft = torch.sigmoid(theta / temperature)
        return grad * soft * (1 - soft) / temperature, None
