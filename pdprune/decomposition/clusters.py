"""Components that matter together, grouped into nodes, so that a circuit is pruned over whole mechanisms.

Groups come from a file (`read_clusters`) or from data (`co_important`), and `regroup` makes them the nodes of a model.
Components that are in no group keep the node that they have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.batches import Batch, as_batches, to_device
from pdprune.decomposition.building import Node, default_label
from pdprune.decomposition.importances import CausalImportances, activations, importance_mask, node_importances
from pdprune.decomposition.model import DecomposedModel
from pdprune.errors import UserError
from pdprune.files import read_bytes, write_atomically
from pdprune.progress import moved, span

Components = Sequence[tuple[str, int]]

MOST_NODES = 10_000
"""More than this many at once are not compared: the table of similarities would fill the memory."""
READING = 0.9
"""Share of the work that is spent on reading the data, about."""


def regroup(
    model: DecomposedModel, nodes: Sequence[Components], labels: Sequence[str] | None = None
) -> DecomposedModel:
    """The same components of the same target, in other nodes. The given model stays as it is.

    Args:
        model: its components, and causal importances where it has them, are taken over.
        nodes: groups of `(site, component)`, none in two of them. They come first, in this order; components that none
            names stay together as they are.
        labels: one for each group, for people to read.

    Raises:
        UserError: a group that is empty, or names what is no component or another group's.
    """
    taken = {tuple(component) for group in nodes for component in group}
    labels = [default_label(group) if group else "" for group in nodes] if labels is None else labels
    rest = [tuple(component for component in node.components if component not in taken) for node in model.nodes]
    left = [
        (group, node.label if len(group) == len(node.components) else default_label(group))
        for group, node in zip(rest, model.nodes, strict=True)
        if group
    ]
    grouped = DecomposedModel.from_components(
        model.target,
        {name: (None if site.reads_columns else site.V, site.U) for name, site in model.sites.items()},
        [*nodes, *(group for group, _ in left)],
        [*labels, *(label for _, label in left)],
    )
    grouped.target_name, grouped.recipe = model.target_name, model.recipe
    grouped.folds_together = model.folds_together
    if (options := model.compiled_with) is not None:
        grouped.compile(**options)
    if model.importances is not None:
        importances = CausalImportances(grouped.sites, model.importances.settings)
        importances.load_state_dict(model.importances.state_dict())
        grouped.importances = importances.to(grouped.delta_sites.device).requires_grad_(False)
    return grouped


def regroup_by_file(model: DecomposedModel, path: str | Path) -> DecomposedModel:
    """The model with the groups of a file as its nodes: `read_clusters`, then `regroup`.

    Raises:
        UserError: as they do, naming the file.
    """
    clusters = read_clusters(path)
    try:
        return regroup(model, [cluster.components for cluster in clusters], [cluster.label for cluster in clusters])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def co_important(
    model: DecomposedModel, batches: Iterable[Any], on_above: float = 0.1, together: float = 0.5
) -> list[Node]:
    """Groups of nodes that matter at the same tokens.

    A node is on at a token where its causal importance is above `on_above`; or, in a model without importances, where
    the activation of one of its components is above that share of the largest that the component has on the data. Two
    nodes are as similar as the tokens where both are on are many, among those where either is (Jaccard). The two most
    similar groups are joined until no two are `together` similar on average (average linkage; Sokal & Michener 1958).

    Args:
        model: its nodes are grouped.
        batches: what a DataLoader yields, re-iterable; padding is left out.
        on_above: between 0 and 1.
        together: between 0 and 1; 1 joins only what is on at the very same tokens.

    Returns:
        groups of at least two nodes each, in the order of the first of them. Nodes that are never on are in none.

    Raises:
        UserError: for batches that cannot be read, or too many nodes.
    """
    for name, value in (("on_above", on_above), ("together", together)):
        if not 0 <= value <= 1:
            raise UserError(f"clusters: {name} is {value}; expected a number from 0 to 1")
    with span(0, READING):
        both = _both_on(model, as_batches(batches), on_above)
    alive = both.diagonal().nonzero().squeeze(-1)
    both = both[alive][:, alive]
    count = both.diagonal()
    jaccard = both / (count[:, None] + count[None, :] - both)
    with span(READING, 1):
        joined = join_similar(jaccard, together)
    groups = [[model.nodes[int(alive[i])] for i in group] for group in joined]
    return [_joined(group) for group in groups if len(group) > 1]


def join_similar(similarity: Float[Tensor, "m m"], least: float) -> list[list[int]]:
    """Average linkage: join the two most similar groups until none are `least` similar. Groups by their first member.

    By chains of nearest neighbours (Benzécri 1982), in the time of a few passes over the table: two groups that are
    each other's nearest can be joined at once, and one whose nearest is too far will never be joined.
    """
    table = similarity.double().clone()
    table.fill_diagonal_(-torch.inf)
    members = {i: [i] for i in range(len(table))}
    growing = dict.fromkeys(members)
    chain: list[int] = []
    while growing:
        moved(1 - len(growing) / len(table))
        tip = chain[-1] if chain else next(iter(growing))
        chain = chain or [tip]
        nearest = int(table[tip].argmax())
        if len(chain) > 1 and table[tip, chain[-2]] >= table[tip, nearest]:
            nearest = chain[-2]  # of those that are equally near, or the chain could go round in circles
        if not table[tip, nearest] >= least:
            del growing[tip]
            table[tip], table[:, tip] = -torch.inf, -torch.inf
            chain.clear()  # of just this one: the one before would have been near
        elif len(chain) > 1 and nearest == chain[-2]:
            del chain[-2:]
            _join(table, members, tip, nearest)
            del growing[nearest]
        else:
            chain.append(nearest)
    return sorted(sorted(group) for group in members.values())


def _join(table: Float[Tensor, "m m"], members: dict[int, list[int]], into: int, other: int) -> None:
    """Make one group of two; its similarity to any third is the mean over all pairs of members."""
    sizes = [len(members[group]) for group in (into, other)]
    row = (sizes[0] * table[into] + sizes[1] * table[other]) / sum(sizes)
    table[into], table[:, into] = row, row
    table[into, into] = -torch.inf
    table[other], table[:, other] = -torch.inf, -torch.inf
    members[into] += members.pop(other)


def _joined(nodes: Sequence[Node]) -> Node:
    components = tuple(component for node in nodes for component in node.components)
    return Node(components, f"{nodes[0].label} and {len(nodes) - 1} more")


def _both_on(model: DecomposedModel, batches: Sequence[Batch], on_above: float) -> Float[Tensor, "n n"]:
    """At how many tokens any two nodes are on; on the diagonal, each by itself."""
    if model.n_nodes > MOST_NODES:
        raise UserError(
            f"clusters: the model has {model.n_nodes} nodes; expected at most {MOST_NODES} to compare with one another"
        )
    both = torch.zeros(model.n_nodes, model.n_nodes, dtype=torch.double)
    for on in _on(model, batches, on_above):
        both += (on.float().t() @ on.float()).cpu()  # whole numbers: exact
    return both


def _on(model: DecomposedModel, batches: Sequence[Batch], on_above: float) -> Iterator[Bool[Tensor, "N n"]]:
    """Which nodes are on at each token that is no padding, batch by batch."""
    here = [to_device(batch, model.delta_sites.device) for batch in batches]
    if model.importances is not None:
        for index, batch in enumerate(here):
            moved(index / len(here))
            yield _real(importance_mask(model, batch.inputs) > on_above, batch)
        return
    largest: dict[str, Tensor] = {}
    for index, batch in enumerate(here):
        moved(index / len(here) / 2)
        for name, size in _activation_sizes(model, batch).items():
            most = _real(size, batch).amax(0)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
    for index, batch in enumerate(here):
        moved(0.5 + index / len(here) / 2)
        sizes = _activation_sizes(model, batch)
        shares = {name: size / largest[name].clamp(min=torch.finfo(size.dtype).tiny) for name, size in sizes.items()}
        yield _real(node_importances(shares, model) > on_above, batch)


@torch.no_grad()
def _activation_sizes(model: DecomposedModel, batch: Batch) -> dict[str, Float[Tensor, "*lead C"]]:
    read = model.site_inputs(batch.inputs)
    return {name: activations(site, read[name]).abs() for name, site in model.sites.items()}


def _real(values: Tensor, batch: Batch) -> Tensor:
    """The rows that belong to tokens, without padding: `[N, last]`."""
    mask = batch.attention_mask
    if mask is not None and values.shape[:-1] == mask.shape:
        return values[mask]
    return values.reshape(-1, values.shape[-1])


def write_clusters(path: str | Path, clusters: Sequence[Node]) -> None:
    """Write groups for `read_clusters`: a JSON list of `{"label": ..., "components": [[site, index], ...]}`.

    Raises:
        UserError: if it cannot be written.
    """
    rows = [{"label": cluster.label, "components": [list(pair) for pair in cluster.components]} for cluster in clusters]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomically(Path(path), f"[\n{lines}\n]\n".encode())


def read_clusters(path: str | Path) -> list[Node]:
    """Groups of components from a JSON file, in one of three forms.

    - a list of lists of `[site, index]`
    - a list of `{"components": [[site, index], ...], "label": ...}`, the label optional
    - an object `{"site:index": cluster, ...}`, where null is none, alone or under the key `"clusters"`, as SPD's
      clustering writes it

    Raises:
        UserError: a file that is missing or is none of these.
    """
    path = Path(path)
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: is damaged or no JSON ({error}); expected groups of components") from error
    if isinstance(content, dict):
        clusters = _from_mapping(path, content.get("clusters", content))
    elif isinstance(content, list):
        clusters = [_from_entry(f"{path}: cluster {index}", entry) for index, entry in enumerate(content)]
    else:
        raise UserError(f"{path}: holds a JSON {type(content).__name__}; expected a list of groups, or an object")
    if not clusters:
        raise UserError(f"{path}: holds no groups; expected at least one")
    return clusters


def _from_entry(where: str, entry: Any) -> Node:
    fields = entry if isinstance(entry, dict) else {"components": entry}
    components, label = fields.get("components"), fields.get("label")
    if not isinstance(components, list) or not components or fields.keys() - {"components", "label"}:
        raise UserError(
            f'{where} is {_short(entry)}; expected [[site, index], ...] or {{"label": ..., "components": ...}}'
        )
    for pair in components:
        match pair:
            case [str(), int() as index] if not isinstance(index, bool):
                continue
            case _:
                raise UserError(f"{where} has {_short(pair)}; expected [site, index]")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where} has label {_short(label)}; expected a string")
    group = tuple((site, index) for site, index in components)
    return Node(group, default_label(group) if label is None else label)


def _from_mapping(path: Path, mapping: Any) -> list[Node]:
    if not isinstance(mapping, dict):
        raise UserError(f'{path}: clusters is {_short(mapping)}; expected an object {{"site:index": cluster}}')
    groups: dict[str, list[tuple[str, int]]] = {}
    for key, cluster in mapping.items():
        site, _, index = key.rpartition(":")
        if not site or not index.isdecimal():
            raise UserError(f'{path}: has the key {key!r}; expected "site:index", such as "blocks.0.mlp.down:12"')
        if not isinstance(cluster, str | int | None) or isinstance(cluster, bool):
            raise UserError(f"{path}: {key} has cluster {_short(cluster)}; expected a number, a name, or null for none")
        if cluster is not None:
            groups.setdefault(cluster if isinstance(cluster, str) else f"cluster {cluster}", []).append(
                (site, int(index))
            )
    return [Node(tuple(components), label) for label, components in groups.items()]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
