"""What pruning a circuit costs by the size of its target: the formulas of docs/scale.md, its tables, and their check.

    python benchmarks/scale.py            # the tables
    python benchmarks/scale.py --check    # the formulas against counts on the shipped target dense-py

The network is that of `pdprune/targets/transformer.py`; everything is in float32. Letters: D width of the stream, F of
an MLP, L layers, V vocabulary; N tokens of a batch; I/O in/out of a site, C its components. Of attention the products
with queries, keys and values are counted, not the weighing itself, which is `4·T·D` operations a token and layer
forward (twice and a half that backward) and is most of the work only where T is above 6·D.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import pdprune
from pdprune.adversary.attack import attack
from pdprune.adversary.game import Game
from pdprune.adversary.known_outputs import KnownOutputs
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import as_batch
from pdprune.seeding import generator
from pdprune.targets import load_target

BYTES = 4
Sites = Literal["outputs", "all"]
PATTERNS: dict[Sites, list[str]] = {"outputs": ["*.mlp.down", "*.attn.out"], "all": ["blocks.*", "unembed"]}
"""The sites of the quickstart, and every matrix but the embeddings."""


class Site(NamedTuple):
    """One decomposed matrix."""

    layer: int
    d_in: int
    d_out: int
    reads_masked: bool
    """Whether its input depends on the masks, so that a backward pass goes on through it."""


@dataclass(frozen=True)
class Shape:
    """A transformer."""

    d_model: int
    n_layers: int
    vocab: int
    length: int = 1024

    @property
    def d_mlp(self) -> int:
        return 4 * self.d_model

    @property
    def parameters(self) -> int:
        """`L(4D² + 2DF) + 2VD` and what is small: positions, biases, gains of norms."""
        D, F = self.d_model, self.d_mlp
        of_layer = 4 * (D * D + D) + D * F + F + F * D + D + 2 * D
        return self.n_layers * of_layer + 2 * self.vocab * D + self.length * D + D

    def matrices(self, sites: Sites) -> Iterator[tuple[Site, bool]]:
        """Every matrix but the embeddings, and whether it is a site."""
        D, F = self.d_model, self.d_mlp
        for layer in range(self.n_layers):
            later = layer > 0
            for _ in "qkv":
                yield Site(layer, D, D, later), sites == "all"
            yield Site(layer, D, D, later or sites == "all"), True
            yield Site(layer, D, F, True), sites == "all"
            yield Site(layer, F, D, True), True
        yield Site(self.n_layers, D, self.vocab, True), sites == "all"

    def decomposed(self, sites: Sites) -> int:
        """`Σ I·O` over the sites."""
        return sum(site.d_in * site.d_out for site, is_site in self.matrices(sites) if is_site)

    def nodes(self, sites: Sites) -> int:
        """Of the neuron basis: a node an input column."""
        return sum(site.d_in for site, is_site in self.matrices(sites) if is_site)

    def forward_flops(self, n_tokens: int) -> int:
        """`2N Σ I·O` over all matrices."""
        return 2 * n_tokens * sum(site.d_in * site.d_out for site, _ in self.matrices("all"))

    def ascent_flops(self, sites: Sites, n_tokens: int) -> int:
        """Of one forward and backward pass: gradients of what depends on the masks, and of the sites' weights."""
        through = sum(site.d_in * site.d_out for site, _ in self.matrices(sites) if site.reads_masked)
        return self.forward_flops(n_tokens) + 2 * n_tokens * (through + self.decomposed(sites))

    def keep_step_flops(self, sites: Sites, n_tokens: int, adversary: TrainingAdversary) -> int:
        """Of a whole keep step: the adversary, and the gates' own forward and backward pass.

        Under KL a run over several passes begins with one of the target over the data, which is not counted.
        """
        forward, both = self.forward_flops(n_tokens), self.ascent_flops(sites, n_tokens)
        climbs = adversary.particles * adversary.steps
        match adversary.mode:
            case "fresh" | "persistent":  # the corner where all is ablated, and where each particle ends
                return (1 + adversary.particles) * forward + climbs * both + both
            case "free":
                return both

    def weights_bytes(self, sites: Sites) -> int:
        """The target, and in the neuron basis its columns once more: what is there all the time."""
        return BYTES * (self.parameters + self.decomposed(sites))

    def folded_bytes(self, sites: Sites) -> int:
        """The weights under a mask, and at most as much for their gradients."""
        return 2 * BYTES * self.decomposed(sites)

    def activation_bytes(self, sites: Sites, n_tokens: int) -> int:
        """What a forward pass keeps for the backward one."""
        D, F, L = self.d_model, self.d_mlp, self.n_layers
        if sites == "outputs":
            of_token = (L - 1) * (6 * D + 2 * F) + (2 * D + 2 * F) + D
        else:
            of_token = (L - 1) * (8 * D + 2 * F) + (7 * D + 2 * F) + 2 * D
        return BYTES * n_tokens * of_token

    def total_bytes(self, sites: Sites, n_tokens: int) -> int:
        """The peak of a keep step, but for logits and what the allocator keeps."""
        return self.weights_bytes(sites) + self.folded_bytes(sites) + self.activation_bytes(sites, n_tokens)


def fold_flops(d_in: int, d_out: int, n_components: int) -> int:
    """Of folding one site and of its gradient, each: the product `V diag(m) U`. None for neurons, whose V is 1."""
    return 2 * d_in * d_out * n_components


SHAPES = {
    "1 M": Shape(128, 4, 1024, 256),
    "10 M": Shape(320, 6, 4096, 512),
    "100 M": Shape(768, 12, 8192),
    "1 B": Shape(2048, 18, 32768),
    "3 B": Shape(2560, 36, 32768),
    "8 B": Shape(4096, 34, 128256),
}
TOKENS = 8192


def tables() -> str:
    """What docs/scale.md shows, as Markdown."""
    gib = 2**30
    lines = []
    for sites, what in (("outputs", "MLP and attention outputs"), ("all", "every matrix but the embeddings")):
        lines += [
            f"Sites: {what}, neuron basis, {TOKENS:,} tokens a batch, float32:",
            "",
            "| parameters | nodes | weights, GiB | folded, GiB | activations, GiB | together, GiB "
            "| ascent step, TFLOP | fresh keep step, TFLOP | free, TFLOP |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, shape in SHAPES.items():
            memory = [
                shape.weights_bytes(sites),
                shape.folded_bytes(sites),
                shape.activation_bytes(sites, TOKENS),
                shape.total_bytes(sites, TOKENS),
            ]
            work = [
                shape.ascent_flops(sites, TOKENS),
                shape.keep_step_flops(sites, TOKENS, TrainingAdversary()),
                shape.keep_step_flops(sites, TOKENS, TrainingAdversary("free")),
            ]
            cells = [_short(part / gib) for part in memory] + [_short(part / 1e12) for part in work]
            lines.append(f"| {name} | {shape.nodes(sites):,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def check() -> dict[str, tuple[int, int]]:
    """By formula and by counting, on dense-py."""
    target: Any = load_target("dense-py").module
    config = target.config
    shape = Shape(config.d_model, config.n_layers, config.vocab_size, config.max_length)
    ids = torch.randint(0, config.vocab_size, (3, 67), generator=generator(0, "ids"))  # no matrix is of 201 n entries
    batch = as_batch({"inputs": {"input_ids": ids}, "positions": torch.full((3,), 66)})
    found = {"parameters": (shape.parameters, sum(p.numel() for p in target.parameters()))}
    for sites, patterns in PATTERNS.items():
        model = pdprune.decompose(target, sites=patterns, basis="neuron")
        game = Game([MaskedLoss(model, batch)], [torch.full((model.n_nodes,), 0.5)])
        found[f"nodes, {sites}"] = shape.nodes(sites), model.n_nodes
        game.unablated_loss()  # runs the target, which is no part of an ascent step
        stored = [*target.parameters(), *(site.U for site in model.sites.values())]
        found[f"weights, {sites}"] = shape.weights_bytes(sites), sum(t.nbytes for t in stored)
        entries = torch.full(game.free.shape, 0.5)
        found[f"ascent step, {sites}"] = shape.ascent_flops(sites, ids.numel()), _flops(game.loss_and_gradient, entries)
        saved = _saved_bytes(game, entries)
        found[f"activations, {sites}"] = shape.activation_bytes(sites, ids.numel()), saved
    model = pdprune.decompose(target, sites=PATTERNS["outputs"], basis="neuron")
    known = KnownOutputs.measure(model, [batch])
    assert known is not None

    def fresh_keep_step() -> None:
        loss = MaskedLoss(model, batch, target_output=known.on(batch))
        game = Game([loss], [torch.full((model.n_nodes,), 0.5)])
        # Steps too small to reach a corner, where a climb that stands still would end early.
        game.loss_and_gradient(attack(game, TrainingAdversary(step_size=0.01).ascent, generator(0)).entries)

    wanted = shape.keep_step_flops("outputs", ids.numel(), TrainingAdversary())
    found["fresh keep step, outputs"] = wanted, _flops(fresh_keep_step)
    return found


def _flops(call: Any, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args)
    attention = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" in str(name)
    )
    return counter.get_total_flops() - attention


def _saved_bytes(game: Game, entries: torch.Tensor) -> int:
    """Of the tensors by token that a forward pass keeps, which are neither the model's own nor folded weights."""
    loss = game.losses[0]
    known = {t.untyped_storage().data_ptr() for t in (*loss.model.parameters(), *loss.model.buffers())}
    tokens = loss.leading_shape[0] * loss.leading_shape[1]
    kept: list[torch.Tensor] = []  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        game.loss(entries.requires_grad_())
    of_tokens = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in kept
        if t.numel() % tokens == 0 and t.untyped_storage().data_ptr() not in known
    }
    return sum(of_tokens.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare formulas with counts")
    if not parser.parse_args().check:
        print(tables())
        return
    print("| dense-py | formula | counted | ratio |\n|---|---:|---:|---:|")
    for name, (formula, counted) in check().items():
        print(f"| {name} | {formula:,} | {counted:,} | {formula / counted:.3f} |")


if __name__ == "__main__":
    main()
