"""Rankings of nodes that need no pruning: what the schemes are compared with.

Gradients are of what the target answers: the logarithm of its likeliest answer's probability, or the squared outputs
where outputs are no classes. (The KL to the target has no gradient at the target.) Each example's attribution counts
by its size, so that opposite signs on different examples do not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.claims.planted.truth import Planted
from pdprune.seeding import generator

PATH_STEPS = 16
"""Points of the path that integrated gradients follow."""


def attributions(planted: Planted, seed: int) -> dict[str, Float[Tensor, " n"]]:
    """By name, how much each node matters; the higher the more."""
    patched = torch.tensor(planted.single_ablations())
    read = planted.losses(_answer if planted.loss == "kl" else _squares)
    return {
        "patching": patched,
        "gradient": _path_gradient(read, [1.0]),
        "integrated": _path_gradient(read, [(step + 0.5) / PATH_STEPS for step in range(PATH_STEPS)]),
        "random": torch.rand(planted.model.n_nodes, generator=generator(seed, "random ranking")),
    }


def _path_gradient(losses: Sequence[MaskedLoss], shares: Sequence[float]) -> Float[Tensor, " n"]:
    """The gradient of each example's reading along the mask, averaged over points between reference and target.

    The gradient along a node's mask is gradient × (activation − reference).
    """
    total = torch.zeros(losses[0].model.n_nodes)
    for loss in losses:
        game = Game([loss], [torch.zeros(loss.model.n_nodes)], "example")
        along = torch.zeros(game.free.shape)
        for share in shares:
            entries = torch.where(game.free, share, 1.0)
            along += game.loss_and_gradient(entries)[1] / len(shares)
        total += game.source(along).reshape(loss.size, -1, loss.model.n_nodes).sum(1).abs().sum(0)
    return total


def _answer(output: Tensor, target_output: Tensor, raw: Any) -> Float[Tensor, " B"]:
    """The logarithm of the probability of the target's likeliest answer, at the last scored position."""
    if output.ndim == 3:
        rows = torch.arange(len(output))
        positions = raw["positions"] if raw["positions"].ndim == 1 else torch.full((len(output),), -1)
        output, target_output = output[rows, positions], target_output[rows, positions]
    return F.log_softmax(output, -1).gather(-1, target_output.argmax(-1, keepdim=True)).squeeze(-1)


def _squares(output: Tensor, target_output: Tensor, raw: Any) -> Float[Tensor, " B"]:
    return output.square().reshape(len(output), -1).sum(-1)
