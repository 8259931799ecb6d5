"""Where a step's time goes: each piece by itself, how near it comes to what the device can do, and what it does most.

    python benchmarks/where_time_goes.py                                        # on the CPU, one thread
    python benchmarks/where_time_goes.py --device cuda --compute bfloat16       # on a GPU, in mixed precision

Pieces are those of `step_cost.py`. *Of peak* is the floating-point operations a second of a piece, counted by PyTorch,
over those of one large square matrix product in the same precision and run: what the device does at its best as seen
here, not as its maker says. *Operators* are those of PyTorch that a piece would call on a GPU, where small sites of one
shape are folded by one product. Then, for the free step and the ascent, the operations in the order of the time that
they take themselves, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import NamedTuple
from unittest import mock

import torch
from step_cost import Case, Operators, Piece, decomposed, measured_on, pieces_of, random_text, results_file, seconds
from torch.utils.flop_counter import FlopCounterMode

from pdprune.decomposition import DecomposedModel
from pdprune.files import write_atomically
from pdprune.precision import Compute, computing_in

PROFILED = ("free", "ascent")
MOST = 8
"""Operations that are listed of a piece."""


class Spent(NamedTuple):
    """What a piece takes.

    Attributes:
        seconds: the median over rounds.
        flops: floating-point operations.
        of_peak: its operations a second over the device's.
        operators: of PyTorch, called; a small network leaves a GPU waiting for the next.
    """

    seconds: float
    flops: int
    of_peak: float
    operators: int


def peak_flops(device: str, compute: Compute, rounds: int) -> float:
    """Operations a second of a large square matrix product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, compute)) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, rounds)


def median_seconds(piece: Piece, device: str, rounds: int) -> float:
    piece()
    return statistics.median(seconds(piece, device) for _ in range(rounds))


def spent(piece: Piece, model: DecomposedModel, device: str, rounds: int, peak: float) -> Spent:
    with FlopCounterMode(display=False) as counter:
        piece()
    with mock.patch.object(model, "folds_together", True):
        piece()  # stacks what is folded together
        with Operators() as operators:
            piece()
    took, flops = median_seconds(piece, device, rounds), counter.get_total_flops()
    return Spent(took, flops, flops / took / peak, operators.count)


def by_operation(piece: Piece, device: str) -> dict[str, float]:
    """The share of a piece's time that each operation takes itself, the most first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        piece()
        if device == "cuda":
            torch.cuda.synchronize()
    of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # What kernels take is told twice: in rows of their own, and in those of the operations that started them.
    rows = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    times = {event.key: float(getattr(event, of)) for event in rows}
    total = sum(times.values())
    return dict(sorted(((name, time / total) for name, time in times.items()), key=lambda item: -item[1])[:MOST])


def table(found: dict[str, Spent]) -> str:
    lines = ["| piece | ms | GFLOP | TFLOP/s | of peak | operators |", "|---|---:|---:|---:|---:|---:|"]
    for name, (took, flops, of_peak, operators) in found.items():
        speed = f"{flops / took / 1e12:.3f} | {of_peak:.0%}"
        lines.append(f"| {name} | {took * 1e3:.1f} | {flops / 1e9:.1f} | {speed} | {operators:,} |")
    return "\n".join(lines)


def operations_table(operations: dict[str, dict[str, float]]) -> str:
    lines = ["| piece | its operations, by the time that they take themselves |", "|---|---|"]
    for name, shares in operations.items():
        lines.append(f"| {name} | {', '.join(f'`{key}` {share:.0%}' for key, share in shares.items())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="dense-py", help="a shipped language model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--components", default="larger", help="of a site: `larger`, or so many times its smaller side")
    parser.add_argument("--k", type=int, default=4, help="steps of a fresh ascent")
    parser.add_argument("--compute", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=results_file, default="runs/where_time_goes.json")
    args = parser.parse_args()
    target = measured_on(args.target, args.device)
    batch = random_text(target, args.tokens, args.device)
    case = Case(target, decomposed(target, args.components), batch, args.tokens, args.components, args.k, "kl")
    compute: Compute = args.compute
    with computing_in(compute, torch.device(args.device)):
        peak = peak_flops(args.device, compute, args.rounds)
        pieces = pieces_of(case)
        found = {name: spent(piece, case.model, args.device, args.rounds, peak) for name, piece in pieces.items()}
        operations = {name: by_operation(pieces[name], args.device) for name in PROFILED}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"{device}, {compute}: peak {peak / 1e12:.3f} TFLOP/s; {args.tokens:,} tokens, C = {args.components}\n")
    print(table(found))
    print()
    print(operations_table(operations))
    content = {
        "device": device,
        "torch": torch.__version__,
        "compute": compute,
        "tokens": args.tokens,
        "components": args.components,
        "peak_flops": peak,
        "pieces": {name: one._asdict() for name, one in found.items()},
        "operations": operations,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
