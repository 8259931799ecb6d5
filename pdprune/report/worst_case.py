"""The adversary's worst source, replayed: with one node less, and example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pdprune.adversary.attack import Ascent, attack
from pdprune.adversary.game import Game, Scope
from pdprune.batches import Batch
from pdprune.circuits.predictions import answers_to, said
from pdprune.report.audited_run import AuditedRun
from pdprune.report.figures import Adversary, Opposed, Said, Sufferer
from pdprune.seeding import generator

SMALL = Ascent(steps=4, step_size=0.5, restarts=1, draws=2, flips=0)
"""The attack of a report, which starts from what the audit found."""
OPPOSED_SHOWN = 60
SUFFERERS_SHOWN = 12
OUTPUTS_SHOWN = 4
"""Of an answer that is no class."""


@dataclass(frozen=True)
class Replay:
    """The circuit on some examples, and the source that hurts it most there."""

    game: Game
    entries: Float[Tensor, "*lead E"]

    @property
    def mask(self) -> Float[Tensor, "*lead n"]:
        gates = self.game.gates[0]
        return gates + (1 - gates) * self.game.source(self.entries)

    def losses(self, mask: Float[Tensor, "*lead n"]) -> Float[Tensor, " B"]:
        with torch.no_grad():
            return self.game.losses[0].per_example(mask, self.game.delta_source(self.entries))


def replay(run: AuditedRun, batch: Batch, index: int = 0) -> Replay:
    """The audit's worst source on some examples; one found anew where that is of another shape.

    Sources that differ between examples belong to the batch that they were found on.
    """
    game = game_of(run, batch, index)
    source, deltas = run.circuit.worst_source, run.circuit.worst_source_delta
    if source is not None and deltas is not None:
        found = torch.cat([source, deltas], dim=-1).to(game.free.device)
        if found.shape == game.free.shape and not game.separable:
            return Replay(game, game.project(found))
    return Replay(game, attack(game, SMALL, generator(run.audit.seed, "report-attack", index)).entries)


def spread_examples(replayed: Replay, most: int) -> Batch:
    """At most so many of the replayed examples, from the least to the most hurt in equal steps.

    So few of them have about the mean loss of all.
    """
    batch = replayed.game.losses[0].batch
    by_loss = replayed.losses(replayed.mask).argsort(stable=True)
    n = max(1, min(most, batch.size))
    middles = (2 * torch.arange(n) + 1) * batch.size // (2 * n)
    return batch.select(by_loss[middles.to(by_loss.device)])


def game_of(run: AuditedRun, batch: Batch, index: int = 0, keep: Tensor | None = None) -> Game:
    """The circuit, or another one, on some examples, seen by the audit's adversary."""
    gates = (run.circuit.keep if keep is None else keep).float().to(run.model.delta_sites.device)
    scope: Scope = run.audit.scope  # type: ignore[assignment]
    return Game([run.masked_loss(batch, index)], [gates], scope, run.max_ablated)


def without_each(replayed: Replay, nodes: Sequence[int]) -> tuple[float, dict[int, float]]:
    """The worst source's loss, and what it becomes if one node is ablated besides; the greater of them is a lower bound
    on the worst case of the circuit without it."""
    mask = replayed.mask
    removed = {}
    for node in nodes:
        less = mask.clone()
        less[..., node] = 0
        removed[node] = float(replayed.losses(less).mean())
    return float(replayed.losses(mask).mean()), removed


def opposed_nodes(run: AuditedRun, replayed: Replay, site_of: Sequence[int]) -> tuple[list[Opposed], list[Opposed]]:
    """The nodes that the worst source ablates, and those that it leaves alone; what matters most to it comes first."""
    game, entries = replayed.game, replayed.entries
    _, gradient = game.loss_and_gradient(entries)
    source, free = _over_lead(game.source(entries)), _over_lead(game.source(game.free), torch.any)
    gain = _over_lead(game.source(gradient) * (2 * game.source(entries) - 1).sign(), torch.sum)
    order = [int(node) for node in gain.argsort(descending=True, stable=True) if free[node]]
    found = [
        Opposed(run.model.nodes[node].label, site_of[node], float(source[node]), float(gain[node])) for node in order
    ]
    ablated = [node for node in found if node.source < 0.5]
    return ablated[:OPPOSED_SHOWN], [node for node in found if node.source >= 0.5][:OPPOSED_SHOWN]


def n_ablated_by_site(run: AuditedRun, replayed: Replay, site_of: Sequence[int], n_sites: int) -> list[int]:
    game = replayed.game
    free = _over_lead(game.source(game.free), torch.any)
    ablated = (_over_lead(game.source(replayed.entries)) < 0.5) & free
    counts = [0] * n_sites
    for node in ablated.nonzero().squeeze(-1).tolist():
        counts[site_of[node]] += 1
    return counts


def sufferers(run: AuditedRun, batches: Sequence[Batch], classes: bool) -> list[Sufferer]:
    """The examples that the worst source hurts most, with all three answers."""
    found: list[Sufferer] = []
    for index, batch in enumerate(batches):
        replayed = replay(run, batch, index)
        loss = replayed.game.losses[0]
        ones, gates = torch.ones_like(replayed.game.gates[0]), replayed.game.gates[0]
        none = torch.zeros(run.model.n_sites, device=gates.device)
        runs = [(ones, None), (gates, none), (replayed.mask, replayed.game.delta_source(replayed.entries))]
        with torch.no_grad():
            losses = [loss.per_example(mask, deltas).tolist() for mask, deltas in runs]
            answers = [_answers(run, loss.batch, loss.output(mask, deltas), classes) for mask, deltas in runs]
        first = len(found)
        found += [
            Sufferer(first + row, *(of_run[row] for of_run in losses), *(of_run[row] for of_run in answers))
            for row in range(batch.size)
        ]
    return sorted(found, key=lambda example: -example.attacked_loss)[:SUFFERERS_SHOWN]


def adversary_of(
    run: AuditedRun, batches: Sequence[Batch], replayed: Replay, site_of: Sequence[int], classes: bool
) -> Adversary:
    """All that is shown of the adversary's side."""
    ablated, left_alone = opposed_nodes(run, replayed, site_of)
    notes = []
    if replayed.entries.ndim > 1:
        notes.append(
            f"The source differs by {run.audit.scope.replace('_', ' and ')}: what is shown of a node is its mean."
        )
    n_shown = sum(batch.size for batch in batches)
    if n_shown < run.n_examples:
        notes.append(f"Examples are the worst of the first {n_shown:,} of {run.n_examples:,}.")
    return Adversary(ablated, left_alone, sufferers(run, batches, classes), notes)


class _Ids:
    """Stands in for a tokenizer where there is none."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _answers(run: AuditedRun, batch: Batch, output: Tensor, classes: bool) -> list[Said]:
    if classes:
        return [Said(*said(answer)) for answer in answers_to(batch, output, run.tokenizer or _Ids())]
    rows = output.reshape(batch.size, -1).float().cpu()
    return [Said(_largest(row), None) for row in rows]


def _largest(row: Float[Tensor, " V"]) -> str:
    order = row.abs().argsort(descending=True, stable=True)[:OUTPUTS_SHOWN].sort().values
    return ", ".join(f"y{int(index)} = {float(row[index]):.2g}" for index in order)


def _over_lead(values: Shaped[Tensor, "*lead n"], how: object = torch.mean) -> Shaped[Tensor, " n"]:
    """One value a node, on the CPU, where sources differ between positions or examples."""
    assert callable(how)
    reduced: Tensor = how(values.reshape(-1, values.shape[-1]), 0)
    return reduced.cpu()
