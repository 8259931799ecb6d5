"""Circuits on disk, and whether they belong to a model."""

from __future__ import annotations

import json

import pytest
import torch
from circuits.small_networks import linear_model

from pdprune.circuits.circuit import Circuit
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError

CONTRACT = {
    "schema", "n_nodes", "n_kept", "kept", "target", "decomposition", "task", "scheme", "reference", "scope", "loss",
    "target_loss", "reached", "seed", "config", "versions",
}  # fmt: skip


def model() -> DecomposedModel:
    return linear_model(torch.arange(12.0).reshape(2, 6))


def circuit(per_position: bool = False) -> Circuit:
    gates = torch.tensor([[0.9, 0, 0, 0.7, 0, 0], [0, 0, 0, 1.0, 0, 0.2]])
    gates = gates if per_position else gates.amax(0)
    return Circuit.of(
        model(),
        gates > 0.5,
        gates,
        scheme="adversarial",
        target_loss=0.1,
        reached=True,
        seed=3,
        task="quotes",
        config={"steps": 5},
        worst_source=torch.rand(6),
        worst_source_delta=torch.rand(1),
    )


@pytest.mark.parametrize("per_position", [False, True])
def test_a_saved_circuit_is_read_back(tmp_path, per_position: bool) -> None:
    saved = circuit(per_position)
    saved.save(tmp_path)
    for path in (tmp_path, tmp_path / "circuit.json", str(tmp_path)):
        loaded = Circuit.load(path)
        assert torch.equal(loaded.keep, saved.keep) and loaded.keep.dtype == torch.bool
        assert torch.equal(loaded.gates, saved.gates)
        assert torch.equal(loaded.worst_source, saved.worst_source)
        assert torch.equal(loaded.worst_source_delta, saved.worst_source_delta)
        for name in ("nodes", "kept", "target", "decomposition", "scheme", "target_loss", "reached", "seed", "task"):
            assert getattr(loaded, name) == getattr(saved, name)
        assert loaded.config == {"steps": 5} and loaded.versions == saved.versions
    loaded.check_fits(model())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["circuit.json", "circuit.safetensors"]


def test_the_json_keeps_the_contract(tmp_path) -> None:
    circuit().save(tmp_path)
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content.keys() >= CONTRACT
    assert content["n_nodes"], content["n_kept"] == (6, 2)
    assert content["kept"][1] == {"node": 3, "label": "0:3", "components": [["0", 3]], "gate": 1.0}
    assert set(content["target"]) == set(content["decomposition"]) == {"name", "sha256"}
    assert set(content["versions"]) == {"pdprune", "torch"}
    circuit(per_position=True).save(tmp_path)
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert [kept["positions"] for kept in content["kept"]] == [[0], [0, 1]]


def test_a_circuit_fits_its_own_model_only() -> None:
    made = circuit()
    other_target = linear_model(torch.ones(2, 6))
    V, U = torch.eye(6) * 2, torch.arange(12.0).reshape(2, 6).T / 2
    other_components = DecomposedModel.from_components(model().target, {"0": (V, U)})
    for other, what in ((other_target, "target"), (other_components, "decomposition")):
        with pytest.raises(UserError, match=f"made for the {what}"):
            made.check_fits(other)


def test_circuits_compare() -> None:
    first, second = (Circuit.of(model(), torch.tensor(keep) > 0) for keep in ([1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0]))
    assert first.compare(second) == (0.5, [1, 4], [0], [2])
    nothing = Circuit.of(model(), torch.zeros(6) > 0)
    assert nothing.compare(nothing).jaccard == 1
    with pytest.raises(UserError, match="one decomposition"):
        first.compare(Circuit.of(linear_model(torch.ones(2, 5)), torch.ones(5) > 0))


@pytest.mark.parametrize(
    "damage",
    [
        "no json",
        "no tensors",
        "truncated json",
        "truncated tensors",
        "schema",
        "mixed",
        "key",
        "kept",
        "binary",
        "list",
    ],
)
def test_damaged_circuits_are_refused_in_one_line(tmp_path, damage: str) -> None:
    circuit().save(tmp_path)
    file, tensors = tmp_path / "circuit.json", tmp_path / "circuit.safetensors"
    content = json.loads(file.read_text())
    match damage:
        case "no json":
            file.unlink()
        case "no tensors":
            tensors.unlink()
        case "truncated json":
            file.write_text(file.read_text()[:99])
        case "truncated tensors":
            tensors.write_bytes(tensors.read_bytes()[:50])
        case "schema":
            file.write_text(json.dumps(content | {"schema": 7}))
        case "mixed":  # as if a crash fell between the two files
            before = file.read_bytes()
            circuit(per_position=True).save(tmp_path)
            file.write_bytes(before)
        case "key":
            file.write_text(json.dumps({name: value for name, value in content.items() if name != "scope"}))
        case "kept":
            file.write_text(json.dumps(content | {"kept": content["kept"][:1]}))
        case "binary":
            file.write_bytes(b"\xff\x00\x9f")
        case "list":
            file.write_text("[]")
    with pytest.raises(UserError) as error:
        Circuit.load(tmp_path if damage != "no json" else file)
    assert "\n" not in str(error.value) and "circuit." in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        circuit().save(tmp_path / "file" / "folder")
