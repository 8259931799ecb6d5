"""One table of several audited circuits of one model: `python -m pdprune.compare RUN [RUN ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.errors import UserError

USAGE = "python -m pdprune.compare RUN [RUN ...], where each RUN is the folder of a finished fit"
PRUNED = {
    "complete": "pruned with complete ablation",
    "stochastic": "pruned with random ablation",
    "adversarial": "pruned adversarially",
    "imported": "found elsewhere",
}
REST = {"complete": "ablated", "stochastic": "at random", "adversarial": "by adversary"}


def compare(folders: list[Path]) -> Table:
    """What each circuit keeps and what it costs under each scheme, beside the model's own.

    Args:
        folders: run folders with a circuit and its audit, all of one target, task, and division into nodes.

    Raises:
        UserError: a folder lacks a result, or the circuits are of different things.
    """
    circuits = [Circuit.load(folder) for folder in folders]
    audits = [Audit.load(folder) for folder in folders]
    _require_comparable(folders, circuits, audits)
    first = audits[0]
    table = Table(
        title=f"Task {circuits[0].task} on {circuits[0].target.name}, audited alike on "
        f"{first.n_examples:,} held-out prompts",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for header in ("the model", *(PRUNED.get(audit.scheme or "", "circuit") for audit in audits)):
        longest = max(len(word) for word in header.split())  # in 80 columns it would be cut short
        table.add_column(header, justify="right", min_width=longest, max_width=16)
    table.add_row(
        f"nodes kept of {first.n_nodes:,}",
        f"{first.n_nodes:,}",
        *(f"{audit.n_kept:,}" for audit in audits),
        end_section=True,
    )
    for row in (*_loss_rows(audits), *_kl_rows(audits), *_task_rows(audits), *_random_rows(audits)):
        table.add_row(*row)
    verdicts = ({None: "-", True: "yes", False: "no"}[audit.faithful] for audit in audits)
    table.add_row(f"faithful ({_name(first)} by adversary ≤ {first.target_loss})", "", *verdicts)
    return table


def _require_comparable(folders: list[Path], circuits: list[Circuit], audits: list[Audit]) -> None:
    shared: dict[str, list[Any]] = {
        "task": [circuit.task for circuit in circuits],
        "target": [circuit.target.sha256 for circuit in circuits],
        "nodes": [circuit.decomposition.sha256 for circuit in circuits],
        "loss": [audit.loss for audit in audits],
        "target_loss": [audit.target_loss for audit in audits],
    }
    for name, values in shared.items():
        for folder, value in zip(folders, values, strict=True):
            if value != values[0]:
                raise UserError(
                    f"{folders[0]} and {folder} differ in {name} ({values[0]} and {value}); expected runs of one kind"
                )


def _name(audit: Audit) -> str:
    return {"kl": "KL", "ce": "CE", "mse": "MSE"}.get(audit.loss, audit.loss)


def _kl_rows(audits: list[Audit]) -> list[tuple[str, ...]]:
    """The KL beside a loss that is another one; the model's own is 0."""
    divergences = [audit.kl for audit in audits if audit.kl is not None]
    if len(divergences) < len(audits):
        return []
    return [
        (f"KL, rest {rest}", "0.000", *(f"{getattr(kl, scheme):.3f}" for kl in divergences))
        for scheme, rest in REST.items()
    ]


def _loss_rows(audits: list[Audit]) -> list[tuple[str, ...]]:
    if audits[0].loss == "ce" and audits[0].task is not None:
        return []  # the task's rows say it
    losses = {
        "complete": [audit.complete_loss for audit in audits],
        "stochastic": [audit.stochastic.mean for audit in audits],
        "adversarial": [audit.adversarial.loss for audit in audits],
    }
    return [
        (f"{_name(audits[0])}, rest {REST[scheme]}", f"{audits[0].model_loss:.3f}", *(f"{loss:.3f}" for loss in values))
        for scheme, values in losses.items()
    ]


def _task_rows(audits: list[Audit]) -> list[tuple[str, ...]]:
    scores = [audit.task for audit in audits if audit.task is not None]
    if len(scores) < len(audits):
        return []
    return [
        (
            f"task CE, rest {rest}",
            f"{scores[0].model.ce:.3f}",
            *(f"{getattr(score, scheme).ce:.3f}" for score in scores),
        )
        for scheme, rest in REST.items()
    ]


def _random_rows(audits: list[Audit]) -> list[tuple[str, ...]]:
    """The share of random circuits of the same size that each circuit beats, the rest ablated."""
    tests = [None if audit.hypothesis_tests is None else audit.hypothesis_tests.sufficiency for audit in audits]
    if all(test is None for test in tests):
        return []
    cells = ("-" if test is None else f"{test.share:.0%} ({test.low:.0%}-{test.high:.0%})" for test in tests)
    return [("better than random circuits, ablated", "", *cells)]


def main(args: list[str] | None = None) -> int:
    """Print the table and return the exit status: 2 for a mistake of the user's, told in one line."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {USAGE}", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    try:
        table = compare([Path(folder) for folder in args])
    except UserError as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    console = Console()
    console.print(table)
    console.print(
        "KL and CE (cross-entropy over the answers to choose from) in nats. The rest: every node "
        "not kept. Faithful means that it survived this attack; that is no certificate.",
        style="dim",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
