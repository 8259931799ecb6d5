"""Contexts: where nodes are furthest from their reference."""

from __future__ import annotations

import torch
from decomposition.small_nets import SITES, small_lm
from torch import nn

import pdprune
from pdprune.batches import as_batch
from pdprune.decomposition import mean_reference
from pdprune.report import activity
from pdprune.report.activity import peaks_of


def test_the_strongest_examples_come_first_and_padding_is_left_out(monkeypatch: object) -> None:
    model = pdprune.decompose(small_lm(1).float(), sites=list(SITES), basis="neuron")
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 5, (7, 6)), torch.ones(7, 6, dtype=torch.long)
    mask[2, :3] = 0
    mask[5, 4:] = 0
    raw = {"inputs": {"input_ids": ids, "attention_mask": mask}}
    reference = mean_reference(model, [raw])
    down = [index for index, node in enumerate(model.nodes) if node.components[0][0] == "down"]
    read = model.site_inputs(raw["inputs"])["down"] - reference["down"]
    expected = (read.abs() * mask[..., None]).amax(1)
    monkeypatch.setattr(activity, "VALUES_AT_ONCE", 40)  # type: ignore[attr-defined]
    parts = [as_batch({"inputs": {key: value[rows] for key, value in raw["inputs"].items()}}) for rows in
             (slice(0, 3), slice(3, 7))]  # fmt: skip
    peaks = peaks_of(model, down, parts, reference, contexts=3)
    for component, of_node in enumerate(peaks):
        examples = [peak.example for peak in of_node]
        assert len(set(examples)) == 3
        assert torch.allclose(expected[examples, component], expected[:, component].topk(3).values)
        for peak in of_node:
            row = read[peak.example, :, component]
            assert mask[peak.example, peak.position] == 1
            assert torch.isclose(row[peak.position].abs(), expected[peak.example, component])
            n_tokens = int(mask[peak.example].sum())
            assert len(peak.values) == n_tokens
            assert torch.allclose(torch.tensor(peak.values), row[peak.start : peak.start + n_tokens])


def test_long_examples_are_cut_around_the_peak() -> None:
    model = pdprune.decompose(small_lm(1).float(), sites=["embed"], basis="neuron")
    ids = torch.zeros(1, 300, dtype=torch.long)
    ids[0, 150] = 3
    (of_node,) = peaks_of(model, [3], [as_batch({"inputs": {"input_ids": ids}})], None, contexts=2)
    (peak,) = of_node
    assert (peak.position, len(peak.values)) == (150, activity.WINDOW)
    assert peak.values[peak.position - peak.start] == 1.0


def test_a_node_of_several_components_has_the_length_of_what_it_writes() -> None:
    target = nn.Sequential(nn.Linear(3, 2, bias=False))
    components = {"0": (torch.eye(3), target[0].weight.detach().t())}
    model = pdprune.DecomposedModel.from_components(target, components, nodes=[[("0", 0), ("0", 2)], [("0", 1)]])
    x = torch.tensor([[1.0, -2.0, 3.0]])
    both, single = peaks_of(model, [0, 1], [as_batch(x)], None, contexts=1)
    lengths = target[0].weight.detach().norm(dim=0)
    assert torch.isclose(torch.tensor(both[0].values[0]), (lengths[0] ** 2 + (3 * lengths[2]) ** 2).sqrt())
    assert single[0].values == [-2.0]


def test_a_node_that_never_leaves_its_reference_has_no_context() -> None:
    model = pdprune.decompose(small_lm(1).float(), sites=["embed"], basis="neuron")
    (never,) = peaks_of(model, [4], [as_batch({"inputs": {"input_ids": torch.zeros(2, 3, dtype=torch.long)}})], None, 2)
    assert never == []
