"""What a DataLoader yields, in every form that is promised, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pdprune.batches import as_batch, as_batches, output_of, to_device
from pdprune.errors import UserError

X = torch.arange(12.0).reshape(4, 3)
IDS = torch.arange(20).reshape(4, 5)
LABELS = torch.tensor([0, 2, 1, -100])


def test_a_tensor_is_all_inputs() -> None:
    batch = as_batch(X)
    assert batch.inputs is X and batch.raw is X and batch.size == 4
    assert batch.labels is None and batch.positions is None and batch.attention_mask is None


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_is_inputs_and_labels(kind: type) -> None:
    batch = as_batch(kind((X, LABELS)))
    assert batch.inputs is X and batch.labels is LABELS


@pytest.mark.parametrize(
    "inputs",
    [X, (X, IDS), [X], {"x": X}, {"flag": True, "x": X}, {"input_ids": IDS}],
    ids=["tensor", "arguments", "list", "keywords", "flag first", "tokens"],
)
def test_inputs_of_every_kind_have_a_size(inputs: Any) -> None:
    assert as_batch({"inputs": inputs, "labels": LABELS}).size == 4


def test_positions_become_rows_or_stay_a_mask() -> None:
    one = as_batch({"inputs": IDS, "positions": torch.tensor([1, 2, 3, 4])})
    several = as_batch({"inputs": IDS, "positions": torch.tensor([[1, -1], [2, 0], [3, -1], [4, 1]])})
    mask = as_batch({"inputs": IDS, "positions": torch.ones(4, 5, dtype=torch.bool)})
    assert one.positions is not None and one.positions.tolist() == [[1], [2], [3], [4]]
    assert several.positions is not None and several.positions.shape == (4, 2)
    assert mask.positions is not None and mask.positions.dtype == torch.bool


def test_the_attention_mask_comes_from_a_dict_of_inputs() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0]]).expand(4, -1)
    batch = as_batch({"inputs": {"input_ids": IDS, "attention_mask": mask}})
    assert batch.attention_mask is not None and torch.equal(batch.attention_mask, mask.bool())
    assert as_batch({"inputs": {"input_ids": IDS}}).attention_mask is None


def test_a_batch_is_read_once_only() -> None:
    batch = as_batch({"inputs": IDS, "positions": torch.tensor([1, 2, 3, 4])})
    assert as_batch(batch) is batch


def test_a_part_of_a_batch_takes_every_tensor_along() -> None:
    raw = {
        "inputs": {"input_ids": IDS, "flag": True, "scale": torch.tensor(2.0)},
        "labels": LABELS,
        "positions": torch.tensor([1, 2, 3, 4]),
        "choices": torch.arange(8).reshape(4, 2),
        "counterfactual": {"input_ids": IDS + 1},
    }
    part = as_batch(raw).select(torch.tensor([2, 0]))
    assert part.size == 2
    assert torch.equal(part.inputs["input_ids"], IDS[[2, 0]])
    assert part.inputs["flag"] is True and part.inputs["scale"] == 2
    assert part.labels.tolist() == [1, 0] and part.positions.tolist() == [[3], [1]]
    assert part.choices.tolist() == [[4, 5], [0, 1]]
    assert torch.equal(part.counterfactual["input_ids"], IDS[[2, 0]] + 1)


def test_to_device_goes_into_everything() -> None:
    raw = {"inputs": (X, {"deep": [IDS]}, "text"), "labels": LABELS}
    moved = to_device(raw, torch.device("meta"))
    assert moved["inputs"][0].is_meta and moved["inputs"][1]["deep"][0].is_meta and moved["labels"].is_meta
    assert moved["inputs"][2] == "text"
    assert to_device(as_batch(X), torch.device("cpu")).size == 4


def test_lists_and_loaders_are_read_as_batches() -> None:
    assert [batch.size for batch in as_batches([X, X[:2]])] == [4, 2]
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=3)
    assert [batch.size for batch in as_batches(loader)] == [3, 1]
    assert [batch.labels.tolist() for batch in as_batches(loader)] == [[0, 2, 1], [-100]]


@pytest.mark.parametrize(
    "output", [X, (X, "more"), [X], SimpleNamespace(logits=X)], ids=["tensor", "tuple", "list", "logits"]
)
def test_the_tensor_in_an_output(output: Any) -> None:
    assert output_of(output) is X


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("text", "expected a tensor, (inputs, labels), or a dict"),
        ((X, LABELS, IDS), "expected a tensor, (inputs, labels), or a dict"),
        ({"input_ids": IDS}, "with the key 'inputs'"),
        ({"inputs": X, "label": LABELS}, "unknown key 'label'"),
        ({"inputs": 3}, "inputs is a int"),
        ({"inputs": {"flag": True}}, "no tensor with a batch dimension"),
        ({"inputs": ()}, "no tensor with a batch dimension"),
        ({"inputs": X, "labels": LABELS[:2]}, "labels is a tensor of shape [2]; expected a tensor with 4 rows"),
        ({"inputs": X, "labels": [0, 1, 2, 3]}, "labels is a list"),
        ({"inputs": IDS, "positions": torch.zeros(3, 5, dtype=torch.bool)}, "positions is a tensor of shape [3, 5]"),
        ({"inputs": IDS, "choices": torch.tensor(3)}, "choices is a tensor of shape []"),
    ],
)
def test_other_batches_are_refused_in_one_line(raw: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        as_batch(raw)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw_batches", "says"),
    [
        ((X for _ in range(2)), "generator"),
        (iter([X]), "generator"),
        (X, "write [batch]"),
        ({"inputs": X}, "write [batch]"),
        ([], "got none"),
        (["text"], "a str"),
    ],
    ids=["generator", "iterator", "tensor", "dict", "empty", "text"],
)
def test_other_collections_are_refused_in_one_line(raw_batches: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        as_batches(raw_batches)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("output", ["text", (), {"logits": X}, SimpleNamespace(logits=None), ("text", X)])
def test_other_outputs_are_refused_in_one_line(output: Any) -> None:
    with pytest.raises(UserError, match=r"expected a tensor, a tuple that starts with one, or \.logits"):
        output_of(output)
