"""How the nodes of a circuit act on one another and on the answer: gradient × activation, path by path.

The edge from node u to node v is what u's activation adds to v's, along paths that meet no other kept node, times what
v's activation does to the answer (Marks et al. 2024, "Sparse Feature Circuits", arXiv 2403.19647; stop-gradients at the
other nodes as in Syed et al. 2023, arXiv 2310.10348, and Bushnaq et al. 2026). So all edges are in one unit, that of
the answer, and what goes out of a node sums to its effect:

    effect(u) = direct(u) + Σ_v edge(u, v)

Everything is to first order around the unablated target. Attention carries across positions, with the pattern it has
and by changing the pattern; edges are summed over positions and averaged over examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pdprune.batches import Batch, output_of, to_device
from pdprune.decomposition import DecomposedModel, Site
from pdprune.decomposition.references import from_reference
from pdprune.decomposition.sites import at_least_float32
from pdprune.errors import UserError
from pdprune.losses import answers, scored_positions


@dataclass(frozen=True)
class Edges:
    """What the nodes of a circuit do to one another and to the answer.

    Attributes:
        nodes: by index in the model; rows and columns below are in this order.
        strength: `[u, v]`, from u to v; 0 where no path leads.
        direct: on the answer, along paths that meet no other of the nodes.
        effect: on the answer, along all paths.
    """

    nodes: list[int]
    strength: Float[Tensor, "k k"]
    direct: Float[Tensor, " k"]
    effect: Float[Tensor, " k"]


def edges_of(
    model: DecomposedModel,
    nodes: Sequence[int],
    batch: Batch,
    *,
    classes: bool,
    reference: Mapping[str, Tensor] | None = None,
) -> Edges:
    """Trace how nodes act on one another on some examples.

    Args:
        model: the decomposed target.
        nodes: those that stop one another's gradients: a circuit's.
        batch: the examples; cost grows with their number times that of the nodes.
        classes: whether outputs are logits, so that there is an answer (see `answer_score`).
        reference: activations are measured from their value on these inputs, by site; None is zero.

    Raises:
        UserError: a site that the target calls several times, or never.
    """
    nodes = list(nodes)
    here = to_device(batch, model.delta_sites.device)
    with torch.enable_grad(), _cut_at(model, nodes, reference) as cuts:
        output = output_of(model(here.inputs))
        score = answer_score(output, here, classes)
    reached = [cuts[name] for name in cuts]  # in the order in which the target called them
    for name in components_by_site(model, nodes):
        if name not in cuts:
            raise UserError(f"site {name!r} is never called in a forward pass: no path can be traced through it")

    leaves = [cut.leaf for cut in reached]
    direct = _gradients(score, torch.ones_like(score), leaves)
    total = [gradient.clone() for gradient in direct]
    for later in reversed(range(len(reached))):
        through = _gradients(reached[later].read, total[later], leaves[:later])
        for earlier, gradient in enumerate(through):
            total[earlier] += gradient

    strength = torch.zeros(len(nodes), len(nodes))
    for later, cut in enumerate(reached):
        for node in cut.owner.unique().tolist():
            of_node = torch.where(cut.owner == node, total[later], 0.0)
            through = _gradients(cut.read, of_node, leaves[:later])
            for earlier, gradient in enumerate(through):
                strength[:, node] += _by_node(gradient * leaves[earlier], reached[earlier].owner, len(nodes))
    strength.fill_diagonal_(0)  # a node of several sites is no path to itself
    size = here.size
    return Edges(
        nodes,
        strength / size,
        _summed(direct, reached, len(nodes)) / size,
        _summed(total, reached, len(nodes)) / size,
    )


def answer_score(output: Tensor, batch: Batch, classes: bool) -> Float[Tensor, " B"]:
    """What effects are measured on: how clearly each example gets the answer that it gets.

    With classes, the answer's log-odds against the others (of the batch's `choices`, where it has them), averaged over
    scored positions. Unlike a loss against the target itself it has a gradient at the target. Otherwise the output's
    length along its own direction.
    """
    if not classes:
        flat = output.reshape(batch.size, -1).float()
        return (flat * torch.nn.functional.normalize(flat.detach(), dim=-1)).sum(-1)
    scored = scored_positions(output, batch)
    rows = scored.rows(output)
    chosen = answers(output, batch)[:, None]
    among = torch.ones_like(rows, dtype=torch.bool)
    if batch.choices is not None:
        choices = batch.choices[scored.example]
        among = torch.zeros_like(among).scatter(-1, choices.clamp(min=0), choices >= 0)
    others = rows.masked_fill(~among.scatter(-1, chosen, False), -torch.inf)
    return scored.mean_by_example(rows.gather(-1, chosen).squeeze(-1) - others.logsumexp(-1), batch.size)


@dataclass(frozen=True)
class _Cut:
    """The kept components of a site in one run: what they read, and the leaves that stand for it further on."""

    read: Float[Tensor, "*lead k"]
    leaf: Float[Tensor, "*lead k"]
    owner: Int[Tensor, " k"]
    """Each component's node, as its place among the nodes that are traced."""


@contextmanager
def _cut_at(
    model: DecomposedModel, nodes: Sequence[int], reference: Mapping[str, Tensor] | None
) -> Iterator[dict[str, _Cut]]:
    """While this lasts, gradients of a run of the target stop at what the nodes' components read.

    Outputs are what they were: each site's gets `(leaf - read) U` added, which is zero but turns gradients to the leaf.
    """
    cuts: dict[str, _Cut] = {}
    handles = []

    def hook_for(site: Site, components: Tensor, owner: Tensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if site.name in cuts:
                raise UserError(f"site {site.name!r} is called several times in a forward pass: paths are not traced")
            x = args[0] if args else next(iter(kwargs.values()))
            read = from_reference(site, x, None if reference is None else reference[site.name], components)
            leaf = read.detach().requires_grad_()
            cuts[site.name] = _Cut(read, leaf, owner)
            added: Tensor = (leaf - read) @ at_least_float32(site.U[components])
            return output + added.to(output.dtype)

        return hook

    try:
        for name, (components, owner) in components_by_site(model, nodes).items():
            module = model.target.get_submodule(name)
            handles.append(
                module.register_forward_hook(hook_for(model.sites[name], components, owner), with_kwargs=True)
            )
        yield cuts
    finally:
        for handle in handles:
            handle.remove()


def components_by_site(model: DecomposedModel, nodes: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site that nodes live in: their components there, and the place among `nodes` of each one's node."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for place, node in enumerate(nodes):
        for site, component in model.nodes[node].components:
            components, owner = found.setdefault(site, ([], []))
            components.append(component)
            owner.append(place)
    device = model.delta_sites.device
    return {
        name: (torch.tensor(components, device=device), torch.tensor(owner, device=device))
        for name, (components, owner) in found.items()
    }


def _gradients(output: Tensor, weight: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of `Σ output · weight` on each leaf; zero where no path leads."""
    if not leaves or not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(output, leaves, weight, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def _by_node(values: Float[Tensor, "*lead k"], owner: Int[Tensor, " k"], n: int) -> Float[Tensor, " n"]:
    """Sums over examples, positions and each node's components."""
    return torch.zeros(n).index_add(0, owner.cpu(), values.detach().reshape(-1, len(owner)).sum(0).float().cpu())


def _summed(gradients: Sequence[Tensor], cuts: Sequence[_Cut], n: int) -> Float[Tensor, " n"]:
    """Gradient × activation of every node."""
    total = torch.zeros(n)
    for gradient, cut in zip(gradients, cuts, strict=True):
        total += _by_node(gradient * cut.leaf, cut.owner, n)
    return total
