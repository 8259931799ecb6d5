"""Does half precision find the same circuit? Fits that differ in `trainer.precision` alone, all audited in float32.

    python benchmarks/precision.py                                  # the quickstart: float32 against bf16-mixed
    python benchmarks/precision.py --seeds 0 1 2                    # a row for each, and their mean
    python benchmarks/precision.py --precision 16-mixed -- --trainer.accelerator gpu
    python benchmarks/precision.py -- --trainer.max_steps 20        # what follows `--` goes to every fit

Wanted are a Jaccard index of the kept nodes of at least 0.95 and a worst case within 2 %. As a yardstick each float32
fit is held against that of the next seed, with another order of prompts and other starts of the attacks: two circuits
no nearer to each other than that do not differ by precision. A fit that is finished is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pdprune.circuits.circuit import jaccard
from pdprune.claims.intervals import over_seeds
from pdprune.claims.recovery import top
from pdprune.files import write_atomically
from pdprune.run_folder import RunFolder
from pdprune.train import main as train

JACCARD, WORST_CASE = 0.95, 0.02


def fitted(folder: Path, config: str, precision: str, seed: int, rest: list[str]) -> dict[str, Any]:
    """The kept nodes, their ranking and the audit of one fit."""
    if not RunFolder(folder).is_finished:
        place = ["--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
        how = ["--trainer.precision", precision, "--seed_everything", str(seed)]
        if status := train(["fit", "--config", config, *place, *how, *rest]):
            sys.exit(status)
    state = torch.load(RunFolder(folder).last, weights_only=True)["state_dict"]
    audit = json.loads((folder / "audit.json").read_text())
    return {
        "kept": set(load_file(folder / "circuit.safetensors")["keep"].flatten().nonzero().squeeze(1).tolist()),
        "ranking": state["openness"].flatten(),
        "worst": audit["adversarial"]["loss"],
        "complete": audit["complete_loss"],
    }


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How near two fits are: their circuits, and of both rankings the top of the first one's size."""
    size = len(one["kept"])
    return {
        "kept": [size, len(other["kept"])],
        "jaccard": jaccard(one["kept"], other["kept"]),
        "jaccard_of_rankings": jaccard(top(one["ranking"], size), top(other["ranking"], size)),
        "worst_case": [one["worst"], other["worst"]],
        "worst_case_off_by": other["worst"] / one["worst"] - 1,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The comparisons in Markdown."""
    lines = [
        "| float32 against | nodes kept | Jaccard | of the rankings' tops | worst case | off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        kept, worst = "{} / {}".format(*row["kept"]), "{:.4f} / {:.4f}".format(*row["worst_case"])
        nearness = f"{row['jaccard']:.3f} | {row['jaccard_of_rankings']:.3f}"
        lines.append(f"| {name} | {kept} | {nearness} | {worst} | {row['worst_case_off_by']:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "16-mixed"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("rest", nargs="*", help="after `--`: flags of every fit")
    args = parser.parse_args()
    folder = Path("runs/precision") / Path(args.config).stem

    def fit(precision: str, seed: int) -> dict[str, Any]:
        return fitted(folder / f"{precision}-{seed}", args.config, precision, seed, args.rest)

    exact = {seed: fit("32-true", seed) for seed in (*args.seeds, args.seeds[-1] + 1)}
    half = {f"{args.precision}, seed {seed}": compared(exact[seed], fit(args.precision, seed)) for seed in args.seeds}
    others = {f"seed {b} in place of {a}": compared(exact[a], exact[b]) for a, b in itertools.pairwise(exact)}
    about = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "config": args.config, "flags": args.rest}
    write_atomically(folder / "precision.json", json.dumps(about | half | others, indent=1).encode())
    print(table(half | others))
    jaccards = over_seeds([row["jaccard"] for row in half.values()])
    off = over_seeds([row["worst_case_off_by"] for row in half.values()])
    print(f"mean Jaccard {jaccards.show(3)}; worst case off by {100 * off.mean:+.1f} % in the mean", end="")
    print(f" [{100 * off.low:+.1f}, {100 * off.high:+.1f}]" if len(half) > 1 else "")
    passed = jaccards.mean >= JACCARD and abs(off.mean) <= WORST_CASE
    print(f"Jaccard ≥ {JACCARD} and worst case within {WORST_CASE:.0%}, in the mean:", "yes" if passed else "no")


if __name__ == "__main__":
    main()
