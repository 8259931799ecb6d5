"""Does learning find the components that are known to be there? The tables of known answers in docs/decompositions.md.

    python benchmarks/recovery.py tms_5-2 --seeds 0 7 9 --starts 4      # what is not done yet, then the table
    python benchmarks/recovery.py tms_40-10 --seeds 0 1 2
    python benchmarks/recovery.py resid_mlp1 --seeds 0
    python benchmarks/recovery.py tms_5-2 --seeds 0 --mode adversarial

Each seed trains a target by `configs/targets/<toy>.yaml`, says whether it represents every feature, and learns its
components by `configs/decompose/<toy>.yaml`; both are runs of the command line, in `runs/recovery`. Learning is not
convex: with several starts it is done from as many random ones, and that of least loss counts, which asks for no
known answer.

A feature's component is the one that points most nearly its way, of those that are alive, that is, matter to some
feature. The figures over all components stand beside: in few dimensions some dead component of length next to none may
point as near by chance, and then it is the one whose length is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from pdprune.loggers import read_metrics
from pdprune.run_folder import METRICS_FILE
from pdprune.train import main as pdprune_train

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = Path("runs/recovery")


def target_of(toy: str, seed: int) -> Path:
    """The run folder of a target, trained unless it is there."""
    run = RUNS / f"{toy}-target-{seed}"
    fit(run, run / "representation.json", CONFIGS / "targets" / f"{toy}.yaml", "--seed_everything", str(seed))
    return run


def components_of(toy: str, seed: int, mode: str, target: Path, start: int) -> Path:
    """The run folder of a decomposition of that target, learned unless it is there."""
    run = RUNS / (f"{toy}-{mode}-{seed}" + (f"-start-{start}" if start else ""))
    own_seed = seed + 100 * start
    options = ["--seed_everything", str(own_seed), "--model.mode", mode, "--model.target", str(target / "target")]
    fit(run, run / "decomposition_audit.json", CONFIGS / "decompose" / f"{toy}.yaml", *options)
    return run


def fit(run: Path, result: Path, config: Path, *options: str) -> None:
    """A run of the command line, gone on with where it was stopped."""
    if result.is_file():
        return
    resume = ["--ckpt_path", "last"] if (run / "checkpoints").is_dir() else []
    place = ["--trainer.default_root_dir", str(run)]
    if status := pdprune_train(["fit", "--config", str(config), *options, *place, *resume]):
        sys.exit(status)


def final_loss(run: Path) -> float:
    """The mean training loss over the last tenth of the steps."""
    losses = [loss for loss in read_metrics(run / METRICS_FILE)["loss"] if loss is not None]
    return fmean(losses[-max(1, len(losses) // 10) :])


def rows(seed: int, start: str, target: Path, components: Path) -> list[str]:
    """The lines of a start in the table, one a site whose answer is known."""
    representation = json.loads((target / "representation.json").read_text())
    audit = json.loads((components / "decomposition_audit.json").read_text())
    complete = "yes" if representation["represents_every_feature"] else f"no: {representation['missing']}"
    losses = audit["reconstruction"]
    longest = max((int(name.rpartition("_")[2]) for name in losses if name.startswith("adversarial_")), default=None)
    by_scheme = [f"{losses[name]:.2g}" for name in ("complete", "stochastic", "adversarial")]
    if longest is not None:
        by_scheme[-1] += f"; {losses[f'adversarial_{longest}']:.2g}"
    lines = []
    for site, known in audit["known_answers"].items():
        alive = known.get("of_alive", known)
        found = [number(of, name) for name in ("mean_max_cosine_similarity", "mean_l2_ratio") for of in (alive, known)]
        cells = [
            str(seed),
            complete,
            start,
            f"{final_loss(components):.3e}",
            site,
            *found,
            f"{known['one_to_one']:.0%}",
            *by_scheme,
            f"{losses['ablated']:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(known: dict[str, Any], name: str) -> str:
    """A figure of a site; empty where it has no meaning there."""
    return f"{known[name]:.4f}" if name in known else ""


HEAD = [
    "seed",
    "every feature represented",
    "start",
    "loss",
    "site",
    "mean max cosine similarity, of alive",
    "of all",
    "mean L2 ratio, of alive",
    "of all",
    "features with a component of their own",
    "MSE, complete",
    "stochastic",
    "adversarial, first and last rung",
    "all ablated",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toy", choices=sorted(path.stem for path in (CONFIGS / "targets").glob("[tr]*[0-9].yaml")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", type=int, default=1, help="random starts for each target")
    parser.add_argument("--mode", default="stochastic", choices=["stochastic", "adversarial"])
    args = parser.parse_args()
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for seed in args.seeds:
        target = target_of(args.toy, seed)
        runs = [components_of(args.toy, seed, args.mode, target, start) for start in range(args.starts)]
        best = min(runs, key=final_loss)
        for start, run in enumerate(runs):
            lines += rows(seed, f"{start}{', least loss' if run == best and len(runs) > 1 else ''}", target, run)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
