"""A language model in small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdprune.claims.planted.handmade import by_neuron
from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator


class Tokens(nn.Module):
    """A language model in small: embedding, one mixing layer, logits at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.up = nn.Linear(4, 6)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = x + x.cumsum(1) / 2
        return self.down(self.drop(torch.relu(2 * self.up(x))))


def token_model(sites: tuple[str, ...] = ("down",), share: float = 0.95) -> DecomposedModel:
    """Six nodes, the columns of `down`, and more for more sites; the rest of the weights is delta."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Tokens()
    return by_neuron(target, list(sites), share)


def token_batch(size: int = 8, seed: int = 0, length: int = 5) -> dict[str, Any]:
    rng = generator(seed, "tokens")
    ids = torch.randint(0, 11, (size, length), generator=rng)
    return {
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "labels": torch.randint(0, 2, (size,), generator=rng) + 3,
        "positions": torch.randint(1, length, (size,), generator=rng),
        "choices": torch.tensor([[3, 4, -1]]).expand(size, -1),
    }
