"""What steps cost, in training steps of the target itself on the same batch: time and peak memory.

    python benchmarks/step_cost.py                                            # the grid of docs/speed.md
    python benchmarks/step_cost.py --tokens 8192 --components larger          # the row that goals are set for
    python benchmarks/step_cost.py --tokens 8192 --components larger --audit 0  # and what a whole audit costs
    python benchmarks/step_cost.py --components larger --compile              # with the target's pass compiled
    python benchmarks/step_cost.py --target host --tokens 8 --components 1 --rounds 200 --together  # what the host does

All pieces of a row are measured in one process, one after another and round after round; a figure is the median over
rounds of a piece's time over that of the training step of the same round. On CPU with one thread, and CPU time, so that
whatever else the machine does cancels; on a GPU wall time between two synchronisations.

A training step is cross-entropy to the next token, forward and backward, with gradients of all weights. Every matrix
is a site, with C random components and a delta, and every node is free. `larger` is C = the larger dimension of each
site, a number is so many times its smaller one. Pieces:

    target     a forward pass of the target
    free       one free step: one backward pass for both players. KL to the target's outputs, which are looked up, as
               in a run of several passes over its data, which asks the target for all of them before the first step
    free+      the same where the target runs for them, as in a run of a single pass; `--loss ce` does not ask for any
    ascent     a fresh ascent of K steps, what it is scored against included
    per token  the free step's loss and gradient by the per-token route
    audit      8 restarts of 40 steps, over 8: the whole audit, half of the nodes kept

Memory is what is there all the time (weights, components) and the most that a piece allocates besides.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pdprune
from pdprune.adversary.attack import attack
from pdprune.adversary.game import Game
from pdprune.adversary.known_outputs import KnownOutputs
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import Opponent, TrainingAdversary
from pdprune.batches import Batch, as_batch
from pdprune.circuits.gates import LeakyHardSigmoid, Sparsity
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.files import write_atomically
from pdprune.precision import computing_in
from pdprune.seeding import generator
from pdprune.targets import load_target
from pdprune.targets.transformer import Transformer, TransformerConfig

TOKENS = (512, 2048, 8192, 32768)
COMPONENTS = ("larger", "1", "2", "4", "8")
RESTARTS, STEPS = 8, 40
HOST = "host"
"""The target that has nothing to compute: what is left is the host's work, which a GPU waits for in small networks."""
PER_TOKEN_LIMIT = 8 << 30
"""Bytes beyond which the per-token route is left out."""
GOALS = {"free": 1.15, "ascent": 1.15, "memory": 1.3, "per token": 3.0, "audit": 45.0}

VIEWS = {"alias", "detach", "expand", "permute", "select", "slice", "t", "transpose", "unsqueeze", "view"}
"""Operators that compute nothing."""

Piece = Callable[[], Any]


class Case(NamedTuple):
    """One row: what is measured on."""

    target: nn.Module
    model: DecomposedModel
    batch: Batch
    tokens: int
    components: str
    k: int
    loss: str


def measured_on(name: str, device: str) -> Any:
    """A shipped language model on the device; on a CPU whatever follows has one thread.

    Ends the program with one line where there is no such model or device.
    """
    try:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no GPU here; expected cpu")
        target = (small_work() if name == HOST else load_target(name).module).to(device)
    except (UserError, RuntimeError, AssertionError) as error:  # PyTorch's for a device that there is not
        print("error:", str(error).splitlines()[0], file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and end
    if device == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    return target


def small_work() -> Transformer:
    """The shipped language models' architecture with products that take no time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(TransformerConfig(16, max_length=8, n_layers=2, n_heads=4, d_model=16, d_mlp=64)).eval()


def results_file(text: str) -> Path:
    """An argument of a command line: a file that can be written once everything is measured."""
    path = Path(text)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; expected a file in a folder that can")
    return path


def decomposed(target: nn.Module, components: str) -> DecomposedModel:
    """Random components at every matrix, about as large together as the weight; what they leave over is delta."""
    rng = generator(0, "components")
    pairs = {}
    for name, module in target.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            W = module.weight.detach().cpu()
            d_in, d_out = W.shape if isinstance(module, nn.Embedding) else W.shape[::-1]
            C = max(d_in, d_out) if components == "larger" else int(components) * min(d_in, d_out)
            V = torch.randn(d_in, C, generator=rng) / C**0.5
            U = torch.randn(C, d_out, generator=rng) * W.std() / 2
            pairs[name] = (V.to(module.weight.device), U.to(module.weight.device))
    return DecomposedModel.from_components(target, pairs)


def random_text(target: Any, tokens: int, device: str) -> Batch:
    """Random ids, every position scored."""
    length = min(target.config.max_length, tokens)
    ids = torch.randint(0, target.config.vocab_size, (tokens // length, length), generator=generator(0, "ids"))
    return as_batch({"inputs": {"input_ids": ids.to(device)}, "labels": ids.roll(-1, 1).to(device)})


def training_step(case: Case) -> Piece:
    """The unit: the target as who trains it would run it."""
    trained = copy.deepcopy(case.target).train().requires_grad_()
    labels: Tensor = case.batch.labels  # type: ignore[assignment]

    def step() -> None:
        for parameter in trained.parameters():
            parameter.grad = None
        logits = trained(**case.batch.inputs)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    return step


def target_forward(case: Case) -> Piece:
    @torch.no_grad()
    def forward() -> None:
        case.target(**case.batch.inputs)

    return forward


def free_step(case: Case, known: KnownOutputs | None) -> Piece:
    """Both players move along the gradients of one backward pass."""
    device = case.model.delta_sites.device
    gate_map, sparsity = LeakyHardSigmoid(), Sparsity()
    theta = gate_map.initial((case.model.n_nodes,), generator(0)).to(device) * 0.5
    theta = theta.requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.01)
    n_entries = case.model.n_nodes + case.model.n_sites
    opponent = Opponent(TrainingAdversary("free", step_size=0.01), (), n_entries, seed=0).to(device)

    def step() -> None:
        target_output = None if known is None else known.on(case.batch)
        loss = MaskedLoss(case.model, case.batch, case.loss, target_output=target_output)
        game = Game([loss], [gate_map.gates(theta)])
        entries = opponent.sources[0].clone().requires_grad_()
        total = game.mean_loss(entries) + 0.01 * sparsity(gate_map.presence(theta), 0.5)
        adam.zero_grad()
        total.backward()
        assert entries.grad is not None
        opponent.learn(game, 0, entries.grad)
        adam.step()

    return step


def ascent(case: Case, known: MaskedLoss) -> Piece:
    """K sign steps from one start, as a fresh adversary takes them before a keep step."""
    game = Game([known], [torch.full((case.model.n_nodes,), 0.5, device=case.model.delta_sites.device)])
    climb = TrainingAdversary(steps=case.k, step_size=2 / case.k).ascent
    return lambda: attack(game, climb, generator(0))


def gradient_by(case: Case, known: MaskedLoss, *, per_token: bool) -> Callable[[], Tensor]:
    """The gradient on one shared mask, folded into weights or spread over the tokens."""
    device = case.model.delta_sites.device
    mask = torch.rand(case.model.n_nodes, generator=generator(0, "mask")).to(device)
    deltas = torch.full((case.model.n_sites,), 0.5, device=device)
    lead = (case.batch.size, 1) if per_token else ()

    def step() -> Tensor:
        leaves = mask.clone().requires_grad_(), deltas.clone().requires_grad_()
        spread = (leaf.expand(*lead, -1) for leaf in leaves)
        return torch.cat(torch.autograd.grad(known.per_example(*spread).mean(), leaves))

    return step


def per_token_bytes(case: Case) -> int:
    """About what the per-token route keeps: three numbers a component and token."""
    return 3 * 4 * case.tokens * sum(site.n_components for site in case.model.sites.values())


def pieces_of(case: Case) -> dict[str, Piece]:
    known = MaskedLoss(case.model, case.batch, case.loss)
    known.unablated()  # runs the target
    pieces: dict[str, Piece] = {
        "train": training_step(case),
        "target": target_forward(case),
        "free": free_step(case, KnownOutputs.measure(case.model, [case.batch]) if case.loss == "kl" else None),
        "free+": free_step(case, None),
        "ascent": ascent(case, known),
    }
    if per_token_bytes(case) < PER_TOKEN_LIMIT:
        folded, spread = (gradient_by(case, known, per_token=where) for where in (False, True))
        with computing_in("float32", case.model.delta_sites.device):  # two routes, one gradient
            torch.testing.assert_close(folded(), spread(), rtol=1e-3, atol=1e-5)
        pieces["per token"] = spread
    return pieces


def seconds(piece: Piece, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        piece()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    piece()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def peak_bytes(piece: Piece, device: str) -> int:
    """The most that is allocated at once while a piece runs, beyond what was there before."""
    piece()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        piece()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        piece()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def resident_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def measured(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """One row: every piece over the training step of its round, and its peak over that of the training step."""
    pieces = pieces_of(case)
    held = {name: resident_bytes(case.target if name in ("train", "target") else case.model) for name in pieces}
    held["free"] += case.tokens * case.target.config.vocab_size * 4 if case.loss == "kl" else 0  # known outputs
    memory = {name: held[name] + peak_bytes(piece, device) for name, piece in pieces.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, piece in pieces.items():
            times[name].append(seconds(piece, device))
    ratios = {
        name: statistics.median(one / unit for one, unit in zip(spent, times["train"], strict=True))
        for name, spent in times.items()
    }
    return {
        "tokens": case.tokens,
        "components": case.components,
        "k": case.k,
        "loss": case.loss,
        "n_nodes": case.model.n_nodes,
        "seconds": times,
        "ratio": ratios,
        "memory_bytes": memory,
        "memory_ratio": {name: bytes_ / memory["train"] for name, bytes_ in memory.items()},
    }


def audited(case: Case, device: str, random_circuits: list[int]) -> dict[str, float]:
    """Training steps that a restart of an audit costs, all else that the audit does included."""
    train = training_step(case)
    keep = torch.rand(case.model.n_nodes, generator=generator(0, "keep")) < 0.5
    train()
    before = [seconds(train, device) for _ in range(5)]

    def run(n: int) -> Piece:
        return lambda: pdprune.audit(
            case.model, keep, [case.batch], steps=STEPS, restarts=RESTARTS, random_circuits=n, loss=case.loss
        )

    spent = {f"{n} random circuits": seconds(run(n), device) for n in random_circuits}
    after = [seconds(train, device) for _ in range(5)]
    unit = statistics.median(before + after)
    return {name: time / unit / RESTARTS for name, time in spent.items()}


def row(found: dict[str, Any]) -> str:
    ratio, memory, k = found["ratio"], found["memory_ratio"], found["k"]
    per_token = f"{ratio['per token']:.1f} | {memory['per token']:.1f}" if "per token" in ratio else "— | —"
    return (
        f"| {found['tokens']:,} | {found['components']} | {ratio['target']:.2f} | {ratio['free']:.2f} "
        f"| {ratio['free+']:.2f} | {ratio['ascent'] / (k + 1):.2f} | {memory['free']:.2f} | {memory['ascent']:.2f} "
        f"| {per_token} |"
    )


HEADER = (
    "| tokens | C | target forward | free step | free step, target included | ascent / (K+1) | memory, free "
    "| memory, ascent | per token | memory, per token |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def audit_header(random_circuits: list[int]) -> str:
    columns = ["tokens", "C", *(f"{n} random circuits" for n in random_circuits)]
    return f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="dense-py", help="a shipped language model, or `host`")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--components", nargs="+", default=COMPONENTS)
    parser.add_argument("--k", type=int, default=4, help="steps of a fresh ascent")
    parser.add_argument("--loss", choices=["kl", "ce"], default="kl", help="ce asks for no outputs of the target")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="the masked target's pass by torch.compile; the unit is not"
    )
    parser.add_argument(
        "--together", action="store_true", default=None, help="fold small sites of one shape together, as on a GPU"
    )
    parser.add_argument(
        "--audit", type=int, nargs="+", metavar="N", help="measure audits instead, with N random circuits; takes long"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=results_file, default="runs/step_cost.json")
    args = parser.parse_args()
    target = measured_on(args.target, args.device)
    print(audit_header(args.audit) if args.audit else HEADER)
    rows = []
    for tokens in args.tokens:
        batch = random_text(target, tokens, args.device)
        for components in args.components:
            case = Case(target, decomposed(target, components), batch, tokens, components, args.k, args.loss)
            case.model.folds_together = args.together
            if args.compile:
                case.model.compile()
            if args.audit:
                found: dict[str, Any] = {
                    "tokens": tokens,
                    "components": components,
                    "audit": audited(case, args.device, args.audit),
                }
                print(
                    f"| {tokens:,} | {components} | {' | '.join(f'{steps:.1f}' for steps in found['audit'].values())} |"
                )
            else:
                found = measured(case, args.rounds, args.device)
                print(row(found))
            rows.append(found)
            sys.stdout.flush()
    machine = {
        "device": args.device,
        "compiled": args.compile,
        "folded together": args.together,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.json, json.dumps({"goals": GOALS, "machine": machine, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
