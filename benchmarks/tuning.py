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
import json
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from pdprune import CircuitPruner, Decomposition
from pdprune.adversary.objective import Reference, masked_losses
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import as_batch
from pdprune.circuits.gates import Sparsity
from pdprune.circuits.pruning import Learning
from pdprune.circuits.selection import Selection, select_for_loss
from pdprune.files import write_atomically
from pdprune.tasks import TaskData

TARGET_LOSS = {"dense-py": 0.15, "sparse-py": 0.3}
"""Task cross-entropy in nats; the models' own on held-out prompts is 0.06 and 0.12."""
SITES = ["*.mlp.down", "*.attn.out"]
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


def run_cell(target: str, cell: dict[str, Any], steps: int, n_prompts: int, seed: int) -> dict[str, Any]:
    """Learn the gates; then the smallest top of their ranking that withstands the audit's attack."""
    start = time.process_time()
    settings = {name: value for name, value in cell.items() if name != "times"}
    data = TaskData("quote", target, n_held_out=n_prompts, seed=seed)
    pruner = CircuitPruner(
        Decomposition(target, SITES),
        loss="ce",
        reference="mean",
        target_loss=TARGET_LOSS[target],
        seed=seed,
        **settings,
    )
    trainer = Trainer(
        max_steps=steps * cell.get("times", 1),
        accelerator="cpu",
        devices=1,
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(pruner, datamodule=data)
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


def table(folders: list[Path]) -> str:
    """What is done, as Markdown: a column of sizes and worst cases for each seed."""
    seeds = [folder.name.rpartition("-")[2] for folder in folders]
    heads = [f"nodes kept (worst case), seed {seed}" for seed in seeds]
    lines = [
        "| " + " | ".join(["gate map, sparsity term, ascent", *heads, "CPU s to learn"]) + " |",
        "|---" + "|---:" * (len(heads) + 1) + "|",
    ]
    for name in CELLS:
        rows = [_read(folder / f"{_slug(name)}.json") for folder in folders]
        done = [row for row in rows if row]
        if done:
            sizes = [f"{row['kept']:,} of {row['of']:,} ({row['worst']:.3f})" if row else "" for row in rows]
            seconds = sum(row["seconds"]["learning"] for row in done) / len(done)
            lines.append("| " + " | ".join([name, *sizes, f"{seconds:.0f}"]) + " |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="dense-py", choices=sorted(TARGET_LOSS))
    parser.add_argument("--steps", type=int, default=150, help="keep steps of a cell")
    parser.add_argument("--n_prompts", type=int, default=128, help="held-out prompts that sizes are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = Path("runs/tuning")
    folder = runs / f"{args.target}-{args.steps}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, cell in CELLS.items() if not args.table else ():
        path = folder / f"{_slug(name)}.json"
        if path.is_file() or (args.only and args.only not in name):
            continue
        result = run_cell(args.target, cell, args.steps, args.n_prompts, args.seed)
        result |= {"cell": name, "torch": torch.__version__, "seed": args.seed, "steps": args.steps}
        write_atomically(path, json.dumps(result, indent=1).encode())
        print(name, result, flush=True)
    print(table(sorted(runs.glob(f"{args.target}-{args.steps}-*"))))


if __name__ == "__main__":
    main()
