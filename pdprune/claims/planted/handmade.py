"""Hand-made networks with known answers: what each scheme must keep, by definition and with wide margins."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel
from pdprune.seeding import generator


class Puzzle(NamedTuple):
    """A network and what a search must answer.

    `complete` and `adversarial` are the circuits that the definitions single out at `target_loss` (KL); several where
    any of them will do.
    """

    model: DecomposedModel
    batch: Any
    target_loss: float
    complete: list[set[int]]
    adversarial: list[set[int]]


def linear_puzzle(
    weight: Tensor, inputs: Tensor, complete: list[set[int]], adversarial: list[set[int]], target_loss: float = 0.02
) -> Puzzle:
    """Two logits from inputs `[B, n]`, each input a node: `weight` `[2, n]`, or `[n]` for one logit against zero."""
    read = nn.Linear(weight.shape[-1], 2, bias=False)
    with torch.no_grad():
        read.weight.copy_(weight if weight.ndim == 2 else torch.stack([weight, torch.zeros_like(weight)]))
    return Puzzle(by_neuron(nn.Sequential(read), ["0"]), inputs, target_loss, complete, adversarial)


def by_neuron(target: nn.Module, sites: list[str], share: float = 1.0) -> DecomposedModel:
    """Each input column of these sites (of an embedding, each dimension) is a node; the rest of the weight is delta."""
    components = {}
    for site in sites:
        module = target.get_submodule(site)
        W = module.get_parameter("weight").detach()
        if isinstance(module, nn.Embedding):
            components[site] = (W, share * torch.eye(W.shape[1]))
        else:
            components[site] = (torch.eye(W.shape[1]), share * W.T)
    return DecomposedModel.from_components(target, components)


def signal_and_noise(seed: int, n_noise: int, n_examples: int = 32) -> tuple[Tensor, Tensor]:
    """A sign that decides the answer, `[B, 1]`, and independent signs, `[B, n_noise]`."""
    rng = generator(seed, "puzzle")
    signal = torch.where(torch.arange(n_examples) % 2 == 0, 1.0, -1.0)[:, None]
    return signal, torch.randint(0, 2, (n_examples, n_noise), generator=rng) * 2.0 - 1


def cancelling_sets(
    n_sets: int, negatives: int = 1, positives: int = 1, idle: int = 0, examples: int = 64, seed: int = 0
) -> Puzzle:
    """Node 0 tells the answer. Each set reads a noise of its own: `positives` nodes add it, `negatives` take it away.

    Then come `idle` nodes with no effect. Ablating whole sets changes nothing; ablating one node of any moves logits
    by 1 or more, and so must be forbidden.
    """
    signal, noise = signal_and_noise(seed, n_sets, examples)
    size, total = positives + negatives, float(max(positives, negatives))
    push = torch.cat([torch.full((positives,), total / positives), torch.full((negatives,), -total / negatives)])
    weight = torch.cat([torch.tensor([2.0]), push.repeat(n_sets), torch.zeros(idle)])
    inputs = torch.cat([signal, noise.repeat_interleave(size, 1), torch.ones(examples, idle)], 1)
    return linear_puzzle(weight, inputs, [{0}], [set(range(1 + n_sets * size))])


class _Saturated(nn.Module):
    """Any one of several routes drives the answer to where it can go no further."""

    def __init__(self, routes: int) -> None:
        super().__init__()
        self.write = nn.Linear(routes, 1, bias=False)
        with torch.no_grad():
            self.write.weight.fill_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        clamped = 3 * self.write(x).clamp(-1, 1)
        return torch.cat([clamped, torch.zeros_like(clamped)], -1)


def redundant_routes(routes: int, idle: int = 0) -> Puzzle:
    """Every route by itself gives the model's answer, so any one of them is enough, whatever happens to the rest."""
    signal, _ = signal_and_noise(0, 0)
    target = _Saturated(routes + idle)
    with torch.no_grad():
        target.write.weight[:, routes:] = 0
    any_one = [{route} for route in range(routes)]
    return Puzzle(by_neuron(target, ["write"]), signal.expand(-1, routes + idle), 0.02, any_one, any_one)


class _Normed(nn.Module):
    """Nodes write a stream; a norm divides by all of it; the answer reads its first dimension."""

    def __init__(self, loud: int, idle: int, norm: nn.Module) -> None:
        super().__init__()
        self.write = nn.Linear(1 + loud + idle, 4, bias=False)
        self.norm = norm
        with torch.no_grad():
            self.write.weight.zero_()
            self.write.weight[0, 0] = 1
            self.write.weight[2, 1:] = 4 / loud
            self.write.weight[3, 1:] = -4 / loud

    def forward(self, x: Tensor) -> Tensor:
        answer = 4 * self.norm(self.write(x))[..., :1]
        return torch.cat([answer, torch.zeros_like(answer)], -1)


def norm_gain(loud: int, norm: str = "rms", idle: int = 0) -> Puzzle:
    """Without the loud nodes, which nobody reads, the norm's gain makes the answer far more certain than the model's.

    Idle nodes are as loud, but read what never occurs. Under KL the loud ones are needed, all that fits of them; under
    cross-entropy node 0 alone beats the model.
    """
    signal, _ = signal_and_noise(0, 0)
    module = nn.RMSNorm(4, eps=1e-3) if norm == "rms" else nn.LayerNorm(4, eps=1e-3)
    target = _Normed(loud, idle, module)
    needed = set(range(1 + loud))
    inputs = torch.cat([signal, torch.ones(len(signal), loud), torch.zeros(len(signal), idle)], 1)
    return Puzzle(by_neuron(target, ["write"]), inputs, 0.002, [needed], [needed])


class _Attention(nn.Module):
    """The last position attends by keys, and sees values; `x: [B, T, 3]` holds value, mark and one."""

    def __init__(self, pairs: int, idle: int) -> None:
        super().__init__()
        self.mark = nn.Linear(3, 2 * pairs + idle, bias=False)
        self.key = nn.Linear(2 * pairs + idle, 1, bias=False)
        self.out = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.mark.weight.copy_(torch.tensor([[0.0, 1.0, 0.0]] * 2 * pairs + [[0.0, 0.0, 1.0]] * idle))
            self.key.weight.copy_(torch.tensor([[1.0, -1.0] * pairs + [1.0] * idle]))
            self.out.weight.copy_(torch.tensor([[4.0], [0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.key(self.mark(x)).transpose(1, 2)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        pattern = scores.expand(-1, x.shape[1], -1).masked_fill(~causal, -torch.inf).softmax(-1)
        return self.out(pattern @ x[..., :1])


def bypassed_attention(pairs: int, idle: int = 0) -> Puzzle:
    """Keys cancel in pairs, so attention is even and can be left out; half of them make it look at the odd token.

    The nodes are the key columns and, last, the value that attention reads. Idle ones raise all scores alike.
    """
    answer, _ = signal_and_noise(0, 0)
    value = answer.repeat(1, 8)
    value[:, 5] = -value[:, 5]
    mark = torch.zeros_like(value)
    mark[:, 5] = 1
    batch = {
        "inputs": torch.stack([value, mark, torch.ones_like(value)], -1),
        "positions": torch.full((len(value),), 7),
    }
    model = by_neuron(_Attention(pairs, idle), ["key", "out"])
    value_node = 2 * pairs + idle
    return Puzzle(model, batch, 0.002, [{value_node}], [{*range(2 * pairs), value_node}])


class _TwoSites(nn.Module):
    """Two readouts of the same inputs, added."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(len(weight), 1, bias=False) for weight in (first, second))
        with torch.no_grad():
            self.first.weight.copy_(first[None])
            self.second.weight.copy_(second[None])

    def forward(self, x: Tensor) -> Tensor:
        logit = self.first(x) + self.second(x)
        return torch.cat([logit, torch.zeros_like(logit)], -1)


def pairs_across_sites(pairs: int, idle: int = 0) -> Puzzle:
    """Every node has a column of both sites; the halves of a cancelling pair act through different ones."""
    signal, noise = signal_and_noise(0, pairs, 64)
    n = 1 + 2 * pairs + idle
    first, second = torch.zeros(2, n)
    first[0] = second[0] = 1
    first[1 : 1 + 2 * pairs : 2] = 2
    second[2 : 2 + 2 * pairs : 2] = -2
    target = _TwoSites(first, second)
    columns = {"first": (torch.eye(n), first[:, None]), "second": (torch.eye(n), second[:, None])}
    nodes = [[("first", column), ("second", column)] for column in range(n)]
    inputs = torch.cat([signal, noise.repeat_interleave(2, 1), torch.ones(64, idle)], 1)
    model = DecomposedModel.from_components(target, columns, nodes=nodes)
    return Puzzle(model, inputs, 0.02, [{0}], [set(range(1 + 2 * pairs))])


class _SummedEmbedding(nn.Module):
    """The answer at every position is the sum over a token's embedding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logit = 2 * self.embed(input_ids).sum(-1, keepdim=True)
        return torch.cat([logit, torch.zeros_like(logit)], -1)


def embedded_pairs(pairs: int) -> Puzzle:
    """Nodes are dimensions of an embedding: the first tells the answer, the others cancel in pairs for every token."""
    signal, noise = signal_and_noise(0, pairs, 16)
    halves = noise.repeat_interleave(2, 1) * torch.tensor([1.0, -1.0]).repeat(pairs)
    model = by_neuron(_SummedEmbedding(torch.cat([signal, halves], 1)), ["embed"])
    batch = {"inputs": torch.arange(64).reshape(8, 8) % 16, "positions": torch.ones(8, 8, dtype=torch.bool)}
    return Puzzle(model, batch, 0.02, [{0}], [set(range(1 + 2 * pairs))])


def small_contributions(idle: int, examples: int = 128) -> Puzzle:
    """Node 0 tells the answer; each other adds a little, with a sign of its own for every example."""
    signal, noise = signal_and_noise(0, idle, examples)
    weight = torch.cat([torch.tensor([2.0]), torch.full((idle,), 4 / idle)])
    return linear_puzzle(weight, torch.cat([signal, noise], 1), [{0}], [{0}], target_loss=0.05)


def cancelling_sets_among_bystanders(
    n_sets: int, negatives: int, positives: int, bystanders: int, seed: int = 0
) -> Puzzle:
    """Cancelling sets, and nodes that push both logits alike: loud, and without any effect on the answer."""
    sets = cancelling_sets(n_sets, negatives, positives, seed=seed)
    weight = sets.model.target.get_parameter("0.weight").detach()
    loud = signal_and_noise(seed + 1, bystanders, len(sets.batch))[1]
    weight = torch.cat([weight, torch.full((2, bystanders), 3.0)], 1)
    return linear_puzzle(weight, torch.cat([sets.batch, loud], 1), sets.complete, sets.adversarial)


def correlated_shortcut(bystanders: int = 0) -> Puzzle:
    """Three nodes read what is equal on the data: the real path, a shortcut, and what holds the shortcut down.

    The shortcut alone answers as the model does, and so does the real path alone. Bystanders push both logits alike.
    """
    signal, loud = signal_and_noise(0, bystanders)
    logit = torch.tensor([2.0, 2.0, -2.0])
    weight = torch.cat([torch.stack([logit, torch.zeros(3)]), torch.full((2, bystanders), 3.0)], 1)
    inputs = torch.cat([signal.expand(-1, 3), loud], 1)
    return linear_puzzle(weight, inputs, [{0}, {1}], [{0, 1, 2}])


class _Backup(nn.Module):
    """A route of one node and a route of two, which needs both; either drives the answer to where it saturates."""

    def __init__(self, bystanders: int) -> None:
        super().__init__()
        self.write = nn.Linear(3 + bystanders, 3, bias=False)
        with torch.no_grad():
            self.write.weight.zero_()
            self.write.weight[0, 0] = 1
            self.write.weight[1, 1:3] = 1
            self.write.weight[2, 3:] = 0.1

    def forward(self, x: Tensor) -> Tensor:
        one, two, direct = self.write(x).split(1, -1)
        both = two.sign() * torch.relu(two.abs() - 1)
        logit = 3 * (5 * one + 5 * both).clamp(-1, 1) + direct
        return torch.cat([logit, torch.zeros_like(logit)], -1)


def backup(bystanders: int = 6) -> Puzzle:
    """One node gives the answer, and so do two others together, if it is gone: the smallest circuit is the one node.

    No node is needed while all others are there, and the bystanders, which move the logit a little, show more.
    """
    signal, noise = signal_and_noise(0, bystanders)
    inputs = torch.cat([signal.expand(-1, 3), noise], 1)
    return Puzzle(by_neuron(_Backup(bystanders), ["write"]), inputs, 0.02, [{0}], [{0}])


class _Bent(nn.Module):
    """Routes that saturate, pairs of which either node is heard without the other, and backups of the routes.

    `write` maps nodes to rows: one a route, one a pair, one a route's backup, and one that goes straight to the logit.
    """

    def __init__(self, write: Tensor, routes: int, pairs: int) -> None:
        super().__init__()
        self.rows = [routes, pairs, routes, 1]
        self.write = nn.Linear(write.shape[1], write.shape[0], bias=False)
        with torch.no_grad():
            self.write.weight.copy_(write)

    def forward(self, x: Tensor) -> Tensor:
        one, pair, two, direct = self.write(x).split(self.rows, -1)
        both = two.sign() * torch.relu(two.abs() - 1)
        there = pair.abs()  # 0, 1/2 or 1
        heard = torch.relu(there - 1 / 4) - 2 * torch.relu(there - 1 / 2) + torch.relu(there - 3 / 4)
        parts = torch.cat([(5 * one + 5 * both).clamp(-1, 1), pair.sign() * 4 * heard], -1)
        logit = 3 * parts.sum(-1, keepdim=True) + direct
        return torch.cat([logit, torch.zeros_like(logit)], -1)


def bent_pairs(pairs: int, bystanders: int, routes: int = 1, backed_up: bool = False) -> Puzzle:
    """Each route's one node tells a part of the answer; pairs cancel through ReLUs, not by adding up to zero.

    A pair is an exclusive or: with both of its nodes or with neither it is silent, with one the logit moves by 3. On
    the way from all ablated to none, where all nodes come back alike, it is silent up to 1/4 and from 3/4; from 1/2 on
    it undoes what it did before. Routes saturate at 1/5. So a pair's gradient is zero at both ends, and all but
    cancels along the way, for every example; that of bystanders, which move the logit by 0.1, does not.

    With `backed_up`, two more nodes a route do together what its one does, so that none of them is needed while all
    others are there. The circuit of fewest nodes still is the ones and the pairs, which are the first nodes.
    """
    noise = signal_and_noise(0, routes + pairs + bystanders, 64)[1]
    told, of_pairs, little = noise.split([routes, pairs, bystanders], 1)
    halves, one = torch.eye(pairs).repeat_interleave(2, 1) / 2, torch.eye(routes)
    two = one.repeat_interleave(2, 1) if backed_up else one[:, :0]
    write = torch.block_diag(one, halves, two, torch.full((1, bystanders), 0.1))
    inputs = torch.cat([told, of_pairs.repeat_interleave(2, 1), told @ two, little], 1)
    model = by_neuron(_Bent(write, routes, pairs), ["write"])
    return Puzzle(model, inputs, 0.02, [set(range(routes))], [set(range(routes + 2 * pairs))])


def noisy_sequences(
    idle: int, noise: float, positions: int, sizes: tuple[int, ...], seed: int = 0
) -> tuple[Puzzle, list[Tensor]]:
    """Node 0 tells the answer at every position; each other adds a little, with a sign of its own everywhere.

    Args:
        idle: nodes besides node 0.
        noise: how far the logit moves if all of them push the same way.
        positions: of every example.
        sizes: examples of each batch.
        seed: of all signs.

    Returns:
        the puzzle, with the first batch, and all batches, `[B, T, 1 + idle]` each.
    """
    rng = generator(seed, "noisy sequences")
    batches = []
    for size in sizes:
        signs = torch.randint(0, 2, (size, positions, 1 + idle), generator=rng) * 2.0 - 1
        batches.append(signs)
    weight = torch.cat([torch.tensor([2.0]), torch.full((idle,), noise / idle)])
    return linear_puzzle(weight, batches[0], [{0}], [{0}], target_loss=0.05), batches
