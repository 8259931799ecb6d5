"""What the nodes of a shipped language model may be: the bases that claims compare."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.decomposition.checkpoints import load_decomposition
from pdprune.decomposition.clusters import regroup
from pdprune.targets import load_target

CHANNELS, HEADS, READS, SINGULAR, LEARNED = (
    "neurons and channels",
    "neurons and heads",
    "neurons, channels and reads",
    "singular vectors",
    "learned components",
)
MLP, ATTENTION = "*.mlp.down", "*.attn.out"
SITES = [MLP, ATTENTION]
"""What MLPs and attention write. All nodes but reads are of these matrices, so that circuits can be compared."""
BY_ATTENTION = ("q", "k", "v")
"""What reads the stream in attention."""


def in_nodes(target: str, nodes: str) -> DecomposedModel:
    """A shipped language model by nodes of one kind.

    Args:
        target: its name.
        nodes: `neurons and channels`: of the MLPs, and of attention's output. `neurons and heads`: the channels of
            one head together. `neurons, channels and reads`: besides, each channel of the residual stream where
            attention, an MLP or the unembedding reads it, which are the nodes of Gao et al. 2025 (arXiv 2511.13653)
            but for single channels of queries, keys and writes. `singular vectors` of `SITES`; `learned components`,
            those that ship with the target; or else the path of a saved decomposition.

    Raises:
        UserError: a path that holds no decomposition.
    """
    if nodes in (CHANNELS, HEADS, READS, SINGULAR):
        model = _in_basis(load_target(target).module.requires_grad_(False), nodes)
    else:
        model = load_decomposition(target if nodes == LEARNED else nodes, target)
    model.target_name = target
    return model


def _in_basis(module: nn.Module, nodes: str) -> DecomposedModel:
    if nodes == SINGULAR:
        return decompose(module, SITES, "svd")
    if nodes == READS:
        return _with_reads(module)
    model = decompose(module, SITES, "neuron")
    if nodes == CHANNELS:
        return model
    heads = decompose(module, ATTENTION, "head").nodes
    return regroup(model, [head.components for head in heads], [head.label for head in heads])


def _with_reads(module: nn.Module) -> DecomposedModel:
    """A channel that attention reads is one node, whether queries, keys or values read it."""
    readers = [f"*.attn.{name}" for name in BY_ATTENTION]
    model = decompose(module, [*readers, "*.mlp.up", "unembed", *SITES], "neuron")
    reads: list[Sequence[tuple[str, int]]] = []
    labels = []
    for name in model.site_names:
        attention, _, last = name.rpartition(".")
        if last != BY_ATTENTION[0]:
            continue
        for channel in range(model.sites[name].n_components):
            reads.append([(f"{attention}.{reader}", channel) for reader in BY_ATTENTION])
            labels.append(f"{attention}:read{channel}")
    return regroup(model, reads, labels)
