"""What a training step of R levels at once costs, in steps of one: the ratio that one after another would make R.

    python benchmarks/frontier.py                              # on the CPU, one after another
    python benchmarks/frontier.py --device cuda                # as one batch, on a GPU
    python benchmarks/frontier.py --operators                  # how many operators that batch calls; no GPU is needed

All in one process, round after round; a figure is the median over rounds of R levels' time over that of one level in
the same round. On CPU with one thread, and CPU time. A step is a keep step of a fresh adversary under KL, the target's
outputs on the new batch included, the optimiser's step and logging left out. Every MLP neuron and attention channel is
a node.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from lightning import Trainer
from step_cost import Operators, measured_on, random_text, results_file, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pdprune
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.adversary.together import TOKENS_ON_GPU
from pdprune.circuits.frontier import FrontierPruner, Levels
from pdprune.files import write_atomically


class Batches:
    """One batch, as the split that a pruner looks at first."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def train_batches(self) -> list[Any]:
        return [self.batch]

    select_batches = train_batches


class Untrained(FrontierPruner):
    """A frontier whose steps are taken without a trainer."""

    def step(self, batch: Any) -> None:
        loss = MaskedLoss(self.model, batch)
        for theta in self.parameters():
            theta.grad = None
        self._play([loss] * len(self.levels), 0)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


def step_of(model: pdprune.DecomposedModel, batch: Any, n_levels: int) -> Callable[[], None]:
    prices = tuple(0.1 * (level + 1) for level in range(n_levels))
    frontier = Untrained(model, Levels(coefficient=prices), adversary=TrainingAdversary("fresh"))
    frontier.prepare(Batches(batch.raw))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)  # says what step it is
    for level in frontier.levels.values():
        level.trainer = quiet
        torch.nn.init.constant_(level.theta, 0.5)  # every node is free
    frontier.to(model.delta_sites.device)
    return lambda: frontier.step(batch)


def operators_of(step: Callable[[], None], model: pdprune.DecomposedModel) -> int:
    """Operators that a step calls on a GPU, where masks run as one batch and small sites are folded together."""
    with (
        # Of the CPU's own attention PyTorch batches nothing; of this one and of a GPU's it does.
        sdpa_kernel(SDPBackend.MATH),
        mock.patch("pdprune.adversary.objective.how_many_at_once", lambda *_, **__: TOKENS_ON_GPU),
        mock.patch.object(FrontierPruner, "_at_once", lambda *_: TOKENS_ON_GPU),
        mock.patch.object(model, "folds_together", True),
    ):
        step()  # the first one measures and remembers
        with Operators() as operators:
            step()
    return operators.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="dense-py", help="a shipped language model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--operators", action="store_true", help="count operators instead of measuring time")
    parser.add_argument("--json", type=results_file, default="runs/frontier_cost.json")
    args = parser.parse_args()
    target = measured_on(args.target, args.device).requires_grad_(False)
    model = pdprune.decompose(target, ["*.mlp.down", "*.attn.out"], "neuron")
    batch = random_text(target, args.tokens, args.device)
    steps = {levels: step_of(model, batch, levels) for levels in (1, *args.levels)}
    if args.operators:
        counts = {levels: operators_of(step, model) for levels, step in steps.items()}
        print("| levels | operators that a step calls | in those of one level |\n|---:|---:|---:|")
        for levels, count in counts.items():
            print(f"| {levels} | {count:,} | {count / counts[1]:.2f} |")
        return
    for step in steps.values():
        step()
    times = [{levels: seconds(step, args.device) for levels, step in steps.items()} for _ in range(args.rounds)]
    ratios = {levels: statistics.median(each[levels] / each[1] for each in times) for levels in args.levels}
    print("| tokens | levels | a step, in steps of one level |\n|---:|---:|---:|")
    for levels, ratio in ratios.items():
        print(f"| {args.tokens:,} | {levels} | {ratio:.2f} |")
    found = {"device": args.device, "tokens": args.tokens, "torch": torch.__version__, "ratio": ratios}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.json, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
