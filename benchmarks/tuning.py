"""Circuit size at one audited worst case, by gate map, sparsity term and ascent: the table in docs/tuning.md.

    python benchmarks/tuning.py --target dense-py            # every cell that is not done yet, then the table
    python benchmarks/tuning.py --target dense-py --table    # the table of what is done

Each cell learns gates for the quote task adversarially, to the same target loss. Its size is that of the smallest top
of its ranking whose worst case on held-out prompts, under the audit's attack from four sets of starts, is within 0.9
times the target: bisected there, and not on the select split, so that all cells are compared at one audited worst case.
Nothing is dropped one by one, which would hide how good the ranking is. A cell is saved in runs/tuning when it is done,
so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdprune import CircuitPruner, Decomposition
from pdprune.adversary.objective import Reference, masked_losses
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import as_batch
from pdprune.circuits.gates import Sparsity
from pdprune.circuits.pruning import Learning
from pdprune.circuits.selection import Selection, select_for_loss
from pdprune.claims.experiment import Result, run_cells, saved_cells
from pdprune.claims.intervals import markdown
from pdprune.claims.ranking import learned_ranking
from pdprune.tasks import TaskData

TARGET_LOSS = {"dense-py": 0.15, "sparse-py": 0.3}
"""Task cross-entropy in nats; the models' own on held-out prompts is 0.06 and 0.12."""
SITES = ["*.mlp.down", "*.attn.out"]
FOLDER = Path("runs/tuning")
DEFAULT, FRESH = Learning(), TrainingAdversary()
HARD_CONCRETE = replace(DEFAULT, gate_map="hard_concrete", sparsity=Sparsity("l0"), lr=0.1)
HEAVISIDE = replace(DEFAULT, gate_map="heaviside", sparsity=Sparsity("l0"), lr=0.01)
SMOOTH = Sparsity("smooth_l0", start=1.0, end=0.1)
CELLS: dict[str, dict[str, Any]] = {
    "leaky hard, Σg^p, 4 fresh steps": {},
    "hard concrete, L0, 4 fresh steps": {"learning": HARD_CONCRETE},
    "Heaviside, L0, 4 fresh steps": {"learning": HEAVISIDE},
    "leaky hard, Σg^p, 1 fresh step": {"adversary": replace(FRESH, steps=1, step_size=1.0)},
    "leaky hard, Σg^p, free": {"adversary": replace(FRESH, mode="free", step_size=0.2)},
    "leaky hard, L0, 4 fresh steps": {"learning": replace(DEFAULT, sparsity=Sparsity("l0"))},
    "leaky hard, smooth L0, 4 fresh steps": {"learning": replace(DEFAULT, sparsity=SMOOTH)},
    "leaky hard, Σg^p, 8 fresh steps": {"adversary": replace(FRESH, steps=8, step_size=0.25)},
    "leaky hard, Σg^p, 2 persistent steps": {"adversary": replace(FRESH, mode="persistent", steps=2, step_size=0.2)},
    "leaky hard, Σg^p, 4 fresh steps, 3 times as long": {"times": 3},
    "hard concrete, L0, 4 fresh steps, 3 times as long": {"learning": HARD_CONCRETE, "times": 3},
    "Heaviside, L0, 4 fresh steps, 3 times as long": {"learning": HEAVISIDE, "times": 3},
}


def run_cell(name: str, target: str, steps: int, n_prompts: int, seed: int) -> dict[str, Any]:
    """Learn the gates; then the smallest top of their ranking that withstands the audit's attack."""
    start = time.process_time()
    settings = {key: value for key, value in CELLS[name].items() if key != "times"}
    data = TaskData("quote", target, n_held_out=n_prompts, seed=seed)
    pruner = CircuitPruner(
        Decomposition(target, SITES),
        loss="ce",
        reference="mean",
        target_loss=TARGET_LOSS[target],
        seed=seed,
        **settings,
    )
    learned_ranking(pruner, data, steps * CELLS[name].get("times", 1))
    learned = time.process_time() - start
    reference = Reference.measure("mean", pruner.model, [as_batch(raw) for raw in data.train_batches()], seed)
    losses = masked_losses(pruner.model, [as_batch(raw) for raw in data.held_out_batches()], "ce", reference)
    found = select_for_loss(
        pruner.openness,
        pruner.scorer(losses),
        TARGET_LOSS[target],
        scheme="adversarial",
        selection=Selection(drop_scores=0),
    )
    return {
        "open": int((pruner.gates() > 0.5).sum()),
        "kept": int(found.keep.sum()),
        "of": pruner.model.n_nodes,
        "worst": found.loss,
        "seconds": {"learning": learned, "selection": time.process_time() - start - learned},
    }


def table(results: Sequence[Result]) -> str:
    """What is done, as Markdown: a column of sizes and worst cases for each seed."""
    seeds = sorted({result.cell["seed"] for result in results})
    rows = []
    for name in dict.fromkeys(result.cell["name"] for result in results):
        of_it = {result.cell["seed"]: result.figures for result in results if result.cell["name"] == name}
        sizes = [
            f"{row['kept']:,} of {row['of']:,} ({row['worst']:.3f})" if (row := of_it.get(seed)) else ""
            for seed in seeds
        ]
        seconds = sum(row["seconds"]["learning"] for row in of_it.values()) / len(of_it)
        rows.append([name, *sizes, f"{seconds:.0f}"])
    heads = [f"nodes kept (worst case), seed {seed}" for seed in seeds]
    return markdown(["gate map, sparsity term, ascent", *heads, "CPU s to learn"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="dense-py", choices=sorted(TARGET_LOSS))
    parser.add_argument("--steps", type=int, default=150, help="keep steps of a cell")
    parser.add_argument("--n_prompts", type=int, default=128, help="held-out prompts that sizes are measured on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    args = parser.parse_args()
    cells = [
        {"name": name, "target": args.target, "steps": args.steps, "n_prompts": args.n_prompts, "seed": seed}
        for seed in args.seeds
        for name in CELLS
        if args.only in name
    ]
    results = saved_cells(FOLDER, cells) if args.table else run_cells(FOLDER, cells, run_cell)
    print(table(results))


if __name__ == "__main__":
    main()
