"""Several shared masks as one batched run.

Folded, a mask is a set of weights, so that several of them are several networks on the same inputs: one batched product
(`torch.vmap`) in place of a product each. That pays where a run by itself leaves the machine idle: on a GPU, and in the
thousands of tiny runs of an exhaustive search. All else on a CPU goes one after another, which is as fast and keeps the
bits, that a batched product may change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.decomposition import DecomposedModel

log = logging.getLogger(__name__)

TOKENS_ON_GPU = 1 << 16
"""Tokens, of all masks together, that run at once on a GPU: memory is in proportion to them."""
FLOP_ON_CPU = 1 << 20
"""A run of less work than this is mostly overhead on a CPU,"""
TOGETHER_ON_CPU = 64
"""and so many of them go together."""


def how_many_at_once(model: DecomposedModel, tokens: int, *, exhaustive: bool) -> int:
    """How many shared masks to run together on a batch of so many tokens; 1 is one after another."""
    if not model.can_batch:
        return 1
    if model.delta_sites.device.type != "cpu":
        return max(1, TOKENS_ON_GPU // tokens)
    flop = 2 * tokens * sum(parameter.numel() for parameter in model.target.parameters())
    return TOGETHER_ON_CPU if exhaustive and flop < FLOP_ON_CPU else 1


def for_each(
    function: Callable[..., Tensor],
    stacked: tuple[Float[Tensor, " R *rest"], ...],
    at_once: int,
    model: DecomposedModel,
) -> Float[Tensor, " R *out"]:
    """`function` of each row, as one batched run of `at_once` rows at a time.

    A target that cannot be batched (whose forward pass decides by what its tensors hold, say) is noticed at its first
    run, and goes one row after another from then on.
    """
    if at_once > 1 and model.can_batch:
        try:
            return torch.vmap(function, chunk_size=at_once)(*stacked)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            model.can_batch = False
            log.debug("%s runs one mask at a time: %s", model.target_name, error)
    return torch.stack([function(*row) for row in zip(*stacked, strict=True)])
