"""Does half precision find the same circuit? Fits that differ in `trainer.precision` alone, all audited in float32.

    python benchmarks/precision.py                                  # the quickstart: float32 against bf16-mixed
    python benchmarks/precision.py --seeds 0 1 2                    # a row for each, and their mean
    python benchmarks/precision.py --precision 16-mixed --device cuda
    python benchmarks/precision.py --bits 11                        # float16's rounding, where there is no GPU
    python benchmarks/precision.py -- --model.decomposition.target sparse-py   # what follows `--` goes to every fit

Wanted are a Jaccard index of the kept nodes of at least 0.95 and a worst case within 2 %. As a yardstick each float32
fit is held against that of the next seed, with another order of prompts and other starts of the attacks: two circuits
no nearer to each other than that do not differ by precision. A fit that is finished is not made again; fits with other
flags have another folder.

Where selection stops below the target loss is a matter of luck, so that circuits of one ranking may differ by some
nodes. Therefore of both rankings the top of one size is audited besides. And float32's circuits are audited in half
precision too (`model.audit.compute`), which tells the precision of an audit from that of a fit.

On a CPU Lightning makes bfloat16 of float16. With `--bits` the other fits are in float32, and products are rounded to
so many bits while gates are learned (`rounded_products.py`): 11 as in float16, 8 as in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pdprune.circuits.audit import Audit, audit
from pdprune.circuits.circuit import jaccard
from pdprune.claims.recovery import top
from pdprune.files import write_atomically
from pdprune.precision import Compute, computing_in
from pdprune.report.audited_run import AuditedRun
from pdprune.run_folder import RunFolder
from pdprune.train import main as train

JACCARD, WORST_CASE = 0.95, 0.02
COMPUTE: dict[str, Compute] = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""What a precision of the trainer computes matrix products in."""


def in_precision(precision: str) -> list[str]:
    """The flags of a fit in a precision of the trainer's."""
    return ["--trainer.precision", precision]


def in_bits(bits: int) -> list[str]:
    """The flags of a fit in float32 whose products are rounded to so many bits."""
    return ["--trainer.callbacks+=rounded_products.RoundsProducts", f"--trainer.callbacks.bits={bits}"]


def fitted(folder: Path, config: str, how: list[str], seed: int, rest: list[str]) -> dict[str, Any]:
    """The kept nodes, their ranking and the audit of one fit."""
    if not RunFolder(folder).is_finished:
        place = ["--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
        if status := train(["fit", "--config", config, *place, *how, "--seed_everything", str(seed), *rest]):
            sys.exit(status)
    state = torch.load(RunFolder(folder).last, weights_only=True)["state_dict"]
    audit = json.loads((folder / "audit.json").read_text())
    return {
        "kept": set(load_file(folder / "circuit.safetensors")["keep"].flatten().nonzero().squeeze(1).tolist()),
        "ranking": state["openness"].flatten(),
        "worst": audit["adversarial"]["loss"],
        "complete": audit["complete_loss"],
    }


def folder_of(config: str, device: str, rest: list[str]) -> Path:
    """Where the fits of a config with these flags lie."""
    where = [] if device == "cpu" else [device]
    return Path("runs/precision") / "-".join([Path(config).stem, *where, *re.findall(r"[\w.]+", " ".join(rest))])


def loaded(folder: Path, device: str) -> AuditedRun:
    """A finished fit, its model where audits shall be made."""
    run = AuditedRun.load(folder)
    run.model.to(device)
    return run


def compared(run: AuditedRun, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How near two fits are: their circuits, and of both rankings the top of the first one's size.

    Args:
        run: the first fit, on whose prompts the tops are audited, with the audit's own budget.
        one, other: what `fitted` says of both.
    """
    size = len(one["kept"])
    tops = [top(fit["ranking"], size) for fit in (one, other)]
    worst = [audited(run, keep).adversarial.loss for keep in tops]
    return {
        "kept": [size, len(other["kept"])],
        "jaccard": jaccard(one["kept"], other["kept"]),
        "worst_case": [one["worst"], other["worst"]],
        "worst_case_off_by": other["worst"] / one["worst"] - 1,
        "tops": {"jaccard": jaccard(*tops), "worst_case": worst, "worst_case_off_by": worst[1] / worst[0] - 1},
    }


def audited(run: AuditedRun, keep: set[int], compute: Compute = "float32") -> Audit:
    """The audit of a run, of other nodes or computed in another precision."""
    with computing_in(compute, run.model.delta_sites.device):
        return audit(
            run.model,
            keep,
            run.batches,
            loss=run.loss,
            reference=run.reference,
            random_circuits=0,
            max_ablated=run.max_ablated,
            held_out=True,
            seed=run.circuit.seed,
        )


def audited_in_both(run: AuditedRun, fit: dict[str, Any], compute: Compute) -> dict[str, Any]:
    """The worst case of one circuit, found in float32 and in half precision."""
    worst = [audited(run, fit["kept"], how).adversarial.loss for how in ("float32", compute)]
    return {"worst_case": worst, "worst_case_off_by": worst[1] / worst[0] - 1}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The comparisons in Markdown."""
    lines = [
        "| float32 against | nodes kept | Jaccard | worst case | off by | tops: Jaccard | worst case | off by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        kept = "{} / {}".format(*row["kept"])
        lines.append(f"| {name} | {kept} | {_nearness(row)} | {_nearness(row['tops'])} |")
    return "\n".join(lines)


def audits_table(rows: dict[str, dict[str, Any]]) -> str:
    """The audits of the same circuits in Markdown."""
    lines = ["| one circuit, audited in float32 and in | worst case | off by |", "|---|---:|---:|"]
    for name, row in rows.items():
        lines.append("| {} | {:.4f} / {:.4f} | {:+.1%} |".format(name, *row["worst_case"], row["worst_case_off_by"]))
    return "\n".join(lines)


def _nearness(of: dict[str, Any]) -> str:
    return "{:.3f} | {:.4f} / {:.4f} | {:+.1%}".format(of["jaccard"], *of["worst_case"], of["worst_case_off_by"])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and in how many of them both goals are met."""
    similar = statistics.fmean(row["jaccard"] for row in rows)
    off = statistics.fmean(abs(row["worst_case_off_by"]) for row in rows)
    signed = statistics.fmean(row["worst_case_off_by"] for row in rows)
    met = sum(row["jaccard"] >= JACCARD and abs(row["worst_case_off_by"]) <= WORST_CASE for row in rows)
    wanted = f"at least {JACCARD} and within {WORST_CASE:.0%} in {met} of {len(rows)}"
    return f"Jaccard {similar:.3f} in the mean, worst case off by {off:.1%} ({signed:+.1%} with its sign); {wanted}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    half_precision = parser.add_mutually_exclusive_group()
    half_precision.add_argument("--precision", default="bf16-mixed", choices=[*COMPUTE])
    half_precision.add_argument("--bits", type=int, choices=range(4, 24), metavar="4-23", help="of rounded products")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of fits and audits")
    parser.add_argument("rest", nargs="*", help="after `--`: flags of every fit")
    args = parser.parse_args()
    folder = folder_of(args.config, args.device, args.rest)
    rest = ["--trainer.accelerator", {"cpu": "cpu", "cuda": "gpu"}[args.device], *args.rest]

    name, flags = args.precision, in_precision(args.precision)
    if args.bits is not None:
        name, flags = f"{args.bits}-bits", in_bits(args.bits)

    def fit(kind: str, how: list[str], seed: int) -> dict[str, Any]:
        return fitted(folder / f"{kind}-{seed}", args.config, how, seed, rest)

    exact = {seed: fit("32-true", in_precision("32-true"), seed) for seed in (*args.seeds, args.seeds[-1] + 1)}
    runs = {seed: loaded(folder / f"32-true-{seed}", args.device) for seed in args.seeds}
    half = {f"{name}, seed {seed}": compared(run, exact[seed], fit(name, flags, seed)) for seed, run in runs.items()}
    others = {f"seed {b} in place of {a}": compared(runs[a], exact[a], exact[b]) for a, b in itertools.pairwise(exact)}
    audits = {}
    if args.bits is None:
        compute = COMPUTE[args.precision]
        audits = {f"{compute}, seed {seed}": audited_in_both(run, exact[seed], compute) for seed, run in runs.items()}
    about = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "config": args.config, "flags": args.rest}
    write_atomically(folder / f"{name}.json", json.dumps(about | half | others | audits, indent=1).encode())
    print(table(half | others))
    if audits:
        print(audits_table(audits))
    print(f"circuits: {verdict([*half.values()])}")
    print(f"tops of one size: {verdict([row['tops'] for row in half.values()])}")


if __name__ == "__main__":
    main()
