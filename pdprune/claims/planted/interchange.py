"""A transformer trained so that a small causal program runs through known nodes, by strict interchange interventions.

The program reads `[flag, a, b, c, d, ?]`. Under the flag A it answers `a + b`, under B `c - d`, both modulo `VALUES`.
In A the head 0 carries `a`, head 1 `b`, and the neurons of group 0 the answer; in B the heads 2 and 3 and group 1.
Training swaps the output of a true node with that on another input: the answer must become what the program gives
for the swapped variable (interchange intervention training, Geiger et al. 2022, arXiv 2112.00826). It mixes the
outputs of all other nodes with those on another input, in part and in any combination: the answer must stay (the
strict part, as in InterpBench, Gupta et al. 2024, arXiv 2407.14494).

All other nodes are silent at first and fade in: swapped from the start they drown what the true nodes have to learn. A
training that has not learned the behaviour by its end has planted nothing, and another one is begun; nothing but its
own loss decides that.

Shape suffixes: B batch, T position, D width, H head, K width of one head, G group of neurons, M neurons of one group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.claims.planted.truth import Planted, shuffled
from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator

VALUES = 4
FLAG_A, FLAG_B, QUESTION = VALUES, VALUES + 1, VALUES + 2
LENGTH, WIDTH, HEADS, GROUPS, GROUP = 6, 32, 8, 6, 16
NODES = HEADS + GROUPS
TRUE = {FLAG_A: (0, 1, HEADS), FLAG_B: (2, 3, HEADS + 1)}
"""By flag, the nodes of first operand, second operand and answer; heads are the first nodes, then groups."""
BATCH = 128
"""Examples of each flag in a training step; of each batch of the behaviour, twice as many."""
WARM_UP, LEARNING_RATE = 100, 0.003
SILENT, FADED_IN = 0.2, 0.5
"""Shares of the training until which other nodes are silent, and from which they are all there."""
LEARNED = 0.05
"""The interchange loss of the behaviour, at most, of a training that succeeded; the mean of its last steps."""
LAST_STEPS, ATTEMPTS = 50, 5
TARGET_LOSS = 0.1


class Activations(NamedTuple):
    """What the nodes put out."""

    heads: Float[Tensor, "B T H K"]
    groups: Float[Tensor, "B T G M"]


class ProgramTransformer(nn.Module):
    """One layer of attention and one MLP, each reading through a norm. Token ids in, logits of values out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(QUESTION + 1, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))  # as large as tokens, or heads tell places apart late
        self.norm_attn, self.norm_mlp, self.norm_out = (nn.RMSNorm(WIDTH) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, GROUPS * GROUP)
        self.down = nn.Linear(GROUPS * GROUP, WIDTH)
        self.unembed = nn.Linear(WIDTH, VALUES)

    def forward(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits at every position; the last one is asked."""
        return self.run(ids_BT)[0]

    def run(
        self, ids_BT: Int[Tensor, "B T"], other: Activations | None = None, keep: Float[Tensor, "B n"] | None = None
    ) -> tuple[Float[Tensor, "B T V"], Activations]:
        """Logits and activations; nodes keep their own output by `keep`, and take the rest from `other`."""
        x_BTD = self.embed(ids_BT) + self.places
        read = self.norm_attn(x_BTD)
        q, k, v = (part(read).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if other is not None and keep is not None:
            heads = torch.lerp(other.heads, heads, keep[:, None, :HEADS, None])
        x_BTD = x_BTD + self.out(heads.flatten(2))
        groups = F.relu(self.up(self.norm_mlp(x_BTD))).unflatten(-1, (GROUPS, GROUP))
        if other is not None and keep is not None:
            groups = torch.lerp(other.groups, groups, keep[:, None, HEADS:, None])
        x_BTD = x_BTD + self.down(groups.flatten(2))
        return self.unembed(self.norm_out(x_BTD)), Activations(heads, groups)


def program(flag: int, first: Int[Tensor, " B"], second: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The right answer."""
    return (first + second if flag == FLAG_A else first - second) % VALUES


def draw(size: int, flag: int, rng: torch.Generator) -> Int[Tensor, "B T"]:
    """Random prompts under one flag."""
    ids = torch.randint(0, VALUES, (size, LENGTH), generator=rng)
    ids[:, 0], ids[:, -1] = flag, QUESTION
    return ids


def operands(ids: Int[Tensor, "B T"], flag: int) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """What the program reads of a prompt."""
    start = 1 if flag == FLAG_A else 3
    return ids[:, start], ids[:, start + 1]


def train(steps: int, seed: int) -> ProgramTransformer:
    """The transformer of the first training from this seed that learned the behaviour, or of the last one tried."""
    for attempt in range(ATTEMPTS):
        network, loss = _trained(steps, seed, attempt)
        if loss <= LEARNED:
            break
    return network.eval().requires_grad_(False)


def _trained(steps: int, seed: int, attempt: int) -> tuple[ProgramTransformer, float]:
    """A transformer, and the interchange loss of the behaviour that its training ended with."""
    rng = generator(seed, "interchange", attempt)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=rng)))
        network = ProgramTransformer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
    of_behaviour = []
    for step in range(steps):
        others = min(1.0, max(0.0, (step / steps - SILENT) / (FADED_IN - SILENT)))
        behaviour, beside = (_interchange_loss(network, flag, others, rng) for flag in (FLAG_A, FLAG_B))
        optimizer.zero_grad()
        ((behaviour + beside) / 2).backward()
        optimizer.step()
        schedule.step()
        of_behaviour.append(behaviour.detach())
    return network, float(torch.stack(of_behaviour[-LAST_STEPS:]).mean())


def _share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate: rising while it warms up, times half a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def _interchange_loss(network: ProgramTransformer, flag: int, others: float, rng: torch.Generator) -> Float[Tensor, ""]:
    """Cross-entropy to what the program gives for the swapped variables; other nodes speak at a volume of `others`."""
    base, other = draw(BATCH, flag, rng), draw(BATCH, flag, rng)
    swapped = torch.randint(0, 4, (BATCH,), generator=rng)  # which true node, 3 is none
    keep = torch.rand(BATCH, NODES, generator=rng)
    keep = others * torch.where(torch.rand(BATCH, 1, generator=rng) < 0.5, keep.round(), keep)
    loud = torch.full((NODES,), others)
    for place, node in enumerate(TRUE[flag]):
        keep[:, node] = (swapped != place).float()
        loud[node] = 1.0
    heads, groups = network.run(other)[1]
    instead = Activations(heads * loud[:HEADS, None], groups * loud[HEADS:, None])
    logits, _ = network.run(base, instead, keep)
    (first, second), (first_other, second_other) = operands(base, flag), operands(other, flag)
    first = torch.where((swapped == 0) | (swapped == 2), first_other, first)
    second = torch.where((swapped == 1) | (swapped == 2), second_other, second)
    return F.cross_entropy(logits[:, -1], program(flag, first, second))


def interchange(seed: int, steps: int) -> Planted:
    """The behaviour under flag A, in a transformer trained from this seed; ablated nodes are resampled."""
    network = train(steps, seed)
    components = {name: (None, getattr(network, name).weight.detach().T) for name in ("out", "down")}
    columns = [("out", HEADS), ("down", GROUPS)]
    nodes = [
        [(site, part * width + column) for column in range(width)]
        for site, parts in columns
        for width in [components[site][1].shape[0] // parts]
        for part in range(parts)
    ]
    model = DecomposedModel.from_components(network, components, nodes)
    model, truth = shuffled(model, set(TRUE[FLAG_A]), seed)
    rng = generator(seed, "interchange behaviour")
    batches = [_batch(draw(2 * BATCH, FLAG_A, rng)) for _ in range(3)]
    return Planted(model, batches[:2], batches[2:], "kl", "resample", TARGET_LOSS, truth)


def _batch(ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
    return {
        "inputs": ids,
        "positions": torch.full((len(ids),), LENGTH - 1),
        "labels": program(FLAG_A, *operands(ids, FLAG_A)),
    }
