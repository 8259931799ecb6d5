"""What cannot be decomposed or masked is refused in one line that says where and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decomposition.small_nets import VOCAB, small_lm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.errors import UserError

W = torch.eye(2)
IDS = torch.arange(12).reshape(3, 4) % VOCAB


def from_components(target: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: DecomposedModel.from_components(target, *args, **kwargs)


def decomposed(target: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: decompose(target, *args, **kwargs)


def with_nan(value: float) -> nn.Module:
    target = small_lm(0)
    target.norm.weight.data[1] = value
    return target


PAIR = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
PAIR_COMPONENTS = {"0": (W, W), "1": (W, W)}
ALL = [("0", 0), ("0", 1), ("1", 0), ("1", 1)]

BAD_DECOMPOSITIONS = {
    "no components": (from_components(PAIR, {}), "at least one site"),
    "no such path": (from_components(PAIR, {"2": (W, W)}), "no module '2': its sites are '0', '1'"),
    "wrong kind": (from_components(small_lm(0), {"norm": (W, W)}), "'norm' is a LayerNorm"),
    "one module twice": (
        from_components(nn.ModuleDict({"a": PAIR, "b": PAIR}), {"a.0": (W, W), "b.0": (W, W)}),
        "'a.0' and 'b.0' are one and the same",
    ),
    "wrong V": (
        from_components(PAIR, {"0": (torch.ones(3, 2), W)}),
        r"V of site '0' has shape \[3, 2\], expected \[2, 2\]",
    ),
    "wrong U": (
        from_components(PAIR, {"0": (W, torch.ones(2, 5))}),
        r"U of site '0' has shape \[2, 5\], expected \[2, 2\]",
    ),
    "V and U apart": (from_components(PAIR, {"0": (torch.ones(2, 3), W)}), r"U of site '0' .* expected \[3, 2\]"),
    "flat V": (from_components(PAIR, {"0": (torch.ones(2), W)}), r"V of site '0' has shape \[2\]"),
    "empty": (from_components(PAIR, {"0": (torch.ones(2, 0), torch.ones(0, 2))}), "V of site '0'"),
    "NaN in U": (from_components(PAIR, {"0": (W, W * torch.nan)}), "U of site '0' holds NaN"),
    "NaN in target": (decomposed(with_nan(float("nan")), "*", "svd"), "'norm.weight' of the target holds NaN"),
    "inf in target": (decomposed(with_nan(float("inf")), "*", "svd"), "'norm.weight' of the target holds NaN or inf"),
    "lazy": (from_components(nn.LazyLinear(2), {"": (W, W)}), "not initialised"),
    "max_norm": (decomposed(nn.Embedding(3, 2, max_norm=1.0), "", "svd"), "max_norm"),
    "parametrized": (decomposed(nn.Sequential(weight_norm(nn.Linear(2, 2))), "*", "svd"), "from other parameters"),
    "node missing": (from_components(PAIR, PAIR_COMPONENTS, [ALL[:3]]), "component 1 of site '1' is in no node"),
    "node twice": (
        from_components(PAIR, PAIR_COMPONENTS, [ALL, ALL[:1]]),
        "component 0 of site '0' is in node 0 and in node 1",
    ),
    "node of no site": (from_components(PAIR, PAIR_COMPONENTS, [[*ALL, ("2", 0)]]), "names site '2'"),
    "node out of range": (from_components(PAIR, PAIR_COMPONENTS, [[*ALL, ("1", 2)]]), "expected 0 to 1"),
    "empty node": (from_components(PAIR, PAIR_COMPONENTS, [ALL, []]), "node 1 has no components"),
    "labels": (from_components(PAIR, PAIR_COMPONENTS, labels=["a"]), "1 labels for 4 nodes"),
    "pattern matches nothing": (decomposed(PAIR, ["0", "*.down"], "svd"), r"'\*.down' matches nothing: .* '0', '1'"),
    "pattern matches a norm": (decomposed(small_lm(0), "nor*", "svd"), "matches nothing"),
    "path of a norm": (decomposed(small_lm(0), "norm", "svd"), "'norm' is a LayerNorm"),
    "no pattern": (decomposed(PAIR, [], "svd"), "no site pattern"),
    "no sites": (decomposed(nn.ReLU(), "*", "svd"), "sites are none"),
    "basis": (decomposed(PAIR, "*", "pca"), "'svd', 'neuron' or 'head'"),
    "heads unknown": (decomposed(PAIR, "*", "head"), "needs n_heads"),
    "heads do not divide": (decomposed(PAIR, "*", "head", n_heads=3), "2 columns, which do not divide into n_heads=3"),
    "heads of none": (decomposed(PAIR, "*", "head", n_heads=0), "n_heads=0"),
    "heads of embeddings": (decomposed(nn.Embedding(4, 2), "", "head", n_heads=2), "is an Embedding"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("name", BAD_DECOMPOSITIONS)
def test_bad_decompositions(name: str) -> None:
    build, message = BAD_DECOMPOSITIONS[name]
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lead", [(2,), (3,), (4, 4), (3, 4, 1), (2, 1, 4)])
def test_masks_that_do_not_broadcast(lead: tuple[int, ...]) -> None:
    model = DecomposedModel.from_components(small_lm(0), {"down": (torch.ones(3, 1), torch.ones(1, 4))})
    message = f"mask at site 'down' has leading dimensions {list(lead)}, which do not broadcast against [3, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        model(IDS, torch.ones(*lead, 1))
    with pytest.raises(UserError, match=f"^delta_{re.escape(message)}"):
        model(IDS, None, torch.ones(*lead, 1))


def test_masks_of_the_wrong_width() -> None:
    model = decompose(small_lm(0), "down", "svd")
    for mask in (torch.ones(4), torch.ones(2), torch.ones(3, 4, 1), torch.ones(())):
        with pytest.raises(UserError, match=r"mask has shape .*, expected \[..., 3\]"):
            model(IDS, mask)
    with pytest.raises(UserError, match=r"delta_mask has shape \[2\], expected \[..., 1\]"):
        model(IDS, None, torch.ones(2))


class Pooled(nn.Module):
    """The head reads `[B, I]` where the body reads `[B, T, I]`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


@pytest.mark.parametrize("lead", [(3,), (4,), (3, 1), (3, 4)])
@pytest.mark.parametrize("n_positions", [3, 4])
def test_a_site_whose_input_has_lost_dimensions(lead: tuple[int, ...], n_positions: int) -> None:
    """Even where the sizes happen to fit: `[T, n]` must not mean examples at the head because `B = T`."""
    model = decompose(Pooled(), "*", "neuron")
    with pytest.raises(UserError):
        model(torch.ones(3, n_positions, 2), torch.ones(*lead, 4))
    model(torch.ones(3, n_positions, 2), torch.ones(1, 1, 4))
    with pytest.raises(UserError, match=r"site 'head' reads leading dimensions \[3\] where site 'body' reads \[3, 3\]"):
        model(torch.ones(3, 3, 2), torch.ones(3, 4))


def test_references_that_do_not_fit() -> None:
    model = decompose(small_lm(0), ["mix", "down"], "svd")
    good = {"mix": torch.zeros(4).double(), "down": torch.zeros(3).double()}
    shared, per_token = torch.zeros(7), torch.zeros(3, 4, 7)
    for mask in (shared, per_token):
        with pytest.raises(UserError, match="reference lacks site 'mix'"):
            model(IDS, mask, None, {"down": good["down"]})
        with pytest.raises(UserError, match="names an unknown site 'up'"):
            model(IDS, mask, None, {**good, "up": good["mix"]})
        for bad in (torch.zeros(3, 4), torch.zeros(2, 4, 4), torch.zeros(1, 3, 4, 4)):
            with pytest.raises(UserError, match="reference at site 'mix' has leading dimensions"):
                model(IDS, mask, None, {**good, "mix": bad.double()})


def test_weights_that_are_read_without_a_call() -> None:
    """The output projection of MultiheadAttention is never called: masks by token cannot reach it, and say so."""
    model = decompose(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), ["*out_proj", "linear1"], "neuron")
    x = torch.ones(2, 3, 4)
    model(x, torch.zeros(8))
    with pytest.raises(UserError, match=r"'self_attn.out_proj' is never called"):
        model(x, torch.zeros(2, 3, 8))
    with pytest.raises(UserError, match=r"'self_attn.out_proj' is never called"):
        model.site_inputs(x)
