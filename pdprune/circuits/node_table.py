"""The nodes of a circuit as rows: where each one sits in the network, and what the circuit says of it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pdprune.circuits.circuit import Circuit
from pdprune.decomposition import Node

ROLES = (
    ("unembedding", re.compile(r"unembed|lm_head|embed_out")),
    ("embedding", re.compile(r"embed|wte|wpe|^pos$")),
    ("attention", re.compile(r"att")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|fc\d*$")),
)
"""Roles, and the parts of a module path that give them away; the first that fits counts."""
OTHER = "other"


@dataclass(frozen=True)
class Place:
    """Where a site sits, as far as its path tells."""

    layer: int | None
    """The first number in the path; None without one."""
    role: str
    """`embedding`, `attention`, `mlp`, `unembedding` or `other`."""


@dataclass(frozen=True)
class NodeRow:
    """A node of a circuit.

    Attributes:
        node: its index in the model.
        label: its name.
        site: the module path of its components, or several, with spaces between.
        component: their indices in that site, such as `12` or `0-23,40`; of several sites, with spaces between.
        layer, role: of the first site, see `Place`.
        gate: as it was learned; 0 or 1 in a circuit that was not. With gates by position the most open.
        kept: whether the circuit keeps it, at any position.
        worst_source: what the worst source found does with it, 0 ablates and 1 leaves alone; on average over positions
            or examples, and None without an audit.
    """

    node: int
    label: str
    site: str
    component: str
    layer: int | None
    role: str
    gate: float
    kept: bool
    worst_source: float | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


COLUMNS = tuple(field.name for field in dataclasses.fields(NodeRow))


def rows_of(circuit: Circuit, nodes: Mapping[int, Node] | None = None) -> list[NodeRow]:
    """One row a node, by index.

    Args:
        circuit: what is kept, with which gates.
        nodes: the nodes by index, as `dict(enumerate(model.nodes))`; by default the kept ones, which are all that a
            circuit knows by itself.
    """
    gates = _over_rows(circuit.gates).amax(0).tolist()
    source = None if circuit.worst_source is None else _over_rows(circuit.worst_source.float()).mean(0).tolist()
    kept = set(circuit.kept)
    rows = []
    for index, node in sorted((circuit.nodes if nodes is None else nodes).items()):
        site, component = where(node.components)
        place = place_of(node.components[0][0])
        worst = None if source is None else source[index]
        rows.append(
            NodeRow(index, node.label, site, component, place.layer, place.role, gates[index], index in kept, worst)
        )
    return rows


def place_of(site: str) -> Place:
    """The layer and the role of a site, read off its path: `blocks.1.mlp.down` is of layer 1, role `mlp`."""
    parts = site.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), None)
    role = next((role for role, pattern in ROLES if any(pattern.search(part) for part in parts)), OTHER)
    return Place(layer, role)


def where(components: Iterable[tuple[str, int]]) -> tuple[str, str]:
    """The sites of some components, and their indices in each, both with spaces between."""
    by_site: dict[str, list[int]] = {}
    for site, index in components:
        by_site.setdefault(site, []).append(index)
    return " ".join(by_site), " ".join(ranges(indices) for indices in by_site.values())


def ranges(indices: Sequence[int]) -> str:
    """Indices in a few characters: `[0, 1, 2, 7]` is `0-2,7`."""
    by_run = itertools.groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0])
    runs = [[index for _, index in run] for _, run in by_run]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _over_rows(values: Float[Tensor, "*lead n"]) -> Float[Tensor, "rows n"]:
    return values.reshape(-1, values.shape[-1])
