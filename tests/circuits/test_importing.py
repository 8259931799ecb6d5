"""Circuits that were found elsewhere: which nodes the files name, and what is wrong with files that name none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_circuit import network

from pdprune import Circuit, DecomposedModel, UserError, decompose
from pdprune.circuits.importing import read_circuit

SITES = ["*.mlp.down", "*.attn.out"]
OUT, DOWN = "blocks.0.attn.out", "blocks.0.mlp.down"


@pytest.fixture(scope="module")
def neurons() -> DecomposedModel:
    """8 channels of attention, those of head 1 from the fifth on, then 16 neurons."""
    return decompose(network(), SITES, "neuron")


@pytest.fixture(scope="module")
def heads() -> DecomposedModel:
    return decompose(network(), ["*.attn.out"], "head")


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def kept(model: DecomposedModel, path: Path) -> list[str]:
    circuit, _ = read_circuit(path, model)
    return [model.nodes[node].label for node in circuit.kept]


# -- lists of nodes


@pytest.mark.parametrize(
    "content",
    [
        f"# found by hand\n{OUT}:0-1\n\n{DOWN} 3, 5  # two neurons\n",
        f"{OUT}: 0,1\n{DOWN}\t3\n{DOWN}:5-5\n",
        [{"site": OUT, "component": 0}, {"site": OUT, "component": [1]}, {"site": DOWN, "component": "3,5"}],
        [[OUT, 0], [OUT, "1"], [DOWN, 3], [DOWN, 5]],
        [f"{OUT}:0-1", f"{DOWN} 3,5"],
        [{"components": [[OUT, 0], [OUT, 1]], "label": "a"}, {"components": [[DOWN, 3], [DOWN, 5]]}],
    ],
)
def test_forms_of_a_list(content: Any, neurons: DecomposedModel, tmp_path: Path) -> None:
    assert kept(neurons, write(tmp_path / "nodes", content)) == [f"{OUT}:0", f"{OUT}:1", f"{DOWN}:3", f"{DOWN}:5"]


def test_labels_and_whole_sites(neurons: DecomposedModel, heads: DecomposedModel, tmp_path: Path) -> None:
    assert kept(heads, write(tmp_path / "nodes", f"{OUT}:head1\n")) == [f"{OUT}:head1"]
    assert kept(neurons, write(tmp_path / "nodes", f"{OUT}:*")) == [f"{OUT}:{channel}" for channel in range(8)]


def test_a_node_that_is_named_in_part_is_kept_and_told(heads: DecomposedModel, tmp_path: Path) -> None:
    circuit, notes = read_circuit(write(tmp_path / "nodes", f"{OUT}:5"), heads)
    assert circuit.kept == [1]
    assert notes == [f"kept whole, though only a part of their components is named: {OUT}:head1"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "names no nodes"),
        ("# nothing\n", "names no nodes"),
        ("[]", "names no nodes"),
        (f"{OUT}:1\nblocks.7.mlp.down:3\n", "nodes:2: no site 'blocks.7.mlp.down' is decomposed; the sites are"),
        (f"{DOWN}:16", "has no component 16; expected 0 to 15"),
        (f"{DOWN}:0-99", "has no component 16; expected 0 to 15"),
        (f"{DOWN}:5-3", "component '5-3' is none"),
        ([[DOWN, 1.5]], "component 1.5 is none"),
        ([[DOWN, True]], "component True is none"),
        ([[DOWN, -1]], "has no component -1"),
        ("blocks.9.mlp.down:*", "no site 'blocks.9.mlp.down'"),
        ("rubbish", "'rubbish' is no node; expected site:component"),
        ([{"site": DOWN}], "is no node"),
        ([{"components": [DOWN]}], "is no node"),
        ([3], "entry 0"),
        ("[1, 2", "is damaged or no JSON"),
        ({"weights": 3}, "it is no circuit"),
        ("3", "it is no circuit"),
    ],
)
def test_wrong_lists(content: Any, says: str, neurons: DecomposedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_circuit(write(tmp_path / "nodes", content), neurons)
    assert says in str(refused.value) and str(tmp_path / "nodes") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(neurons: DecomposedModel, tmp_path: Path) -> None:
    (tmp_path / "graph.pt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(UserError, match="is no text"):
        read_circuit(tmp_path / "graph.pt", neurons)
    with pytest.raises(UserError, match="No such file"):
        read_circuit(tmp_path / "nowhere.json", neurons)


# -- our own


def test_a_circuit_of_ours_with_and_without_its_tensors(neurons: DecomposedModel, tmp_path: Path) -> None:
    keep = torch.arange(24) % 3 == 0
    Circuit.of(neurons, keep, keep * 0.75, scheme="complete").save(tmp_path)
    circuit, notes = read_circuit(tmp_path, neurons)
    assert torch.equal(circuit.keep, keep) and circuit.scheme == "complete" and float(circuit.gates.max()) == 0.75
    assert notes == []

    (tmp_path / "circuit.safetensors").unlink()
    circuit, _ = read_circuit(tmp_path / "circuit.json", neurons)
    assert torch.equal(circuit.keep, keep) and circuit.scheme == "imported"


def test_circuits_of_ours_for_others(neurons: DecomposedModel, tmp_path: Path) -> None:
    other = network()
    with torch.no_grad():
        other.blocks[0].mlp.down.weight[0, 0] += 1
    Circuit.of(decompose(other, SITES, "neuron"), torch.ones(24)).save(tmp_path)
    with pytest.raises(UserError, match="made for the target"):
        read_circuit(tmp_path, neurons)
    (tmp_path / "circuit.safetensors").unlink()
    with pytest.raises(UserError, match="made for another target"):
        read_circuit(tmp_path, neurons)

    Circuit.of(neurons, torch.ones(5, 24)).save(tmp_path)
    assert read_circuit(tmp_path, neurons)[0].keep.shape == (5, 24)
    (tmp_path / "circuit.safetensors").unlink()
    with pytest.raises(UserError, match="by position"):
        read_circuit(tmp_path, neurons)


# -- graphs of heads and MLPs


CFG = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
ALL_NODES = ("input", "a0.h0", "a0.h1", "m0", "logits")


def graph(nodes: set[str], edges: set[str] = frozenset(), **more: Any) -> dict[str, Any]:
    """As `Graph.to_json` writes it."""
    every_edge = {"input->a0.h0<q>", "input->a0.h1<v>", "a0.h1->m0", "m0->logits", *edges}
    return {
        "cfg": CFG,
        "nodes": {name: {"in_graph": name in nodes, "score": 0.1} for name in ALL_NODES},
        "edges": {name: {"score": -0.5, "in_graph": name in edges} for name in sorted(every_edge)},
    } | more


HEAD_1 = [f"{OUT}:{channel}" for channel in range(4, 8)]
NEURONS = [f"{DOWN}:{neuron}" for neuron in range(16)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (graph({"input", "a0.h1", "logits"}), HEAD_1),
        (graph({"m0"}), NEURONS),
        (graph(set(), {"a0.h1->m0"}), HEAD_1 + NEURONS),
        (graph(set(), {"input->a0.h1<v>"}), HEAD_1),
        ({"cfg": CFG, "nodes": {"input": True, "a0.h0": False, "a0.h1": True, "m0": False}, "edges": {}}, HEAD_1),
        ({"nodes": {"a0.h1": True}}, HEAD_1),
        (graph({"m0"}, neurons={"m0": [neuron in (3, 5) for neuron in range(16)]}), [f"{DOWN}:3", f"{DOWN}:5"]),
        (graph({"a0.h1"}, neurons={"a0.h1": [0, 1, 0, 0]}), [f"{OUT}:5"]),
        (graph({"a0.h1", "m0"}, neurons={"m0": [False] * 8}), HEAD_1),
    ],
)
def test_graphs(content: Any, expected: list[str], neurons: DecomposedModel, tmp_path: Path) -> None:
    assert kept(neurons, write(tmp_path / "graph.json", content)) == expected


def test_a_graph_of_heads(heads: DecomposedModel, tmp_path: Path) -> None:
    circuit, notes = read_circuit(write(tmp_path / "graph.json", graph({"a0.h0", "m0"})), heads)
    assert [heads.nodes[node].label for node in circuit.kept] == [f"{OUT}:head0"]
    assert notes == ["no site of these is decomposed, so that they are never ablated: m0"]


def test_neurons_of_the_residual_stream_choose_nothing(neurons: DecomposedModel, tmp_path: Path) -> None:
    content = graph({"a0.h1"})
    content["nodes"]["a0.h1"]["neurons"] = [True] + 7 * [False]
    circuit, notes = read_circuit(write(tmp_path / "graph.json", content), neurons)
    assert [neurons.nodes[node].label for node in circuit.kept] == HEAD_1
    assert len(notes) == 1 and "dimensions of the residual stream" in notes[0] and "a0.h1" in notes[0]


def test_sites_that_a_graph_cannot_divide(tmp_path: Path) -> None:
    model = decompose(network(), ["embed", "*.attn.q", "*.attn.out", "unembed"], "svd")
    circuit, notes = read_circuit(write(tmp_path / "graph.json", graph({"a0.h1"})), model)
    sites = {model.nodes[node].components[0][0] for node in circuit.kept}
    assert sites == {"blocks.0.attn.q", OUT, "unembed"}, "not the embedding, as the input is not in the graph"
    assert notes[0].endswith(": m0") and notes[1].endswith(f": blocks.0.attn.q, {OUT}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (graph(set()), "nothing is in the graph"),
        (graph({"input", "logits"}), "nothing is in the graph"),
        (graph({"m0"}) | {"cfg": CFG | {"n_heads": 12, "n_layers": 12}}, "12 layers of 12 heads; expected those of"),
        ({"nodes": {"a3.h0": True}}, "there is no a3.h0 in Transformer, 1 layers of 2 heads"),
        ({"nodes": {"resid": True}}, "'resid' is no node"),
        (graph({"m0"}, {"m0 to logits"}), "'m0 to logits' is no edge"),
        ({"nodes": {"m0": "yes"}}, "m0 is yes; expected true or false"),
        ({"nodes": {"m0": {"in_graph": 1}}}, "expected true or false"),
        (graph({"m0"}, neurons={"m0": [True] * 5}), "m0 has 5 neurons; expected 16"),
        (graph({"m0"}, neurons={"m0": 7}), "neurons of m0 are 7"),
    ],
)
def test_wrong_graphs(content: Any, says: str, neurons: DecomposedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_circuit(write(tmp_path / "graph.json", content), neurons)
    assert says in str(refused.value) and "\n" not in str(refused.value)
