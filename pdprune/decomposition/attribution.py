"""Which components matter, told by gradients instead of learned functions: the first of the line (APD).

Braun et al. 2025, arXiv 2501.14926: the attribution of a component is how the outputs would change, to first order,
without its share of the parameters; the most attributed of a whole batch are kept and the rest ablated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.objective import MaskedLoss
from pdprune.errors import UserError


@dataclass(frozen=True)
class TopK:
    """How many components are kept.

    Attributes:
        active: on average on a token, over all sites.
        directions: attributions are squared and summed over the outputs; where those are more than this they are
            estimated from so many random combinations of them. Each costs a backward pass.
    """

    active: float = 1.0
    directions: int = 16

    def __post_init__(self) -> None:
        if not self.active > 0 or self.directions < 1:
            raise UserError("attribution: active must be more than 0, directions at least 1")

    def gates(self, loss: MaskedLoss, rng: torch.Generator) -> Float[Tensor, "*lead n"]:
        """1 for the `active` most attributed components a token, counted over the whole batch; 0 for the others."""
        squares = loss.ranks.gather(attributions(loss, self.directions, rng))
        n_tokens = squares[..., 0].numel()
        n_kept = min(squares.numel(), max(1, round(self.active * n_tokens)))
        kept = squares.flatten().topk(n_kept).indices
        gates = torch.zeros_like(squares.flatten()).scatter(0, kept, 1.0).reshape(squares.shape)
        own: Tensor = loss.ranks.share(gates)
        return own


def attributions(loss: MaskedLoss, directions: int, rng: torch.Generator) -> Float[Tensor, "*lead n"]:
    """`Σ_o (∂f_o/∂m_c)²` at the unablated target, whose outputs are `f_o`: what ablating each component would do.

    `∂f_o/∂m_c = (x·V[:, c]) (U[c]·∂f_o/∂y)` is the gradient on the site's weight along the component. Random
    combinations of outputs have independent signs, so that the expected square is the sum of squares.
    """
    mask = torch.ones(*loss.leading_shape, loss.model.n_nodes, device=loss.model.delta_sites.device, requires_grad=True)
    with torch.enable_grad():
        output = loss.output(mask)
    outputs = output.shape[1:]  # of one example
    if outputs.numel() <= directions:
        weights = torch.eye(outputs.numel()).reshape(-1, *outputs)
    else:
        signs = torch.randint(0, 2, (directions, loss.whole_size, *outputs), generator=rng) * 2.0 - 1
        weights = loss.ranks.share(signs, dim=1) / math.sqrt(directions)
    squares = torch.zeros_like(mask)
    for weight in weights.to(output):
        (gradient,) = torch.autograd.grad(output, mask, weight.expand_as(output), retain_graph=True)
        squares += gradient.square()
    return squares
