"""Components grouped into nodes: planted mechanisms are found, kept whole, and called by their names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition.small_nets import random_decomposition, small_lm
from torch import Tensor, nn

import pdprune
from pdprune.circuits.circuit import Circuit
from pdprune.decomposition import (
    DecomposedModel,
    Node,
    co_important,
    decompose,
    read_clusters,
    regroup,
    write_clusters,
)
from pdprune.decomposition.clusters import join_similar
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings, importance_mask
from pdprune.errors import UserError

FIRST = [("0", 0), ("0", 2), *(("2", c) for c in (0, 2, 4))]
SECOND = [("0", 1), ("0", 3), *(("2", c) for c in (1, 3, 5))]


def two_mechanisms() -> nn.Module:
    """Even inputs go through even neurons to the first output, odd ones through odd neurons to the second.

    A seventh neuron never fires.
    """
    net = nn.Sequential(nn.Linear(4, 7, bias=False), nn.ReLU(), nn.Linear(7, 2, bias=False))
    weights = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    same = (torch.arange(7)[:, None] - torch.arange(4)[None, :]) % 2 == 0
    with torch.no_grad():
        net[0].weight.copy_(weights * same)
        net[0].weight[6] = -1
        net[2].weight.copy_(torch.tensor([[1.0, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 1]]))
    return net.requires_grad_(False)


def examples(which: str, n: int = 32, seed: int = 0) -> Tensor:
    """Inputs of which the even ones are there, the odd ones, or now these, now those, and at times both."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 4, generator=rng) + 0.5
    even, odd = torch.ones(n, 1), torch.ones(n, 1)
    if which == "either":
        even, odd = (torch.arange(n)[:, None] % 8 < 5).float(), (torch.arange(n)[:, None] % 8 > 3).float()
    x[:, ::2] *= 0 if which == "odd" else even
    x[:, 1::2] *= 0 if which == "even" else odd
    return x


def found(clusters: list[Node]) -> list[set[tuple[str, int]]]:
    return [set(cluster.components) for cluster in clusters]


def test_planted_mechanisms_are_found_from_activations() -> None:
    model = decompose(two_mechanisms(), ["0", "2"], "neuron")
    clusters = co_important(model, [examples("either"), examples("either", seed=1)])
    assert found(clusters) == [set(FIRST), set(SECOND)]
    assert clusters[0].label == "0:0 and 4 more"


def test_planted_mechanisms_are_found_from_importances() -> None:
    class Planted(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x = inputs["0"]
            return {name: x[:, torch.arange(size) % 2] - 0.2 for name, size in (("0", 4), ("2", 6))}

    components = {"0": (None, two_mechanisms()[0].weight.t()), "2": (torch.rand(7, 6), torch.rand(6, 2))}
    model = DecomposedModel.from_components(two_mechanisms(), components)
    model.importances = Planted()  # type: ignore[assignment]
    assert found(co_important(model, [examples("either")])) == [set(FIRST), set(SECOND)]
    assert co_important(model, [examples("either")], on_above=1.0) == []


def test_what_is_always_on_is_one_group_and_disjoint_groups_stay_apart() -> None:
    model = decompose(two_mechanisms(), "0", "neuron")
    assert found(co_important(model, [examples("both")])) == [{("0", c) for c in range(4)}]
    apart = torch.eye(4).repeat(3, 1)
    assert co_important(model, [apart], together=0.01) == []


def test_nodes_of_several_components_are_joined_whole() -> None:
    columns = {"0": (None, two_mechanisms()[0].weight.t())}
    nodes = [[("0", 0)], [("0", 1)], [("0", 2), ("0", 3)]]
    model = DecomposedModel.from_components(two_mechanisms(), columns, nodes)
    assert found(co_important(model, [examples("even")])) == [{("0", 0), ("0", 2), ("0", 3)}]


def test_padding_is_left_out() -> None:
    model = decompose(small_lm(0), ["mix", "down"], "neuron")
    ids = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.full_like(ids, 2)], dim=1), torch.cat([mask, 0 * mask], dim=1)
    batches = [
        [{"inputs": {"input_ids": ids, "attention_mask": mask}}],
        [{"inputs": {"input_ids": padded[0], "attention_mask": padded[1]}}],
    ]
    for on_above, together in itertools.product((0.2, 0.5), (0.3, 0.6)):
        groups = [found(co_important(model, batch, on_above, together)) for batch in batches]
        assert groups[0] == groups[1]


def slowly_joined(similarity: Tensor, least: float) -> list[list[int]]:
    """Join the two groups with the highest mean similarity of their pairs, again and again."""
    groups = [[i] for i in range(len(similarity))]
    while len(groups) > 1:
        pairs = {
            (a, b): float(similarity[groups[a]][:, groups[b]].mean())
            for a, b in itertools.combinations(range(len(groups)), 2)
        }
        (a, b), highest = max(pairs.items(), key=lambda item: item[1])
        if highest < least:
            break
        groups[a] += groups.pop(b)
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("seed", range(6))
def test_chains_join_what_the_slow_way_joins(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    points = torch.rand(14, 2, generator=rng, dtype=torch.double)
    similarity = torch.exp(-3 * torch.cdist(points, points))
    for least in (0.0, 0.3, 0.5, 0.8, 1.0):
        assert join_similar(similarity, least) == slowly_joined(similarity, least)


def test_ties_end() -> None:
    assert join_similar(torch.ones(9, 9), 1.0) == [list(range(9))]
    assert join_similar(torch.zeros(0, 0), 0.5) == []


@pytest.mark.parametrize("seed", range(4))
def test_regrouped_nodes_mask_their_components_as_before(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    model = random_decomposition(small_lm(seed), rng, with_delta=True, n_nodes=None)
    model.target_name = "small"
    everything = [component for node in model.nodes for component in node.components]
    order = torch.randperm(len(everything), generator=rng).tolist()
    groups = [[everything[i] for i in order[:3]], [everything[i] for i in order[3:5]]]
    grouped = regroup(model, groups, ["three", "two"])
    assert [node.label for node in grouped.nodes[:2]] == ["three", "two"]
    assert [node for node in grouped.nodes[2:]] == [
        node for node in model.nodes if node.components[0] not in groups[0] + groups[1]
    ]
    assert (grouped.target_name, grouped.n_nodes) == ("small", model.n_nodes - 3)
    mask = torch.rand(grouped.n_nodes, generator=rng, dtype=torch.double)
    owner = {component: i for i, node in enumerate(grouped.nodes) for component in node.components}
    by_component = mask[[owner[component] for component in everything]]
    ids = torch.randint(0, 5, (2, 3), generator=rng)
    torch.testing.assert_close(grouped(ids, mask), model(ids, by_component))


def test_the_recipe_and_nodes_of_several_components_survive() -> None:
    model = decompose(two_mechanisms(), "2", "head", n_heads=7)
    halves = decompose(two_mechanisms(), "0", "head", n_heads=2)
    assert [node.label for node in regroup(halves, [[("0", 0)]]).nodes] == ["0:0", "0:1", "0:head1"]
    assert [node.label for node in regroup(model, []).nodes] == [node.label for node in model.nodes]
    assert regroup(model, []).decomposition_sha256 == model.decomposition_sha256
    svd = decompose(two_mechanisms(), "2", "svd")
    assert regroup(svd, [[("2", 0), ("2", 1)]]).recipe == "svd"


def test_a_group_is_as_important_as_the_most_important_of_it() -> None:
    model = decompose(two_mechanisms(), ["0", "2"], "neuron")
    model.importances = CausalImportances(model.sites, ImportanceSettings("site_mlp"), seed=1)
    grouped = regroup(model, [FIRST])
    x = examples("both")
    before, after = importance_mask(model, x), importance_mask(grouped, x)
    first = [i for i, node in enumerate(model.nodes) if node.components[0] in FIRST]
    torch.testing.assert_close(after[:, 0], before[:, first].amax(-1))
    assert 0 < float(after.mean()) < 1


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([[("0", 0)], [("0", 1), ("0", 0)]], "component 0 of site '0' is in node 0 and in node 1"),
        ([[("nowhere", 0)]], "node 0 names site 'nowhere'"),
        ([[("0", 0)], [("2", 7)]], "node 1 names component 7 of site '2': expected 0 to 6"),
        ([[]], "node 0 has no components"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: list[list[tuple[str, int]]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        regroup(decompose(two_mechanisms(), ["0", "2"], "neuron"), groups)


def test_one_mechanism_is_kept_and_audited_under_its_name(tmp_path: Path) -> None:
    model = decompose(two_mechanisms(), ["0", "2"], "neuron")
    grouped = regroup(model, [SECOND, FIRST], ["odd", "even"])
    assert grouped.n_nodes == 3
    batches = [examples("even", 8, seed) for seed in range(2)]
    circuit = pdprune.prune(grouped, batches, loss="mse", target_loss=1e-4)
    assert circuit.kept == [1]
    for which, holds in (("even", True), ("both", False)):
        held_out = [examples(which, 8, seed=9)]
        checked = pdprune.audit(grouped, circuit, held_out, loss="mse", target_loss=1e-4, draws=4, random_circuits=1)
        assert checked.faithful is holds, "odd examples need the odd neurons"
    circuit.save(tmp_path)
    (kept,) = json.loads((tmp_path / "circuit.json").read_text())["kept"]
    assert kept["label"] == "even"
    assert [tuple(component) for component in kept["components"]] == FIRST
    assert Circuit.load(tmp_path).nodes == {1: Node(tuple(FIRST), "even")}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    clusters = [Node(tuple(FIRST), "gerade ÷ 2"), Node(tuple(SECOND), "odd")]
    write_clusters(tmp_path / "clusters.json", clusters)
    assert read_clusters(tmp_path / "clusters.json") == clusters


A = (("a.b", 1), ("c", 0))
B = (("c", 2),)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ([[["a.b", 1], ["c", 0]], [["c", 2]]], [Node(A, "a.b:1 and 1 more"), Node(B, "c:2")]),
        ([{"label": "x", "components": [["c", 2]]}, {"components": [*A]}], [Node(B, "x"), Node(A, "a.b:1 and 1 more")]),
        ({"a.b:1": 3, "c:0": 3, "c:1": None, "c:2": "x"}, [Node(A, "cluster 3"), Node(B, "x")]),
        ({"clusters": {"a.b:1": 0, "c:0": 0}, "spd_run": "some/run", "notes": ""}, [Node(A, "cluster 0")]),
    ],
)
def test_a_file_may_have_three_forms(tmp_path: Path, content: Any, read: list[Node]) -> None:
    (tmp_path / "clusters.json").write_text(json.dumps(content))
    assert read_clusters(tmp_path / "clusters.json") == read


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{nope", "damaged or no JSON"),
        ("3", "holds a JSON int"),
        ("[]", "holds no groups"),
        ('{"c:0": null}', "holds no groups"),
        ("[3]", r"cluster 0 is 3; expected \[\[site, index\]"),
        ("[[]]", r"cluster 0 is \[\]"),
        ('[[["c", 0]], [["c", "0"]]]', r'cluster 1 has \["c", "0"\]; expected \[site, index\]'),
        ('[[["c", true]]]', "cluster 0 has"),
        ('[{"label": "x"}]', "cluster 0 is"),
        ('[{"components": [["c", 0]], "lable": "x"}]', "lable"),
        ('[{"components": [["c", 0]], "label": 3}]', "label 3; expected a string"),
        ('{"c": 0}', "key 'c'"),
        ('{"c:0": 1.5}', "c:0 has cluster 1.5"),
        ('{"clusters": []}', r"clusters is \[\]; expected an object"),
    ],
)
def test_files_that_are_no_groups_are_refused_in_one_line(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "clusters.json"
    path.write_text(content)
    with pytest.raises(UserError, match=named) as refusal:
        read_clusters(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_clusters(tmp_path / "nowhere.json")


def test_a_config_names_groups_by_their_file(tmp_path: Path) -> None:
    def load() -> DecomposedModel:
        return pdprune.Decomposition(target="dense-py", sites=["blocks.0.mlp.down"], nodes=str(path)).load()

    path = tmp_path / "mine.json"
    groups = [[["blocks.0.mlp.down", c] for c in range(3)]]
    path.write_text(json.dumps(groups))
    model = load()
    assert model.n_nodes == 384 - 2
    assert model.nodes[0].label == "blocks.0.mlp.down:0 and 2 more"
    assert model.target_name == "dense-py"
    path.write_text(json.dumps([[["blocks.1.mlp.down", 0]]]))
    with pytest.raises(UserError, match=r"mine\.json: node 0 names site 'blocks\.1\.mlp\.down'"):
        load()
