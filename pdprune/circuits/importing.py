"""Circuits that were found elsewhere, read from a file so that they can be audited like our own.

Three kinds of files:

- a `circuit.json` of ours; with its `circuit.safetensors` beside it gates and positions are read as well;
- a list of nodes, as lines or as a JSON list. A line is `site:component` or `site component`, where `component` may be
  several: `blocks.0.mlp.down:0-15,20`, or `*` for all; or the label of a node, such as `blocks.0.attn.out:head3`. `#`
  begins a comment. An entry of a JSON list is such a line, or `[site, component]`, or `{"site": ..., "component": ...}`
  with a number, a list of numbers or text, or `{"components": [[site, number], ...]}`;
- a graph of heads and MLPs as EAP-IG and MIB's circuit track write it (`eap_graph.py`).

A node of the model is kept where a component of it is; where that is only a part of its components, it is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdprune.circuits.circuit import JSON_FILE, SCHEMA, TENSOR_FILE, Circuit
from pdprune.circuits.eap_graph import components_of_graph, is_graph
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.files import read_bytes

FOUND_ELSEWHERE = "imported"
"""The scheme of a circuit that was not pruned here."""
NAMED_AT_MOST = 8
"""Of what a line has to tell."""

Component = tuple[str, int]

_LINE = re.compile(r"(?P<site>\S+?)\s*[:\s]\s*(?P<component>\*|\d[\d\s,-]*)")
_EXPECTED = 'site:component, such as blocks.0.mlp.down:0-15 or {"site": "blocks.0.mlp.down", "component": 3}'


def read_circuit(path: str | Path, model: DecomposedModel) -> tuple[Circuit, list[str]]:
    """A circuit of a model from a file, whoever found it, and what has to be said about how it was read.

    Args:
        path: of the file; of a folder its `circuit.json`.
        model: whose nodes the circuit keeps.

    Raises:
        UserError: a file that is missing, damaged or of none of these kinds; that names what the model does not have;
            or a circuit of ours that was made for another model.
    """
    path = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
    content = _content(path)
    notes: list[str] = []
    match content:
        case {"schema": str(schema)} if schema == SCHEMA and path.with_name(TENSOR_FILE).is_file():
            circuit = Circuit.load(path)
            circuit.check_fits(model)
            return circuit, []
        case {"schema": str(schema)} if schema == SCHEMA:
            wanted = _kept_of_ours(path, content, model)
        case dict() if is_graph(content):
            wanted, notes = components_of_graph(path, content, model)
        case list():
            wanted = _components_of_list(path, content, model)
        case _:
            raise UserError(
                f"{path}: it is no circuit; expected a {JSON_FILE}, a list of nodes ({_EXPECTED}), or the JSON of an "
                "EAP-IG graph with nodes and edges"
            )
    return _keeping(model, wanted, notes)


@dataclass(frozen=True)
class _Line:
    """A line of a file that is no JSON."""

    number: int
    text: str


def _content(path: Path) -> Any:
    """What a file holds: JSON, or else its lines, less comments."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text; expected a {JSON_FILE}, a list of nodes, or a graph as JSON") from error
    try:
        return json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] in ("{", "["):
            raise UserError(f"{path}: is damaged or no JSON ({error})") from error
    lines = (_Line(number, line.split("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    return [line for line in lines if line.text]


def _kept_of_ours(path: Path, content: Mapping[str, Any], model: DecomposedModel) -> set[Component]:
    """The kept components of a `circuit.json` that came without its tensors."""
    try:
        made_for, kept = content["target"], content["kept"]
        if made_for["sha256"] != model.target_sha256:
            raise UserError(f"{path}: it was made for another target, {made_for['name']}; expected {model.target_name}")
        if any("positions" in node for node in kept):
            raise UserError(f"{path}: it keeps nodes by position; expected {TENSOR_FILE} beside it, which says where")
        wanted = {(site, index) for node in kept for site, index in node["components"]}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: it lacks or garbles {error}; expected a circuit that pdprune saved") from error
    for site, index in wanted:
        _require_component(str(path), model, site, index)
    return wanted


def _components_of_list(path: Path, entries: list[Any], model: DecomposedModel) -> set[Component]:
    by_label = {node.label: node.components for node in model.nodes}
    wanted: set[Component] = set()
    for number, entry in enumerate(entries):
        where = f"{path}:{entry.number}" if isinstance(entry, _Line) else f"{path}: entry {number}"
        text = entry.text if isinstance(entry, _Line) else entry
        if isinstance(text, str) and text in by_label:
            wanted.update(by_label[text])
            continue
        for site, component in _named_in(where, text):
            wanted.update((site, index) for index in _indices(where, model, site, component))
    if not wanted:
        raise UserError(f"{path}: it names no nodes; expected {_EXPECTED}")
    return wanted


def _named_in(where: str, entry: Any) -> Iterator[tuple[str, Any]]:
    """The sites that an entry names, and what it says of their components."""
    match entry:
        case str() if match := _LINE.fullmatch(entry.strip()):
            yield match["site"], match["component"]
        case {"site": str(site), "component": component} | [str(site), component]:
            yield site, component
        case {"components": [*pairs]} if pairs:
            for pair in pairs:
                yield from _named_in(where, pair if isinstance(pair, list) else None)
        case _:
            shown = entry if isinstance(entry, str) else json.dumps(entry)
            raise UserError(f"{where}: {shown[:60]!r} is no node; expected {_EXPECTED}")


def _indices(where: str, model: DecomposedModel, site: str, component: Any) -> list[int]:
    """The components that are meant by a number, a list of numbers, ranges as text, or `*`."""
    match component:
        case "*":
            found = list(range(model.sites[site].n_components)) if site in model.sites else [0]
        case bool():
            found = []
        case int():
            found = [component]
        case list() if all(type(index) is int for index in component):
            found = component
        case str():
            found = _ranges(component)
        case _:
            found = []
    if not found:
        raise UserError(f"{where}: component {component!r} is none; expected a number, or several such as 0-15,20")
    for index in found:
        _require_component(where, model, site, index)
    return found


def _ranges(text: str) -> list[int]:
    """`0-3,7` is `[0, 1, 2, 3, 7]`; nothing for what is neither number nor range."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            return []
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _require_component(where: str, model: DecomposedModel, site: Any, index: Any) -> None:
    if site not in model.sites:
        raise UserError(f"{where}: no site {site!r} is decomposed; the sites are {', '.join(model.site_names)}")
    count = model.sites[site].n_components
    if type(index) is not int or not 0 <= index < count:
        raise UserError(f"{where}: site {site} has no component {index!r}; expected 0 to {count - 1}")


def _keeping(model: DecomposedModel, wanted: set[Component], notes: list[str]) -> tuple[Circuit, list[str]]:
    """The circuit that keeps every node of which a component is wanted."""
    keep = torch.zeros(model.n_nodes, dtype=torch.bool)
    in_part = []
    for index, node in enumerate(model.nodes):
        n_wanted = sum(component in wanted for component in node.components)
        keep[index] = n_wanted > 0
        if 0 < n_wanted < len(node.components):
            in_part.append(node.label)
    if in_part:
        more = f" and {len(in_part) - NAMED_AT_MOST} more" if len(in_part) > NAMED_AT_MOST else ""
        listed = ", ".join(in_part[:NAMED_AT_MOST]) + more
        notes = [*notes, f"kept whole, though only a part of their components is named: {listed}"]
    return Circuit.of(model, keep, scheme=FOUND_ELSEWHERE), notes
