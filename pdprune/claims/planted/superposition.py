"""A residual MLP whose input matrix is a sum of more planted components than the stream has dimensions.

Component `f` reads the direction of feature `f` and writes to the neurons, of which there are fewer, as training
decides. So that they are the network's mechanisms and not just a way to write it, the components of features that are
absent are ablated at random, in part and in any combination, while it is trained (the requirement of APD, Braun et al.
2025, arXiv 2501.14926, appendix A). A behaviour is what happens to some of the features; its truth are their
components.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pdprune.claims.planted.truth import Planted, shuffled
from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator

FEATURES, WIDTH, NEURONS = 40, 36, 30
BEHAVIOUR = 5
"""Features of the behaviour: the first ones, which the order of nodes hides."""
OCCURS = 0.2
"""How often each of them occurs in its data."""
BATCH, TRAIN_OCCURS = 512, 0.03
EXAMPLES = 256
SPREADING_STEPS = 300


class SuperposedMLP(nn.Module):
    """`x_0 + W_out relu(W_in x_0)` of `x_0 = x E`, read out along the features: `[B, F]` to `[B, F]`."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.directions: Float[Tensor, "F D"] = nn.Parameter(_spread_directions(rng), requires_grad=False)
        self.mlp_in = nn.Linear(WIDTH, NEURONS)
        self.mlp_out = nn.Linear(NEURONS, WIDTH, bias=False)

    def forward(self, x_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """What becomes of the features."""
        x_BD = x_BF @ self.directions
        return (x_BD + self.mlp_out(F.relu(self.mlp_in(x_BD)))) @ self.directions.T


def train(steps: int, seed: int) -> tuple[SuperposedMLP, Float[Tensor, "F N"]]:
    """The network and what its components write, trained towards `x + relu(x)` of sparse features."""
    rng = generator(seed, "superposition")
    network = SuperposedMLP(rng)
    writes = nn.Parameter(torch.randn(FEATURES, NEURONS, generator=rng) / NEURONS**0.5)
    out = nn.Parameter(torch.randn(NEURONS, WIDTH, generator=rng) / NEURONS**0.5)
    bias = nn.Parameter(torch.zeros(NEURONS))
    optimizer = torch.optim.Adam([writes, out, bias], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        x_BF, present = _sparse(BATCH, torch.full((FEATURES,), TRAIN_OCCURS), rng)
        source = torch.rand(x_BF.shape, generator=rng) * torch.rand(BATCH, 1, generator=rng).round()
        read_BF = (x_BF @ network.directions) @ network.directions.T
        hidden = F.relu((read_BF * torch.where(present, 1.0, source)) @ writes + bias)
        made = (x_BF @ network.directions + hidden @ out) @ network.directions.T
        optimizer.zero_grad()
        F.mse_loss(made, x_BF + F.relu(x_BF)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        network.mlp_in.weight.copy_((network.directions.T @ writes).T)
        network.mlp_in.bias.copy_(bias)
        network.mlp_out.weight.copy_(out.T)
    return network.eval().requires_grad_(False), writes.detach()


def superposition(seed: int, steps: int) -> Planted:
    """The behaviour of a few features, in a network trained from this seed."""
    network, writes = train(steps, seed)
    components = {"mlp_in": (network.directions.detach().T, writes)}
    model, truth = shuffled(DecomposedModel.from_components(network, components), set(range(BEHAVIOUR)), seed)
    rng = generator(seed, "superposition behaviour")
    occurs = torch.zeros(FEATURES)
    occurs[:BEHAVIOUR] = OCCURS
    batches = [_sparse(EXAMPLES, occurs, rng)[0] for _ in range(3)]
    return Planted(model, batches[:2], batches[2:], "mse", "zero", 0.0, truth)


def _sparse(
    size: int, occurs: Float[Tensor, " F"], rng: torch.Generator
) -> tuple[Float[Tensor, "B F"], Bool[Tensor, "B F"]]:
    """Features of size 0.5 to 1 and either sign where they are present, and where they are."""
    present = torch.rand(size, FEATURES, generator=rng) < occurs
    sign = torch.rand(size, FEATURES, generator=rng).round() * 2 - 1
    return (torch.rand(size, FEATURES, generator=rng) / 2 + 0.5) * sign * present, present


def _spread_directions(rng: torch.Generator) -> Float[Tensor, "F D"]:
    """Unit vectors as far from one another as descent gets them, so that features leak little into one another."""
    drawn = nn.Parameter(torch.randn(FEATURES, WIDTH, generator=rng))
    optimizer = torch.optim.Adam([drawn], lr=0.02)
    for _ in range(SPREADING_STEPS):
        unit = F.normalize(drawn, dim=-1)
        optimizer.zero_grad()
        (unit @ unit.T - torch.eye(FEATURES)).pow(8).sum().pow(1 / 8).backward()
        optimizer.step()
    return F.normalize(drawn.detach(), dim=-1)
