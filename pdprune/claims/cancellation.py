"""Claim 1: complete ablation is fooled by cancellation. Networks whose circuits are known, and who finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from pdprune.adversary.attack import Ascent
from pdprune.circuits.audit import Audit, audit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.prune import prune
from pdprune.circuits.schemes import Draws, SchemeName
from pdprune.claims.attribution import attributions
from pdprune.claims.experiment import Cell, Experiment, Figures, Result, require_known
from pdprune.claims.intervals import bootstrap, markdown, over_seeds
from pdprune.claims.planted.handmade import (
    backup,
    bent_pairs,
    bypassed_attention,
    cancelling_sets_among_bystanders,
    correlated_shortcut,
    norm_gain,
    pairs_across_sites,
)
from pdprune.claims.planted.interchange import interchange
from pdprune.claims.planted.superposition import superposition
from pdprune.claims.planted.truth import Planted, of_puzzle
from pdprune.claims.recovery import auroc, recovery, top

ATTACK = Ascent(steps=10, step_size=0.2, restarts=2, draws=4, flips=16)
"""Of each circuit that selection considers; what it ends with is audited by more."""
DRAWS = Draws(count=8)
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
RANKINGS = ("patching", "gradient", "integrated", "random")

NETWORKS: dict[str, Callable[[int, int], Planted]] = {
    "correlated shortcut": lambda seed, _: of_puzzle(correlated_shortcut(6), seed),
    "backup route": lambda seed, _: of_puzzle(backup(6), seed),
    "norm gain": lambda seed, _: of_puzzle(norm_gain(6, idle=6), seed),
    "bypassed attention": lambda seed, _: of_puzzle(bypassed_attention(3, idle=6), seed),
    "pairs": lambda seed, _: of_puzzle(cancelling_sets_among_bystanders(4, 1, 1, 8, seed), seed),
    "sets of 2 and 3": lambda seed, _: of_puzzle(cancelling_sets_among_bystanders(2, 2, 3, 8, seed), seed),
    "pairs across sites": lambda seed, _: of_puzzle(pairs_across_sites(2, idle=6), seed),
    "40 pairs": lambda seed, _: of_puzzle(cancelling_sets_among_bystanders(40, 1, 1, 39, seed), seed),
    "bent pairs": lambda seed, _: of_puzzle(bent_pairs(3, 6), seed),
    "bent pairs, backups": lambda seed, _: of_puzzle(bent_pairs(2, 6, routes=3, backed_up=True), seed),
    "superposed MLP": superposition,
    "program transformer": interchange,
}
"""By name, a network from a seed and a number of training steps, which those made by hand do not need."""
HAND_MADE = tuple(name for name in NETWORKS if name not in ("superposed MLP", "program transformer"))


@dataclass(frozen=True)
class Settings:
    """What the experiment is run on.

    Attributes:
        networks: names in `NETWORKS`.
        seeds: each shuffles the nodes, draws or trains the network anew, and decides the pruning.
        training_steps: of the trained networks.
        steps: keep steps of each pruning.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    training_steps: int = 1500
    steps: int = 100

    def __post_init__(self) -> None:
        require_known("networks", self.networks, NETWORKS)


SMALL = Settings(networks=("correlated shortcut", "backup route"), seeds=(0,), steps=50)


def cells(settings: Settings) -> list[Cell]:
    """One for every seed and network."""
    return [
        {
            "network": network,
            "seed": seed,
            "training_steps": 0 if network in HAND_MADE else settings.training_steps,
            "steps": settings.steps,
        }
        for seed in settings.seeds
        for network in settings.networks
    ]


def run(network: str, seed: int, training_steps: int, steps: int) -> Figures:
    """Prune by every scheme, rank by everything else, and hold all of it against the truth."""
    planted = NETWORKS[network](seed, training_steps)
    alone = planted.single_ablations()
    needed = min(alone[node] for node in planted.truth)
    true_circuit = _audited(planted, planted.truth, seed)
    if not planted.target_loss:  # of a trained network: half-way between what its truth costs and what it lacks alone
        planted = replace(planted, target_loss=(true_circuit.adversarial.loss + needed) / 2)
    figures: Figures = {
        "n_nodes": planted.model.n_nodes,
        "n_true": len(planted.truth),
        "target_loss": planted.target_loss,
        "truth_worst_case": true_circuit.adversarial.loss,
        "truth_least_needed": needed,
        "others_most_needed": max(loss for node, loss in enumerate(alone) if node not in planted.truth),
    }
    for scheme in SCHEMES:
        figures[scheme] = _pruned(planted, scheme, steps, seed)
    for name, scores in attributions(planted, seed).items():
        found = top(scores, len(planted.truth))
        figures[name] = {"kept": len(found), **_against(planted, found, scores)}
    return figures


def _pruned(planted: Planted, scheme: SchemeName, steps: int, seed: int) -> Figures:
    circuit = prune(
        planted.model,
        planted.batches,
        loss=planted.loss,
        scheme=scheme,
        reference=planted.reference,
        target_loss=planted.target_loss,
        search="gradient",
        select=planted.batches,
        attack=ATTACK,
        draws=DRAWS,
        steps=steps,
        seed=seed,
    )
    checked = _audited(planted, circuit, seed)
    return {
        "kept": circuit.n_kept,
        "reached": circuit.reached,
        "complete_loss": checked.complete_loss,
        "worst_case": checked.adversarial.loss,
        "faithful": checked.faithful,
        **_against(planted, circuit.kept, circuit.gates + circuit.keep),
    }


def _against(planted: Planted, found: Any, scores: torch.Tensor) -> Figures:
    return {
        **recovery(found, planted.truth)._asdict(),
        "auroc": auroc(scores, planted.truth),
        "exact": set(found) == planted.truth,
    }


def _audited(planted: Planted, keep: Circuit | frozenset[int], seed: int) -> Audit:
    """On held-out data, by the audit's least attack."""
    return audit(
        planted.model,
        keep,
        planted.held_out,
        loss=planted.loss,
        reference=planted.reference,
        target_loss=planted.target_loss or None,
        draws=8,
        random_circuits=0,
        seed=seed,
    )


def table(results: Sequence[Result]) -> str:
    """F1 by network and method; then, over all, precision, recall and AUROC; then what the audits say."""
    networks = list(dict.fromkeys(result.cell["network"] for result in results))
    rows = []
    for network in networks:
        of_it = [result.figures for result in results if result.cell["network"] == network]
        size = f"{network}: {of_it[0]['n_true']} of {of_it[0]['n_nodes']}"
        rows.append([size, *(_mean(of_it, method, "f1") for method in (*SCHEMES, *RANKINGS))])
    everything = [result.figures for result in results]
    for what in ("f1", "precision", "recall", "auroc"):
        over_all = (bootstrap([one[method][what] for one in everything]) for method in (*SCHEMES, *RANKINGS))
        rows.append([f"all: {what}", *(interval.show() for interval in over_all)])
    first = markdown(["F1 (network: true nodes of all)", *SCHEMES, *RANKINGS], rows)
    return f"{first}\n\n{_audits(results, networks)}"


def _audits(results: Sequence[Result], networks: Sequence[str]) -> str:
    """The size of each scheme's circuit and its worst case, as a multiple of the target loss."""
    rows = []
    for network in networks:
        of_it = [result.figures for result in results if result.cell["network"] == network]
        row = [network]
        for scheme in SCHEMES:
            size = over_seeds([figures[scheme]["kept"] for figures in of_it]).show(1)
            worst = over_seeds([figures[scheme]["worst_case"] / figures["target_loss"] for figures in of_it]).show(1)
            exact = sum(figures[scheme]["exact"] for figures in of_it)
            row.append(f"{size}; {worst}; {exact}/{len(of_it)}")
        rows.append(row)
    head = [f"{scheme}: nodes; worst case / target; seeds that found the truth" for scheme in SCHEMES]
    return markdown(["", *head], rows)


def _mean(figures: Sequence[Figures], method: str, what: str) -> str:
    return over_seeds([one[method][what] for one in figures]).within(0, 1).show()


EXPERIMENT = Experiment(
    name="cancellation",
    claim="Complete ablation is fooled by cancellation; adversarial pruning finds the true nodes.",
    settings=Settings(),
    small=SMALL,
    cells=cells,
    run=run,
    table=table,
)
