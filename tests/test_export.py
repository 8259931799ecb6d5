"""A circuit written for other tools, and read back by them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import networkx
import pytest
import torch
import yaml
from tiny_circuit import CONFIG, network, write_material

from pdprune import Circuit, DecomposedModel, decompose
from pdprune.circuits.node_table import Place, place_of, ranges, rows_of, where
from pdprune.export import main, write_export
from pdprune.targets import load_target

OUT, DOWN = "blocks.0.attn.out", "blocks.0.mlp.down"
KEPT = [1, 9, 12]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, as far as an export reads it."""
    monkeypatch.chdir(write_material(tmp_path))
    target = load_target("tiny")
    model = decompose(target.module, ["*.mlp.down", "*.attn.out"], "neuron")
    model.target_name = target.name
    circuit_of(model).save("run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "run"


def circuit_of(model: DecomposedModel) -> Circuit:
    keep = torch.zeros(model.n_nodes, dtype=torch.bool)
    keep[KEPT] = True
    gates = torch.linspace(0, 1, model.n_nodes)
    source = keep.float()
    return Circuit.of(model, keep, gates, worst_source=source, worst_source_delta=torch.ones(2), task="quotes")


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_graphs_come_back(run: Path) -> None:
    assert main([str(run)]) == 0
    by_graphml = networkx.read_graphml(run / "export" / "circuit.graphml", node_type=int)
    content = json.loads((run / "export" / "circuit.node_link.json").read_text())
    by_json = networkx.node_link_graph(content, edges="edges")
    for graph in (by_graphml, by_json):
        assert graph.is_directed() and sorted(graph) == KEPT
        assert graph.nodes[9] == {
            "label": f"{DOWN}:1",
            "site": DOWN,
            "component": "1",
            "layer": 0,
            "role": "mlp",
            "gate": pytest.approx(9 / 23),
            "worst_source": 1.0,
        }
        assert graph.nodes[1]["role"] == "attention"
        assert graph.graph["task"] == "quotes" and graph.graph["n_nodes"] == 24
        assert "target_loss" not in graph.graph, "what is not known is left out"


def test_edges_join_kept_nodes(tmp_path: Path) -> None:
    circuit = circuit_of(decompose(network(), ["*.mlp.down", "*.attn.out"], "neuron"))
    write_export(circuit, rows_of(circuit), tmp_path, edges=[(1, 9, -0.5), (9, 12, 0.25), (0, 9, 7.0)])
    graph = networkx.read_graphml(tmp_path / "circuit.graphml", node_type=int)
    assert {(u, v): of_edge["strength"] for u, v, of_edge in graph.edges(data=True)} == {(1, 9): -0.5, (9, 12): 0.25}


def test_the_table_has_all_nodes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(run / "elsewhere")]) == 0
    assert "nodes.csv" in capsys.readouterr().out
    rows = table(run / "elsewhere" / "nodes.csv")
    assert [int(row["node"]) for row in rows] == list(range(24))
    assert [int(row["node"]) for row in rows if row["kept"] == "True"] == KEPT
    row = rows[23]
    assert (row["label"], row["site"], row["component"], row["layer"]) == (f"{DOWN}:15", DOWN, "15", "0")
    assert (row["role"], float(row["gate"]), float(row["worst_source"])) == ("mlp", 1.0, 0.0)


def test_parquet_holds_the_same(run: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([str(run)]) == 0
    rows = parquet.read_table(run / "export" / "nodes.parquet").to_pylist()
    as_text = table(run / "export" / "nodes.csv")
    assert [{name: str(value) for name, value in row.items()} for row in rows] == as_text
    assert rows[1]["kept"] is True and rows[1]["layer"] == 0


def test_what_cannot_be_written_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (run / "config.yaml").unlink()
    assert main([str(run)]) == 0
    without_table, without_edges, without_parquet = capsys.readouterr().err.splitlines()
    assert "no edges" in without_edges and "audit.json" in without_edges
    assert "kept nodes only" in without_table and "config.yaml" in without_table
    assert "pip install 'pdprune[parquet]'" in without_parquet
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "circuit.graphml",
        "circuit.node_link.json",
        "nodes.csv",
    ]
    rows = table(run / "export" / "nodes.csv")
    assert [int(row["node"]) for row in rows] == KEPT


def test_no_circuit_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- the rows themselves


@pytest.mark.parametrize(
    ("site", "layer", "role"),
    [
        ("blocks.1.mlp.down", 1, "mlp"),
        ("blocks.0.attn.out", 0, "attention"),
        ("embed", None, "embedding"),
        ("pos", None, "embedding"),
        ("unembed", None, "unembedding"),
        ("transformer.h.11.attn.c_proj", 11, "attention"),
        ("transformer.wte", None, "embedding"),
        ("model.layers.3.self_attn.o_proj", 3, "attention"),
        ("gpt_neox.layers.2.attention.dense", 2, "attention"),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h", 2, "mlp"),
        ("embed_out", None, "unembedding"),
        ("model.decoder.layers.4.fc1", 4, "mlp"),
        ("lm_head", None, "unembedding"),
        ("linear1", None, "other"),
    ],
)
def test_places(site: str, layer: int | None, role: str) -> None:
    assert place_of(site) == Place(layer, role)


def test_components_in_few_characters() -> None:
    assert ranges([7, 0, 1, 2]) == "0-2,7"
    assert where([("a", 3), ("b", 0), ("a", 4), ("b", 9)]) == ("a b", "3-4 0,9")


def test_nodes_of_several_components_and_positions() -> None:
    model = decompose(network(), ["*.attn.out"], "head")
    keep = torch.tensor([[True, False], [False, False]])
    circuit = Circuit.of(model, keep, torch.tensor([[0.9, 0.2], [0.1, 0.3]]))
    first, second = rows_of(circuit, dict(enumerate(model.nodes)))
    assert (first.label, first.site, first.component) == (f"{OUT}:head0", OUT, "0-3")
    assert (first.kept, second.kept, first.worst_source) == (True, False, None)
    assert (first.gate, second.gate) == (pytest.approx(0.9), pytest.approx(0.3))
