"""Graphs of attention heads and MLPs, as EAP-IG writes them, mapped to the components of a model.

The format is that of `Graph.to_json` in EAP-IG (Hanna et al. 2024, arXiv 2403.17806), which MIB's circuit track takes
too (Mueller et al. 2025, arXiv 2504.13151): `cfg` with `n_layers` and `n_heads`; `nodes` by name, `input`, `a0.h3`,
`m2`, `logits`, each `{"in_graph": ...}` or in older files just true or false; `edges` by name, `a0.h1->m2` or
`m0->a1.h3<q>`, each `{"in_graph": ..., "score": ...}`; and `neurons`, by name or in the nodes.

A node is in the circuit if it is in the graph, or has an edge in the graph:

- `m2`: all components of the MLP's sites in layer 2;
- `a0.h3`: the input columns of head 3 at the output projection of layer 0;
- `input`, `logits`: the embeddings and the unembedding, where these are decomposed.

`neurons` as long as the site has columns choose among those. EAP-IG's own are as long as the residual stream: they say
which dimensions a node writes, which no component is, so that such a node counts as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pdprune.circuits.node_table import place_of
from pdprune.decomposition import DecomposedModel, Site
from pdprune.decomposition.bases import READ_BY_ALL_HEADS, configured_heads
from pdprune.errors import UserError

NAMED_AT_MOST = 8

_NODE = re.compile(r"input|logits|m(?P<mlp>\d+)|a(?P<layer>\d+)\.h(?P<head>\d+)")
_EDGE = re.compile(r"(?P<parent>[^<>]+)->(?P<child>[^<>]+)(<[qkv]>)?")


def is_graph(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is such a graph, as far as its keys tell."""
    return isinstance(content.get("nodes"), dict) and isinstance(content.get("edges", {}), dict)


def components_of_graph(
    path: Path, content: Mapping[str, Any], model: DecomposedModel
) -> tuple[set[tuple[str, int]], list[str]]:
    """The components that a graph keeps, and in words what of it has no counterpart in the model.

    Raises:
        UserError: a graph of another architecture, with nothing in it, or garbled.
    """
    graph = _Graph.read(path, content, model)
    wanted: set[tuple[str, int]] = set()
    mapping = _Mapping(graph, model.sites)
    for name, site in model.sites.items():
        wanted |= {(name, index) for index in mapping.kept_of(name, site)}
    return wanted, mapping.notes()


@dataclass(frozen=True)
class _Graph:
    """What a file says.

    Attributes:
        path: the file.
        n_heads: of every layer.
        d_model: the width of the residual stream; None if neither the file nor an embedding tells.
        names: of all its nodes.
        chosen: names of those in the graph.
        neurons: by name, where there are some.
    """

    path: Path
    n_heads: int
    d_model: int | None
    names: frozenset[str]
    chosen: frozenset[str]
    neurons: Mapping[str, Sequence[bool]]

    @classmethod
    def read(cls, path: Path, content: Mapping[str, Any], model: DecomposedModel) -> _Graph:
        nodes, edges = content["nodes"], content.get("edges", {})
        chosen = {name for name, info in nodes.items() if _in_graph(path, name, info)}
        names = set(nodes)
        for edge, info in edges.items():
            match = _EDGE.fullmatch(edge)
            if match is None:
                raise UserError(f"{path}: {edge!r} is no edge; expected one such as a0.h1->m2 or m0->a1.h3<q>")
            ends = {match["parent"], match["child"]}
            names |= ends
            chosen |= ends if _in_graph(path, edge, info) else set()
        for name in sorted(names):
            if _NODE.fullmatch(name) is None:
                raise UserError(f"{path}: {name!r} is no node; expected input, logits, a0.h1 or m0 and the like")
        if not chosen - {"input", "logits"}:
            raise UserError(
                f"{path}: nothing is in the graph: no node or edge has in_graph true. Scores alone are no circuit; "
                "choose by them first (in EAP-IG, graph.apply_topn(...) before graph.to_json(...))"
            )
        cfg = content["cfg"] if isinstance(content.get("cfg"), dict) else {}
        n_heads = _checked_sizes(path, cfg, names, model)
        widths = (module.embedding_dim for module in model.target.modules() if isinstance(module, nn.Embedding))
        d_model = cfg.get("d_model", next(widths, None))
        return cls(path, n_heads, d_model, frozenset(names), frozenset(chosen), _neurons(path, content))


def _in_graph(path: Path, name: str, info: Any) -> bool:
    """Whether a node or an edge is in the graph."""
    match info:
        case bool():
            return info
        case {"in_graph": bool(chosen)}:
            return chosen
        case {"in_graph": _} | int() | str() | list() | None:
            raise UserError(f'{path}: {name} is {str(info)[:40]}; expected true or false, or {{"in_graph": ...}}')
        case _:
            return False


def _neurons(path: Path, content: Mapping[str, Any]) -> dict[str, Sequence[bool]]:
    """The neurons of nodes, from their own place or the nodes'."""
    own = content.get("neurons")
    found = dict(own) if isinstance(own, dict) else {}
    found |= {
        name: info["neurons"]
        for name, info in content["nodes"].items()
        if isinstance(info, dict) and info.get("neurons") is not None
    }
    for name, neurons in found.items():
        if not isinstance(neurons, list) or not all(value in (0, 1) for value in neurons):
            raise UserError(f"{path}: neurons of {name} are {str(neurons)[:40]}; expected a list of true and false")
    return found


def _checked_sizes(path: Path, cfg: Mapping[str, Any], names: Iterable[str], model: DecomposedModel) -> int:
    """The number of heads; refuses a graph of another architecture than the target's."""
    n_heads = configured_heads(model.target)
    layers = [place_of(name).layer for name, _ in model.target.named_modules()]
    n_layers = 1 + max((layer for layer in layers if layer is not None), default=-1)
    if cfg.get("n_layers", n_layers) != n_layers or cfg.get("n_heads", n_heads) != n_heads:
        raise UserError(
            f"{path}: it is of {cfg.get('n_layers')} layers of {cfg.get('n_heads')} heads; expected those of "
            f"{model.target_name}, {n_layers} of {n_heads}"
        )
    for name in sorted(names):
        match = _NODE.fullmatch(name)
        assert match is not None
        layer, head = match["mlp"] or match["layer"] or 0, match["head"] or 0
        if int(layer) >= n_layers or int(head) >= n_heads:
            raise UserError(f"{path}: there is no {name} in {model.target_name}, {n_layers} layers of {n_heads} heads")
    return n_heads


@dataclass
class _Mapping:
    """Which components of each site a graph keeps, and what was met on the way that has no counterpart."""

    graph: _Graph
    sites: Mapping[str, Site]
    mapped: set[str] = field(default_factory=set)
    as_wholes: set[str] = field(default_factory=set)
    """Nodes whose neurons say something that no component is."""
    undivided: list[str] = field(default_factory=list)
    """Sites that are kept whole, since the graph cannot say which of their components it means."""

    def kept_of(self, name: str, site: Site) -> list[int]:
        """The components of a site that are kept."""
        place, everything = place_of(name), list(range(site.n_components))
        match place.role:
            case "unembedding":
                return everything
            case "embedding":
                self.mapped.add("input")
                return everything if "input" in self.graph.chosen else []
            case "mlp" if place.layer is not None:
                node = f"m{place.layer}"
                self.mapped.add(node)
                return self._columns(node, name, site.n_components)
            case "attention" if place.layer is not None:
                return self._heads(name, site, place.layer)
            case _:
                self.undivided.append(name)
                return everything

    def _heads(self, name: str, site: Site, layer: int) -> list[int]:
        heads = [f"a{layer}.h{head}" for head in range(self.graph.n_heads)]
        self.mapped |= set(heads)
        width, rest = divmod(site.n_components, self.graph.n_heads)
        if not site.reads_columns or name.split(".")[-1] in READ_BY_ALL_HEADS or rest:
            if not self.graph.chosen & set(heads):
                return []
            self.undivided.append(name)
            return list(range(site.n_components))
        return [head * width + column for head, node in enumerate(heads) for column in self._columns(node, name, width)]

    def _columns(self, node: str, name: str, n_columns: int) -> list[int]:
        """Of the columns of a node at a site, those that are kept."""
        neurons, everything = self.graph.neurons.get(node), list(range(n_columns))
        if node not in self.graph.chosen or (neurons is not None and not any(neurons)):
            return []
        if neurons is None:
            return everything
        if len(neurons) == self.graph.d_model:
            self.as_wholes |= set() if all(neurons) else {node}
            return everything
        if len(neurons) == n_columns and self.sites[name].reads_columns:
            return [column for column in everything if neurons[column]]
        if not self._are_columns_elsewhere(name, len(neurons)):
            raise UserError(
                f"{self.graph.path}: {node} has {len(neurons)} neurons; expected {n_columns}, one a column of {name}, "
                f"or {self.graph.d_model}, one a dimension of the residual stream"
            )
        self.undivided.append(name)
        return everything

    def _are_columns_elsewhere(self, name: str, count: int) -> bool:
        """Whether another site of the same layer and role has so many columns, which the neurons choose among."""
        alike = (site for other, site in self.sites.items() if place_of(other) == place_of(name))
        return any(site.reads_columns and site.n_components == count for site in alike)

    def notes(self) -> list[str]:
        """What could not be mapped, a part of a sentence for each kind."""
        unmapped = self.graph.names - self.mapped - {"input", "logits"}
        told = {
            "no site of these is decomposed, so that they are never ablated": _in_order(unmapped),
            "neurons that are dimensions of the residual stream choose no components, so that these count as wholes": (
                _in_order(self.as_wholes)
            ),
            "the graph does not say which components of these sites it keeps, so that all are": self.undivided,
        }
        return [f"{what}: {_listed(names)}" for what, names in told.items() if names]


def _in_order(names: Iterable[str]) -> list[str]:
    """By layer, then heads before MLPs, as the target computes them."""

    def place(name: str) -> tuple[int, int, int]:
        match = _NODE.fullmatch(name)
        assert match is not None
        return int(match["mlp"] or match["layer"] or 0), int(match["mlp"] is not None), int(match["head"] or 0)

    return sorted(names, key=place)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
